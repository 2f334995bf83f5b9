"""Tests whether distances between layers follow a power law: the protocol of Clauset, Shalizi & Newman (0706.1062).

A distance belongs to two layers, and distances that share a layer are not independent. So L layers hold about as much
information as L observations, not as L². Every p-value exists twice: with layers as the sampled units, and with pairs
as if they were independent, as published (`p_pairs`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from zoo.statistics.power_law import MIN_DISTINCT_VALUES, are_farther, fit_best_xmin, fit_power_law
from zoo.statistics.tails import ALTERNATIVES, NESTING, power_law

Array = NDArray[np.float64]

XMIN_CANDIDATES = 60  # values of xmin to try, in the replicates and in the fit they are compared with
REJECTION_LEVEL = 0.1  # a power law is rejected if p is at most this, as published
ALTERNATIVE_LEVEL = 0.05  # or if another law fits better, with a p below this after Holm's correction
VALUES_PER_CHUNK = 1 << 15  # values of replicates that are drawn together, on which the results depend
VALUES_PER_FIT = 1 << 17  # values of replicates that are fitted together
MIN_TAIL = 50  # Our choice: fewer values above xmin can hardly reject anything.
MIN_TAIL_SHARE = 0.25  # Our choice: a smaller share of the values does not describe the sample.


@dataclass(frozen=True)
class DistanceSample:
    """Distances in ascending order, and the two layers of each.

    Both columns of `pairs` number the same layers if the distances are within one projection, or between two
    projections of the same layers. Else their numbers do not overlap."""

    values: Array  # [n]
    pairs: NDArray[np.int64]  # [n, 2]

    @classmethod
    def from_unsorted(cls, values: Array, pairs: NDArray[np.int64]) -> DistanceSample:
        """Sorts distances [n] and their pairs of layers [n, 2]."""
        order = np.argsort(values, kind="stable")
        return cls(values[order], pairs[order])

    @property
    def layers(self) -> int:
        """How many layers occur."""
        return len(np.unique(self.pairs))


def assess_power_law(sample: DistanceSample, bootstraps: int, rng: np.random.Generator) -> dict[str, Any]:
    """Assesses a sample of at least MIN_DISTINCT_VALUES distinct values.

    Returns {alpha, xmin, tail, distance, p, p_pairs, worth, alpha_ci95, ratios, verdict, why}. p is the share of
    replicates that are at least as far (Kolmogorov-Smirnov) from their own fit as the sample is. A replicate is a
    sample of independent values: with the probability of the tail from the fitted law, else from the values below
    xmin. It is fitted anew. `p_pairs` uses as many values as there are distances, as published. `p` uses `worth`
    values, the `effective_sample_size` with layers as the sampled units. alpha_ci95 comes from random weights per
    layer and pair, with a new xmin each time.

    What simulations of 60 trials showed (tests/zoo/statistics/test_goodness.py repeats some):
    - Level. `p` rejected true power laws in at most 12 % of trials, for 5, 8 and 16 layers, whether distances share
      nothing, both vectors, or one side's vectors. In the last case `p_pairs` rejected 30 to 100 %. If both sides
      determine the distance, `p` hardly ever rejects.
    - Coverage. alpha_ci95 contained alpha in 90 to 97 % of trials with 16 layers, and in 60 to 90 % with 5.
    - Power is low, because xmin moves into the tail. With 30 layers, either p rejected half-normal distances in half
      of the trials and lognormal ones in a third. With 5 layers hardly anything is rejected.
    So a high p alone is weak evidence; read `tail`, `worth` and `ratios` as well.

    Alternatives that failed: the bias-corrected bootstrap of Babu & Rao (2004) over layers never rejected, because
    its replicates do not search for the nearest law. Resampling layers after moving the values onto the law rejected
    half of the true laws in which one side determines the distance."""
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
    """(verdict, reason) from the p, ratios and tail that `assess_power_law` found in n values.

    Undecided means that nothing contradicts a power law, but little could: fewer than MIN_TAIL values lie above
    xmin, or less than MIN_TAIL_SHARE of all. Our choice: the second rule. Without it, normal distances far from 0
    would be power laws of their largest tenth, with exponents above 10."""
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
    """Compares the power law with other laws above xmin: {law: {R, p, p_pairs}}.

    R is the log-likelihood of the power law minus that of the other law, fitted to the same values; a positive R
    favours the power law. p is Vuong's test, with the variance of R over layers (at least that over pairs) and one
    degree of freedom less than there are layers. For laws that contain the power law it is chi-squared with one
    degree of freedom, and R is divided by the same ratio of variances (Rao & Scott 1981). p_pairs treats pairs as
    independent, as `powerlaw` does."""
    above = sample.values >= xmin
    x, pairs = sample.values[above] / xmin, sample.pairs[above]
    power_law_density = power_law(x, alpha)
    layers = len(np.unique(pairs))
    found = {}
    for name, fit in ALTERNATIVES.items():
        difference = power_law_density - fit(x)
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
        else:  # the fitted alternative is the power law itself
            p = p_pairs = 1.0
        found[name] = {"R": ratio, "p": p, "p_pairs": p_pairs}
    return found


def variance_over_layers(terms: Array, pairs: NDArray[np.int64]) -> float:
    """Variance of the sum of centred terms [n, k] of pairs of layers [n, 2], summed over k.

    Terms that share a layer are dependent. This is the jackknife that leaves out one layer at a time, less what it
    counts twice (Efron & Stein 1981)."""
    names, index = np.unique(pairs, return_inverse=True)
    sums, counts = _sums_by_layer(terms, index.reshape(pairs.shape), len(names))
    n, layers = len(terms), len(names)
    scale = n / np.maximum(n - counts, 1)
    return (layers - 1) / layers * float(((scale[:, None] * sums) ** 2).sum()) - float((terms**2).sum())


def effective_sample_size(pairs: NDArray[np.int64]) -> float:
    """How many independent values hold as much information as the distances, at most their number.

    It is their number divided by the design effect (Rao & Scott 1981): the variance of their empirical distribution
    function over layers, relative to that over pairs, at 20 levels. pairs [n, 2] are in the order of their values."""
    indicators = _indicators(len(pairs))
    return len(pairs) / max(1.0, variance_over_layers(indicators, pairs) / float((indicators**2).sum()))


def _indicators(n: int, n_levels: int = 20) -> Array:
    """For n values in ascending order, whether each is below a quantile, centred: [n, levels]."""
    levels = (np.arange(n_levels) + 0.5) / n_levels
    below = (np.arange(n)[:, None] + 0.5) / n <= levels
    return below - below.mean(0)


def _sums_by_layer(terms: Array, index: NDArray[np.int64], layers: int) -> tuple[Array, Array]:
    """The sum of the terms of each layer, [layers, k], and their number, [layers]."""
    first, second = index.T
    other = first != second
    sums, counts = np.zeros((layers, terms.shape[1])), np.bincount(first, minlength=layers)
    np.add.at(sums, first, terms)
    np.add.at(sums, second[other], terms[other])
    return sums, counts + 1.0 * np.bincount(second[other], minlength=layers)


def _bootstrap_p_value(sample: DistanceSample, size: int, bootstraps: int, rng: np.random.Generator) -> float:
    """The share of replicates that are at least as far from their own fit as the sample is. size: values in a
    replicate."""
    logs, n = np.log(sample.values)[None], len(sample.values)
    (alpha,), (distance,), (start,) = _fit_samples(logs, np.ones((1, n)), two_sided=True)
    replicates = []
    for b in _chunk_sizes(bootstraps, size):
        drawn = logs[0, start] + rng.exponential(1 / (alpha - 1), (b, size))
        if start:
            below = logs[0, rng.integers(0, start, (b, size))]
            drawn = np.where(rng.random((b, size)) < 1 - start / n, drawn, below)
        replicates.append(np.sort(drawn))
    drawn = np.concatenate(replicates)
    parts = np.split(drawn, range(_most_fitted(size), bootstraps, _most_fitted(size)))
    farther = [are_farther(part, np.ones_like(part), XMIN_CANDIDATES, float(distance)) for part in parts]
    return float(np.concatenate(farther).mean())


def _alpha_interval(sample: DistanceSample, bootstraps: int, rng: np.random.Generator) -> tuple[float, float]:
    """The central 95 % of the exponents of the sample under random weights.

    The distance of layers l and m has the weight u_l u_m v_lm. u is Gamma with mean 1, per layer; v is exponential, per
    pair. The variance of u makes distribution functions vary as much as they do over layers."""
    logs, n = np.log(sample.values)[None], len(sample.values)
    names, index = np.unique(sample.pairs, return_inverse=True)
    index = index.reshape(sample.pairs.shape)
    first, second = index.T
    indicators = _indicators(n)
    over_pairs, over_layers = float((indicators**2).sum()), variance_over_layers(indicators, sample.pairs)
    variance = (over_layers - over_pairs) / float((_sums_by_layer(indicators, index, len(names))[0] ** 2).sum())
    replicates = []
    for b in _chunk_sizes(bootstraps, n):
        shape = (b, len(names))
        u = rng.gamma(1 / variance, variance, shape) if variance > 1e-6 else np.ones(shape)
        weights = u[:, first] * np.where(first == second, 1.0, u[:, second]) * rng.exponential(size=(b, n))
        replicates.append(np.maximum(weights, 1e-9))
    low, high = np.quantile(_fit_samples(logs, np.concatenate(replicates))[0], [0.025, 0.975])
    return float(low), float(high)


def _chunk_sizes(bootstraps: int, size: int) -> list[int]:
    """Numbers of replicates that are drawn together, in sum `bootstraps`."""
    most = max(1, VALUES_PER_CHUNK // size)
    return [most] * (bootstraps // most) + [bootstraps % most] * (bootstraps % most > 0)


def _fit_samples(logs: Array, weights: Array, two_sided: bool = False) -> tuple[Array, Array, NDArray[np.int64]]:
    """Fits weighted samples: (alpha [b], distance [b], index of xmin [b]). logs [b, n] or [1, n], ascending."""
    most, fits = _most_fitted(weights.shape[1]), []
    for start in range(0, len(weights), most):
        rows = slice(start, start + most)
        fits.append(fit_best_xmin(logs if len(logs) == 1 else logs[rows], weights[rows], XMIN_CANDIDATES, two_sided))
    alphas, distances, starts = (np.concatenate(found) for found in zip(*fits, strict=True))
    return alphas, distances, starts


def _most_fitted(size: int) -> int:
    """How many samples of that size are fitted together."""
    return max(1, VALUES_PER_FIT // size)


def _significant_after_holm(p: dict[str, float]) -> dict[str, float]:
    """The laws whose p, corrected by Holm for the number of alternatives, is below ALTERNATIVE_LEVEL."""
    adjusted, worst = {}, 0.0
    for i, name in enumerate(sorted(p, key=p.__getitem__)):
        worst = max(worst, min(1.0, p[name] * (len(ALTERNATIVES) - i)))
        adjusted[name] = worst
    return {name: value for name, value in adjusted.items() if value < ALTERNATIVE_LEVEL}
