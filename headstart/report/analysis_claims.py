"""The claims that one may want to make about a donor, each with its null and a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from headstart.report.analysis_data import (
    NO_POWER_LAW,
    POWER_LAW,
    ROW_COLUMN_TESTS,
    UNDECIDED,
    Model,
    alphas_with_noise,
    count_pairs,
    count_verdicts,
    is_measured,
    is_mostly_undecided,
    matrices_above_noise,
    matrices_with_kurtosis,
    spectrum_entries,
)

FDR_LEVEL = 0.05  # false discovery rate; also the level of single tests that are counted
COUNT_LEVEL = 0.01  # probability, under chance, of a count that supports a claim; lower, as a page makes ten claims
BEYOND, NOT_BEYOND, NOT_ENOUGH_DATA = "beyond chance", "not beyond chance", "not enough data"


@dataclass(frozen=True)
class Claim:
    """A statement about a donor, what was measured, what chance alone gives, and the verdict."""

    statement: str
    measured: str
    by_chance: str
    verdict: str  # BEYOND | NOT_BEYOND | NOT_ENOUGH_DATA


def list_claims(model: Model) -> Iterator[Claim]:
    """All claims that the measured parts allow."""
    if is_measured(model["marginals"]):
        yield from _kurtosis_claim(model)
    if is_measured(model["spectra"]):
        yield _edge_claim(model)
        yield from _alpha_claim(model)
    if is_measured(model["dsv"]):
        for rank in model["dsv"]:
            yield from _similarity_claims(model, rank)
    if is_measured(model["row_column"]):
        yield from _row_column_claims(model)
        yield from _coupling_claims(model)


def _kurtosis_claim(model: Model) -> Iterator[Claim]:
    matrices = matrices_with_kurtosis(model)
    if not matrices:
        return
    heavy = sum(discoveries([kurtosis_p_value(t["kurtosis"], t["count"]) for t in matrices]))
    yield Claim(
        "Weights have heavier tails than a normal distribution",
        f"{heavy} of {len(matrices)} matrices; median kurtosis {median(t['kurtosis'] for t in matrices):.2f}",
        "kurtosis 3, if weights were normal",
        BEYOND if heavy else NOT_BEYOND,
    )


def _edge_claim(model: Model) -> Claim:
    above, measured = matrices_above_noise(model)
    noise = [t["noise"]["outliers"] > 0 for t in spectrum_entries(model) if t.get("outliers") is not None]
    return Claim(
        "Singular values rise above the edge of noise (Marchenko-Pastur)",
        f"{above} of {measured} matrices",
        f"{sum(noise)} of {len(noise)} random matrices of the same shapes",
        BEYOND if noise and above / measured > max(sum(noise) / measured, FDR_LEVEL) else NOT_BEYOND,
    )


def _alpha_claim(model: Model) -> Iterator[Claim]:
    pairs = alphas_with_noise(model)
    if not pairs:
        return
    below = sum(alpha < noise for alpha, noise in pairs)
    alpha, noise = (median(values) for values in zip(*pairs, strict=True))
    yield Claim(
        "Spectra have heavier tails (a lower α) than noise",
        f"α is below that of a random matrix in {below} of {len(pairs)} matrices; median α {alpha:.2f}",
        f"half of the matrices, if weights were noise; median α of noise {noise:.2f}",
        BEYOND if probability_of_count(below, len(pairs), 0.5) < COUNT_LEVEL else NOT_BEYOND,
    )


def _similarity_claims(model: Model, rank: str) -> Iterator[Claim]:
    pairs = count_pairs(model, rank)
    counts = count_verdicts(model, rank)
    rejected = sum(discoveries([row.get("p") for row in model["dsv"][rank]["pairs"]]))
    yield Claim(
        f"Distances between layers follow a power law (top {rank} singular values)",
        f"{counts[POWER_LAW]} of {pairs} pairs of projections; {counts[UNDECIDED]} undecided",
        in_random_matrices(model, rank, POWER_LAW),
        _similarity_verdict(model, rank, POWER_LAW),
    )
    yield Claim(
        f"Some pairs of projections follow no power law (top {rank}); LoRA method pareto groups by these",
        f"{counts[NO_POWER_LAW]} of {pairs} pairs; goodness of fit rejects {rejected}, corrected for {pairs} tests",
        in_random_matrices(model, rank, NO_POWER_LAW),
        _similarity_verdict(model, rank, NO_POWER_LAW),
    )


def _similarity_verdict(model: Model, rank: str, verdict: str) -> str:
    if is_mostly_undecided(model, rank):
        return NOT_ENOUGH_DATA
    return BEYOND if exceeds_random_matrices(model, rank, verdict) else NOT_BEYOND


def in_random_matrices(model: Model, rank: str, verdict: str) -> str:
    """How many pairs get a verdict in both kinds of random matrices, as text."""
    gaussian, spikes = (count_verdicts(model, rank, null)[verdict] for null in ("gaussian", "spikes"))
    return f"{gaussian} in Gaussian matrices of the same shapes, {spikes} with random spikes added"


def exceeds_random_matrices(model: Model, rank: str, verdict: str) -> bool:
    """Whether more pairs get a verdict than in random matrices of either kind, by two standard deviations of a Poisson
    count (at least one). Pairs share layers, so real counts scatter more: this is a minimum."""
    largest = max(count_verdicts(model, rank, null)[verdict] for null in model["dsv"][rank]["nulls"])
    return count_verdicts(model, rank)[verdict] > largest + 2 * math.sqrt(max(largest, 1))


def _row_column_claims(model: Model) -> Iterator[Claim]:
    for test, label in ROW_COLUMN_TESTS.items():
        p_values = [t[f"{test}_p"] for t in model["row_column"]["tensors"] if t.get(f"{test}_p") is not None]
        if p_values:
            yield Claim(
                f"Rows and columns carry structure beyond the values: {label}",
                f"{count_significant(p_values)} of {len(p_values)} matrices",
                f"{FDR_LEVEL * len(p_values):.1f} of {len(p_values)}, if the entries of each matrix are shuffled",
                _count_verdict(p_values),
            )


def _coupling_claims(model: Model) -> Iterator[Claim]:
    couplings = model["row_column"]["couplings"]
    for space in dict.fromkeys(c["space"] for c in couplings):
        tested = [c for c in couplings if c["space"] == space and c["p"] is not None]
        correlations = [c["correlation"] for c in tested if c["correlation"] is not None]
        p_values = [c["p"] for c in tested]
        if p_values:
            typical = f"; median correlation {median(correlations):+.2f}" if correlations else ""
            yield Claim(
                f"Matrices that share a space are coupled: {space}",
                f"{count_significant(p_values)} of {len(p_values)} couplings{typical}",
                f"{FDR_LEVEL * len(p_values):.1f} of {len(p_values)}, if the units of one side are shuffled",
                _count_verdict(p_values),
            )


def discoveries(p_values: Sequence[float | None], level: float = FDR_LEVEL) -> list[bool]:
    """Which tests are significant at a false discovery rate of `level` (Benjamini & Hochberg 1995). A None is no
    test and does not count."""
    from scipy.stats import false_discovery_control

    known = [p for p in p_values if p is not None]
    adjusted = iter(false_discovery_control(known) if known else ())
    return [p is not None and bool(next(adjusted) <= level) for p in p_values]


def kurtosis_p_value(kurtosis: float, count: int) -> float:
    """One-sided p-value of a kurtosis above 3 for a normal sample of size `count`; standard error sqrt(24 / count)."""
    return 0.5 * math.erfc((kurtosis - 3) / math.sqrt(24 / count) / math.sqrt(2))


def probability_of_count(successes: int, trials: int, chance: float) -> float:
    """Binomial probability of at least this number of successes."""
    from scipy.stats import binom

    return float(binom.sf(successes - 1, trials, chance))


def count_significant(p_values: Sequence[float]) -> int:
    """How many are significant, each on its own."""
    return sum(p <= FDR_LEVEL for p in p_values)


def _count_verdict(p_values: Sequence[float]) -> str:
    """Whether this number of significant tests is unlikely by chance. A correction of single tests would be too
    strict: the permutations give no p-value below 1 in 200."""
    probability = probability_of_count(count_significant(p_values), len(p_values), FDR_LEVEL)
    return BEYOND if probability < COUNT_LEVEL else NOT_BEYOND


def count_tests(model: Model) -> dict[str, int]:
    """What was tested -> number of tests behind the claims."""
    counts = {"kurtosis": len(matrices_with_kurtosis(model))}
    if is_measured(model["spectra"]):
        counts["exponents against noise"] = len(alphas_with_noise(model))
    if is_measured(model["dsv"]):
        rows = [row for found in model["dsv"].values() for row in found["pairs"]]
        counts["power laws"] = sum(row.get("p") is not None for row in rows)
        counts["likelihood ratios"] = sum(len(row.get("ratios") or {}) for row in rows)
    if is_measured(model["row_column"]):
        tensors, couplings = model["row_column"]["tensors"], model["row_column"]["couplings"]
        counts["rows and columns"] = sum(t.get(f"{test}_p") is not None for t in tensors for test in ROW_COLUMN_TESTS)
        counts["couplings"] = sum(c["p"] is not None for c in couplings)
    return counts


def verdict_rules(model: Model) -> list[str]:
    """How many tests there are, and how each verdict accounts for that."""
    counts = count_tests(model)
    listed = ", ".join(f"{what} {count}" for what, count in counts.items())
    return [
        f"{sum(counts.values())} tests stand behind this table ({listed}).",
        f"Kurtosis: matrices at a false discovery rate of {FDR_LEVEL:.0%} (Benjamini-Hochberg).",
        f"Exponents, rows, columns and couplings: each test counts on its own (p ≤ {FDR_LEVEL:g}, or an exponent below "
        f"that of noise). The claim holds where chance gives such a count with a probability below {COUNT_LEVEL:g}. "
        "Permutations give no p below 0.005, so a single real effect among many tests stays hidden.",
        "Pairs of projections: single verdicts are not corrected for each other, because pairs share layers. Count "
        "them, and do not pick one. Chance is one draw of each kind of random matrices. A claim needs a count above "
        "both by two standard deviations.",
    ]
