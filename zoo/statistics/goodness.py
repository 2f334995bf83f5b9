"""Is one sample of distances between layers a power law? The protocol of Clauset, Shalizi & Newman (0706.1062), with
layers as the units that chance draws.

A distance d_lm belongs to two layers, and distances that share a layer are not independent: L layers say as much as
L observations, not as L². Everything here that is a p-value therefore exists twice, for layers and, as published, for
pairs as if they were independent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from zoo.statistics.power_law import MIN_DISTINCT_VALUES, fit_every_xmin, fit_power_law, select_best_fit
from zoo.statistics.tails import ALTERNATIVES, NESTING, power_law

Array = NDArray[np.float64]

XMIN_CANDIDATES = 60  # of xmin, in the replicates and in the fit that they are compared with
REJECTION_LEVEL = 0.1  # a power law is rejected at or below this p, as published
ALTERNATIVE_LEVEL = 0.05  # and so it is where another law's likelihood is higher at this p (Holm over the laws)
VALUES_PER_CHUNK = 1 << 15  # values of replicates that are worked on at a time
MIN_TAIL = 50  # fewer values above xmin could hardly reject anything [R]
MIN_TAIL_SHARE = 0.25  # a power law of a smaller share of the values says nothing of the sample [R]


@dataclass(frozen=True)
class DistanceSample:
    """Distances in ascending order, and the two layers of each. In a sample of one projection with itself, or of two
    projections of the same layers, both columns count the same layers; else their numbers do not overlap."""

    values: Array  # [n]
    pairs: NDArray[np.int64]  # [n, 2]

    @classmethod
    def from_unsorted(cls, values: Array, pairs: NDArray[np.int64]) -> DistanceSample:
        order = np.argsort(values, kind="stable")
        return cls(values[order], pairs[order])

    @property
    def layers(self) -> int:
        return len(np.unique(self.pairs))


def assess_power_law(sample: DistanceSample, bootstraps: int, rng: np.random.Generator) -> dict[str, Any]:
    """{alpha, xmin, tail, distance, p, p_pairs, worth, alpha_ci95, ratios, verdict, why} of a sample of at least LEAST
    distinct values.

    p is the share of replicates that lie at least as far (Kolmogorov-Smirnov) from the power law fitted to them, xmin
    and alpha anew, as the sample lies from its own; replicates are independent values, from the law with the share of
    the tail, else from the values below xmin. `p_pairs` draws as many values as there are distances, as published; `p`
    draws `effective_sample_size` of them, as many as would let distribution functions vary as they do when layers, not pairs, are
    left to chance (see `effective_sample_size`). alpha_ci95 is that of random weights per layer and pair, xmin anew in each.

    Known by simulation (tests/zoo/statistics/test_goodness.py repeats some), with 60 trials each: `p` rejected a true
    power law in at most 0.12 of trials of 5, 8 and 16 layers, whether distances share nothing, or both sides' vectors,
    or one side's alone, where `p_pairs` rejected 0.3 to 1.0 of them; where both sides decide it hardly ever rejects.
    alpha_ci95 held alpha in 0.9 to 0.97 of trials of 16 layers, 0.6 to 0.9 of 5. Power is low: half-normal distances
    of 30 layers that share nothing were rejected in half of trials, lognormal ones in a third, by either p, because
    xmin retreats into the tail, and of 5 layers hardly anything can be. So a high p says little by itself, and `tail`,
    `effective_sample_size` and `likelihood_ratios` are to be read beside it.

    Other ways were tried. The bias-corrected bootstrap of Babu & Rao (2004) over layers rejected nothing at all,
    whatever the distances, since its replicates do not gain from the search for the nearest law as the sample does;
    layers resampled after the values were moved onto the law rejected half of true ones where one side decides."""
    law = fit_power_law(sample.values)
    found: dict[str, Any] = {"alpha": law.alpha, "xmin": law.xmin, "tail": law.tail, "distance": law.distance}
    independent = max(MIN_DISTINCT_VALUES // 2, round(effective_sample_size(sample.pairs)))
    found["p"] = _bootstrap_p_value(sample, independent, bootstraps, rng)
    found["p_pairs"] = _bootstrap_p_value(sample, len(sample.values), bootstraps, rng)
    found["alpha_ci95"] = list(_alpha_interval(sample, bootstraps, rng))
    found["worth"] = independent
    found["ratios"] = likelihood_ratios(sample, law.alpha, law.xmin)
    found["verdict"], found["why"] = verdict(found, len(sample.values))
    return found


def verdict(found: dict[str, Any], n: int) -> tuple[str, str]:
    """(verdict, why) by p, ratios and tail of `assess_power_law` of n values. Undecided: nothing speaks against a power law,
    but it could not: fewer than TAIL values lie above xmin, or they are less than COVERED of all. Without that last
    rule [R] normal distances far from 0 would be power laws, of their largest tenth and with exponents above 10."""
    if found["p"] <= REJECTION_LEVEL:
        return "not a power law", f"the fit is rejected (p = {found['p']:.2g})"
    better = _significant_after_holm({name: r["p"] for name, r in found["ratios"].items() if r["R"] < 0})
    if better:
        name = min(better, key=lambda n: (better[n], found["ratios"][n]["R"]))
        law = name.replace("_", " ") + ("" if name.endswith("law") else " law")
        article = "an" if law[0] == "e" else "a"
        return (
            "not a power law",
            f"{article} {law} fits better (R = {found['ratios'][name]['R']:.1f}, p = {better[name]:.2g})",
        )
    if found["tail"] < MIN_TAIL:
        return "undecided", f"only {found['tail']} distances lie above xmin: too few to reject a power law"
    share = f"{found['tail'] / n:.0%}"
    if found["tail"] < MIN_TAIL_SHARE * n:
        return (
            "undecided",
            f"a power law holds for the largest {share} of distances at most, and says nothing of the rest",
        )
    return (
        "power law",
        f"not rejected (p = {found['p']:.2g}) in the largest {share} of distances, and no law fits better",
    )


def likelihood_ratios(sample: DistanceSample, alpha: float, xmin: float) -> dict[str, dict[str, float]]:
    """{law: {R, p, p_pairs}} above xmin. R: log likelihood of the power law less that of the other, fitted to the same
    values; positive speaks for the power law. p: Vuong's test, with the variance of R over layers, never below that
    over pairs, and as many degrees of freedom as layers less one; for laws that contain the power law chi-squared with
    one degree of freedom, R divided by the same ratio of variances (Rao & Scott 1981). p_pairs: the same with pairs as
    if independent, as `powerlaw` has it."""
    above = sample.values >= xmin
    x, pairs = sample.values[above] / xmin, sample.pairs[above]
    ours = power_law(x, alpha)
    layers = len(np.unique(pairs))
    found = {}
    for name, fit in ALTERNATIVES.items():
        difference = ours - fit(x)
        ratio = float(difference.sum())
        centred = (difference - difference.mean())[:, None]
        independent = float((centred**2).sum())
        effect = max(1.0, variance_over_layers(centred, pairs) / independent) if independent > 1e-12 * len(x) else 1.0
        if name in NESTING:
            p, p_pairs = (float(stats.chi2.sf(max(0.0, -2 * ratio) / e, 1)) for e in (effect, 1.0))
        elif independent > 1e-12 * len(x):
            z = abs(ratio) / np.sqrt(independent)
            p = float(2 * stats.t.sf(z / np.sqrt(effect), max(layers - 1, 1)))
            p_pairs = float(2 * stats.norm.sf(z))
        else:  # the other law has become the power law
            p = p_pairs = 1.0
        found[name] = {"R": ratio, "p": p, "p_pairs": p_pairs}
    return found


def variance_over_layers(terms: Array, pairs: NDArray[np.int64]) -> float:
    """Variance of the sum of centred terms [n, k] of pairs of layers [n, 2], where terms that share a layer are
    dependent, summed over k: the jackknife's that leaves out one layer after the other, less what it counts twice
    (Efron & Stein 1981)."""
    names, index = np.unique(pairs, return_inverse=True)
    sums, counts = _sums_by_layer(terms, index.reshape(pairs.shape), len(names))
    n, layers = len(terms), len(names)
    scale = n / np.maximum(n - counts, 1)
    return (layers - 1) / layers * float(((scale[:, None] * sums) ** 2).sum()) - float((terms**2).sum())


def effective_sample_size(pairs: NDArray[np.int64]) -> float:
    """How many independent values distances are worth, at most as many as they are: their number over the ratio of the
    variances of their empirical distribution function, over layers and over pairs (the design effect of Rao & Scott
    1981, at 20 shares). pairs [n, 2] are in the order of their values."""
    steps = _indicators(len(pairs))
    return len(pairs) / max(1.0, variance_over_layers(steps, pairs) / float((steps**2).sum()))


def _indicators(n: int, shares: int = 20) -> Array:
    """[n, shares]: whether each of n values in ascending order is among a share of them, less that share."""
    levels = (np.arange(shares) + 0.5) / shares
    below = (np.arange(n)[:, None] + 0.5) / n <= levels
    return below - below.mean(0)


def _sums_by_layer(terms: Array, index: NDArray[np.int64], layers: int) -> tuple[Array, Array]:
    """(sums of the terms of every layer [layers, k], how many they are [layers])."""
    first, second = index.T
    other = first != second
    sums, counts = np.zeros((layers, terms.shape[1])), np.bincount(first, minlength=layers)
    np.add.at(sums, first, terms)
    np.add.at(sums, second[other], terms[other])
    return sums, counts + 1.0 * np.bincount(second[other], minlength=layers)


def _bootstrap_p_value(sample: DistanceSample, size: int, bootstraps: int, rng: np.random.Generator) -> float:
    """The share of samples of `size` independent values, drawn as the fitted law has it, that lie at least as far from
    the law fitted to them as the sample from its own."""
    logs, n = np.log(sample.values)[None], len(sample.values)
    (alpha,), (distance,), (start,) = _fit_samples(logs, np.ones((1, n)), both=True)
    farther = []
    for b in _chunk_sizes(bootstraps, size):
        drawn = logs[0, start] + rng.exponential(1 / (alpha - 1), (b, size))
        if start:
            below = logs[0, rng.integers(0, start, (b, size))]
            drawn = np.where(rng.random((b, size)) < 1 - start / n, drawn, below)
        farther.append(_fit_samples(np.sort(drawn), np.ones((b, size)), both=True)[1] >= distance)
    return float(np.concatenate(farther).mean())


def _alpha_interval(sample: DistanceSample, bootstraps: int, rng: np.random.Generator) -> tuple[float, float]:
    """95 % of the exponents of the sample with random weights: u_l u_m v_lm for the distance of layers l and m, u Gamma
    of mean 1 per layer and v exponential per pair; u varies so much that distribution functions do as over layers."""
    logs, n = np.log(sample.values)[None], len(sample.values)
    names, index = np.unique(sample.pairs, return_inverse=True)
    index = index.reshape(sample.pairs.shape)
    first, second = index.T
    steps = _indicators(n)
    alone, apart = float((steps**2).sum()), variance_over_layers(steps, sample.pairs)
    variance = (apart - alone) / float((_sums_by_layer(steps, index, len(names))[0] ** 2).sum())
    alphas = []
    for b in _chunk_sizes(bootstraps, n):
        shape = (b, len(names))
        u = rng.gamma(1 / variance, variance, shape) if variance > 1e-6 else np.ones(shape)
        weights = u[:, first] * np.where(first == second, 1.0, u[:, second]) * rng.exponential(size=(b, n))
        alphas.append(_fit_samples(logs, np.maximum(weights, 1e-9))[0])
    low, high = np.quantile(np.concatenate(alphas), [0.025, 0.975])
    return float(low), float(high)


def _chunk_sizes(bootstraps: int, size: int) -> list[int]:
    most = max(1, VALUES_PER_CHUNK // size)
    return [most] * (bootstraps // most) + [bootstraps % most] * (bootstraps % most > 0)


def _fit_samples(logs: Array, weights: Array, both: bool = False) -> tuple[Array, Array, NDArray[np.int64]]:
    """(alpha [b], distance [b], index of xmin [b]) of weighted samples; logs [b, n] or [1, n] ascending."""
    alphas, distances, starts = fit_every_xmin(logs, weights, XMIN_CANDIDATES, both)
    best = select_best_fit(alphas, distances)
    rows = np.arange(len(best))
    return alphas[rows, best], distances[rows, best], starts[best]


def _significant_after_holm(p: dict[str, float]) -> dict[str, float]:
    """Those whose p, adjusted for how many laws were compared, stays below BETTER."""
    adjusted, worst = {}, 0.0
    for i, name in enumerate(sorted(p, key=p.__getitem__)):
        worst = max(worst, min(1.0, p[name] * (len(ALTERNATIVES) - i)))
        adjusted[name] = worst
    return {name: value for name, value in adjusted.items() if value < ALTERNATIVE_LEVEL}
