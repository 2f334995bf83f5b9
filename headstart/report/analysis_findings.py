"""What an analysis found, in words, each claim beside what chance alone would give."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Results = dict[str, Any]
Model = dict[str, Any]

LEVEL = 0.05  # of the false discovery rate, and of single tests whose number is counted
SINGLE = 0.01  # of what is claimed of such a count: a page makes some ten claims
POWER_LAW, NOT, OPEN = "power law", "not a power law", "undecided"
BEYOND, NOT_BEYOND, UNKNOWN = "beyond chance", "not beyond chance", "cannot be told"
TRAINED, AILING, UNCLEAR = "trained", "ailing", "unclear"  # ailing: something is wrong with it, or with a part
NOT_TRAINED, NOT_CHECKED = "not trained", "not checked"
STATES = (TRAINED, AILING, UNCLEAR, NOT_TRAINED, NOT_CHECKED)
TESTS = {"row_spread": "row energies", "column_spread": "column energies", "row_correlation": "row correlation"}


@dataclass(frozen=True)
class Claim:
    """One thing that could be said of a donor, and whether it may be."""

    what: str
    here: str
    chance: str
    verdict: str  # BEYOND | NOT_BEYOND | UNKNOWN


def discoveries(p_values: Sequence[float | None], level: float = LEVEL) -> list[bool]:
    """Which tests are significant at a false discovery rate of `level` (Benjamini & Hochberg 1995): the k smallest
    p-values, k the largest number with p_(k) <= level k / m. A test without p-value is none of the m."""
    known = sorted(p for p in p_values if p is not None)
    passed = [p for k, p in enumerate(known, 1) if p <= level * k / len(known)]
    bound = max(passed, default=-1.0)
    return [p is not None and p <= bound for p in p_values]


def kurtosis_p(kurtosis: float, count: int) -> float:
    """One-sided p-value of a kurtosis above the normal law's 3, from its standard error sqrt(24 / n)."""
    return 0.5 * math.erfc((kurtosis - 3) / math.sqrt(24 / count) / math.sqrt(2))


def headline(results: Results) -> str:
    """The one sentence on top."""
    models = results["models"]
    if len(models) == 1:
        ((name, model),) = models.items()
        return " ".join([_state(name, model), *_similarity_sentence(model)])
    states = Counter(state(model) for model in models.values())
    counts = ", ".join(f"{states[s]} {s}" for s in STATES if states[s])
    compared = [m for m in models.values() if "why" not in m["dsv"] and not undecided(m, first_rank(m))]
    if not compared:
        return f"{len(models)} donors: {counts}. None has enough layers to tell what law their distances follow."
    above = sum(above_noise(m, first_rank(m), POWER_LAW) for m in compared)
    return (
        f"{len(models)} donors: {counts}. In {above or 'none'} of the {len(compared)} that have enough layers to tell, "
        "power laws between layers are more frequent than in random matrices."
    )


def lead(results: Results) -> str:
    """What the page is, in two sentences."""
    names = "a donor" if len(results["models"]) == 1 else f"{len(results['models'])} donors"
    return (
        f"What the weights of {names} look like, and beside every number what chance alone would give: what random "
        "matrices do as well says nothing of learning."
    )


def relations(results: Results, kind: str) -> str:
    """Whether a signature tells architectures apart, beside what drawing a neighbour at random would give."""
    names, distances = (results["signatures"][kind][key] for key in ("models", "distances"))
    architectures = {d["name"]: d["architecture"] for d in results["donors"]}
    same, expected = 0, 0.0
    for a, row in zip(names, distances, strict=True):
        others = [(x, b) for b, x in zip(names, row, strict=True) if b != a and x is not None]
        if others:
            same += architectures[min(others)[1]] == architectures[a]
            expected += sum(architectures[b] == architectures[a] for _, b in others) / len(others)
    if len({architectures[name] for name in names}) == 1:
        return "All donors are of one architecture, so the table shows nearness only."
    return (
        f"The nearest other donor is of the same architecture for {same} of {len(names)} donors; a neighbour drawn at "
        f"random would be for {expected:.1f}."
    )


def state(model: Model) -> str:
    """One of STATES: what the health check and the spectra together allow to say."""
    if isinstance(model["health"], dict):
        return NOT_CHECKED
    found = findings(model)
    if any(finding["kind"] == "untrained" and finding["whole"] for finding in found):
        return NOT_TRAINED
    return AILING if found else TRAINED if risen_matrices(model)[0] else UNCLEAR


def findings(model: Model) -> list[dict[str, Any]]:
    return model["health"] if isinstance(model["health"], list) else []


def _state(name: str, model: Model) -> str:
    now = state(model)
    if now == NOT_CHECKED:
        return f"{name} could not be checked: {model['health']['why'].rstrip('.')}."
    if now == NOT_TRAINED:
        return f"{name} looks as if it had never been trained."
    risen, whole = risen_matrices(model)
    trouble = "".join(f" Something is wrong: {f['text'].rstrip('.')}." for f in findings(model)[:1])
    if risen:
        return f"{name} is trained: {risen} of {whole} matrices hold directions that noise does not.{trouble}"
    if trouble:
        return f"Whether {name} was trained cannot be told.{trouble}"
    return f"{name} has structure that noise has not, but no directions above it: training or a structured init."


def _similarity_sentence(model: Model) -> Iterator[str]:
    if "why" in model["dsv"]:
        return
    rank = first_rank(model)
    here, null = verdicts(model, rank)[POWER_LAW], verdicts(model, rank, "gaussian")[POWER_LAW]
    pairs = len(model["dsv"][rank]["pairs"])
    if undecided(model, rank):
        layers = len(layers_of(model))
        yield f"{layers} layers are too few to tell whether distances between them follow a power law."
    elif here == 0:
        yield f"No power law can be claimed between its layers (0 of {pairs} pairs of projections)."
    elif not above_noise(model, rank, POWER_LAW):
        yield (
            f"Power laws between its layers say nothing of learning: {here} of {pairs} pairs of projections follow "
            f"one, and {null} of {pairs} do in random matrices."
        )
    else:
        yield (
            f"{here} of {pairs} pairs of projections follow a power law between layers; in random matrices {null} do."
        )


def claims(model: Model) -> Iterator[Claim]:
    """Everything that one is tempted to say, with its control."""
    if "why" not in model["marginals"]:
        yield from _of_marginals(model)
    if "why" not in model["spectra"]:
        yield from _of_spectra(model)
    if "why" not in model["dsv"]:
        for rank in model["dsv"]:
            yield from _of_similarity(model, rank)
    if "why" not in model["row_column"]:
        yield from _of_rows(model)
        yield from _of_couplings(model)


def _of_marginals(model: Model) -> Iterator[Claim]:
    known = [t for t in matrices(model["marginals"]) if t.get("kurtosis") is not None]
    if not known:
        return
    heavy = sum(discoveries([kurtosis_p(t["kurtosis"], t["count"]) for t in known]))
    yield Claim(
        "Values have heavier tails than normal ones",
        f"{heavy} of {len(known)} matrices; median kurtosis {median(t['kurtosis'] for t in known):.2f}",
        "kurtosis 3, if values were normal",
        BEYOND if heavy else NOT_BEYOND,
    )


def _of_spectra(model: Model) -> Iterator[Claim]:
    risen, whole = risen_matrices(model)
    spectra = model["spectra"]["tensors"].values()
    noise = [t["noise"]["outliers"] > 0 for t in spectra if t.get("outliers") is not None]
    yield Claim(
        "Singular values rise above the edge of noise (Marchenko-Pastur)",
        f"{risen} of {whole} matrices",
        f"{sum(noise)} of {len(noise)} random matrices of the same shapes",
        BEYOND if noise and risen / whole > max(sum(noise) / whole, LEVEL) else NOT_BEYOND,
    )
    pairs = [(t.get("alpha"), noise_alpha(t)) for t in spectra]
    known = [(here, there) for here, there in pairs if here is not None and there is not None]
    if not known:
        return
    below = sum(here < there for here, there in known)
    here, there = (median(alphas) for alphas in zip(*known, strict=True))
    yield Claim(
        "Spectra have heavier tails (a lower α) than noise",
        f"α below that of a random matrix of its shape in {below} of {len(known)}; median α {here:.2f}",
        f"half of them, if weights were noise; median α {there:.2f}: noise gets an exponent too",
        BEYOND if binomial_tail(below, len(known), 0.5) < SINGLE else NOT_BEYOND,
    )


def _of_similarity(model: Model, rank: str) -> Iterator[Claim]:
    pairs = model["dsv"][rank]["pairs"]
    here = verdicts(model, rank)
    rejected = sum(discoveries([row.get("p") for row in pairs]))
    yield Claim(
        f"Distances between layers follow a power law (top {rank} singular values)",
        f"{here[POWER_LAW]} of {len(pairs)} pairs of projections; {here[OPEN]} undecided",
        _in_noise(model, rank, POWER_LAW),
        _beside_noise(model, rank, POWER_LAW),
    )
    yield Claim(
        f"Some pairs of projections do not (top {rank}), which is what LoRA's groups are made of",
        f"{here[NOT]} of {len(pairs)} pairs; {rejected} by goodness of fit after correction for {len(pairs)} tests",
        _in_noise(model, rank, NOT),
        _beside_noise(model, rank, NOT),
    )


def _beside_noise(model: Model, rank: str, verdict: str) -> str:
    if undecided(model, rank):
        return UNKNOWN
    return BEYOND if above_noise(model, rank, verdict) else NOT_BEYOND


def _in_noise(model: Model, rank: str, verdict: str) -> str:
    gaussian, spikes = (verdicts(model, rank, null)[verdict] for null in ("gaussian", "spikes"))
    return f"{gaussian} in Gaussian matrices of the same shapes, {spikes} with random spikes added"


def above_noise(model: Model, rank: str, verdict: str) -> bool:
    """Whether more pairs get a verdict than in random matrices of either kind, by two standard deviations of such a
    count, of one at least. Pairs share layers, so that counts scatter more than those of independent tests: this is the
    least to ask."""
    most = max(verdicts(model, rank, null)[verdict] for null in model["dsv"][rank]["nulls"])
    return verdicts(model, rank)[verdict] > most + 2 * math.sqrt(max(most, 1))


def _of_rows(model: Model) -> Iterator[Claim]:
    for test, words in TESTS.items():
        p = [t[f"{test}_p"] for t in model["row_column"]["tensors"] if t.get(f"{test}_p") is not None]
        if p:
            yield Claim(
                f"Rows and columns are more than their values: {words}",
                f"{small(p)} of {len(p)} matrices",
                f"{LEVEL * len(p):.1f} of {len(p)}, if each matrix's entries are shuffled",
                _more_than_chance(p),
            )


def _of_couplings(model: Model) -> Iterator[Claim]:
    couplings = model["row_column"]["couplings"]
    for space in dict.fromkeys(c["space"] for c in couplings):
        tested = [c for c in couplings if c["space"] == space and c["p"] is not None]
        known = [c["correlation"] for c in tested if c["correlation"] is not None]
        p = [c["p"] for c in tested]
        if p:
            yield Claim(
                f"Matrices that share a space are coupled: {space}",
                f"{small(p)} of {len(p)} couplings" + (f"; median correlation {median(known):+.2f}" if known else ""),
                f"{LEVEL * len(p):.1f} of {len(p)}, if the units of one side are shuffled",
                _more_than_chance(p),
            )


def small(p_values: Sequence[float]) -> int:
    """How many are significant, each on its own."""
    return sum(p <= LEVEL for p in p_values)


def _more_than_chance(p_values: Sequence[float]) -> str:
    """Whether so many tests would be significant if nothing were there, by the binomial law: one small p-value among
    many is no claim, and the least that permutations can give, 1 in 200, need not pass a correction for them all."""
    return BEYOND if binomial_tail(small(p_values), len(p_values), LEVEL) < SINGLE else NOT_BEYOND


def tests(model: Model) -> str:
    """How many tests stand behind the claims, and what was done about their number."""
    counts = {"of kurtosis": sum(t.get("kurtosis") is not None for t in matrices(model["marginals"]))}
    if "why" not in model["spectra"]:
        counts["of exponents against noise"] = sum(
            t.get("alpha") is not None and noise_alpha(t) is not None for t in model["spectra"]["tensors"].values()
        )
    if "why" not in model["dsv"]:
        rows = [row for found in model["dsv"].values() for row in found["pairs"]]
        counts["of power laws"] = sum(row.get("p") is not None for row in rows)
        counts["of likelihood ratios"] = sum(len(row.get("ratios") or {}) for row in rows)
    if "why" not in model["row_column"]:
        tensors, couplings = model["row_column"]["tensors"], model["row_column"]["couplings"]
        counts["of rows and columns"] = sum(t.get(f"{test}_p") is not None for t in tensors for test in TESTS)
        counts["of couplings"] = sum(c["p"] is not None for c in couplings)
    told = ", ".join(f"{count} {what}" for what, count in counts.items())
    return (
        f"{sum(counts.values())} tests stand behind this table: {told}. Kurtosis counts discoveries at a false "
        f"discovery rate of {LEVEL:.0%} (Benjamini-Hochberg). Exponents, rows, columns and couplings are claimed where "
        f"so many matrices (p ≤ {LEVEL:g}, an exponent below that of noise) would be found by chance, each test on its "
        f"own, with a probability below {SINGLE:g}. Permutations give no p below 0.005, so that a single real effect "
        "among many tests stays unseen. Verdicts on single pairs of projections are not corrected for each other: "
        "pairs share layers, so count them rather than pick one. Their chance is one draw of each kind of random "
        "matrices; only a count above both by two standard deviations is called beyond it."
    )


def verdicts(model: Model, rank: str, null: str | None = None) -> Counter[str]:
    found = model["dsv"][rank]
    return Counter(row["verdict"] for row in (found["pairs"] if null is None else found["nulls"][null]))


def undecided(model: Model, rank: str) -> bool:
    """Whether most pairs of projections have too few distances for a verdict."""
    return 2 * verdicts(model, rank)[OPEN] > len(model["dsv"][rank]["pairs"])


def layers_of(model: Model) -> set[int]:
    return {t["layer"] for t in matrices(model["marginals"]) if t["layer"] is not None}


def first_rank(model: Model) -> str:
    return min(model["dsv"], key=int)


def matrices(part: dict[str, Any]) -> list[dict[str, Any]]:
    """The tensors of `marginals` that are matrices, not gains and biases."""
    return [t for t in part.get("tensors", {}).values() if len(t["shape"]) > 1]


def risen_matrices(model: Model) -> tuple[int, int]:
    """How many matrices have singular values above what noise gives, and of how many."""
    if "why" in model["spectra"]:
        return 0, 0
    known = [t for t in model["spectra"]["tensors"].values() if t.get("outliers") is not None]
    return sum(t["outliers"] > 0 for t in known), len(known)


def noise_alpha(tensor: dict[str, Any]) -> float | None:
    """The exponent of a random matrix of a tensor's shape."""
    alpha: float | None = tensor.get("noise", {}).get("alpha")
    return alpha


def binomial_tail(successes: int, trials: int, chance: float) -> float:
    """P(X >= successes)."""
    terms: Iterable[float] = (
        math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(successes, trials + 1)
    )
    return min(1.0, math.fsum(terms))


def advice(model: Model) -> Iterator[str]:
    """What the groupings say, one line per rank."""
    for rank, grouping in model["grouping"].items():
        if grouping["undifferentiated"]:
            pairs = len(model["dsv"][rank]["pairs"])
            unknown = grouping.get("undecided", verdicts(model, rank)[OPEN])
            if 2 * unknown > pairs:
                yield f"Top {rank}: too few layers to tell projections apart ({unknown} of {pairs} pairs undecided)."
                continue
            yield (
                f"Top {rank}: undifferentiated. No pair of projections is shown to be other than a power law, so all "
                f"of them form one Pareto group; {unknown} of {pairs} pairs are undecided."
            )
            continue
        gaussian, pareto = (", ".join(grouping[kind]) or "none" for kind in ("gaussian", "pareto"))
        text = (
            f"Top {rank}: the reference weight is {grouping['reference']}. Perturbed by Gaussian counts: {gaussian}; "
            f"by Pareto counts: {pareto}."
        )
        if not above_noise(model, rank, NOT):
            text += f" Do not lean on it: of such pairs there are {_in_noise(model, rank, NOT)}."
        yield text
