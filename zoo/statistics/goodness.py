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

from zoo.statistics.power_law import fit_power_law, pick, scan
from zoo.statistics.tails import ALTERNATIVES, NESTING, power_law

Array = NDArray[np.float64]

CANDIDATES = 60  # of xmin, in the replicates and in the fit that they are compared with
LEVEL = 0.1  # a power law is rejected at or below this p, as published
BETTER = 0.05  # and so it is where another law's likelihood is higher at this p (Holm over the laws)
CACHE = 1 << 15  # values of replicates that are worked on at a time
TAIL = 50  # fewer values above xmin could not reject anything


@dataclass(frozen=True)
class Sample:
    """Distances in ascending order, and the two layers of each. In a sample of one projection with itself, or of two
    projections of the same layers, both columns count the same layers; else their numbers do not overlap."""

    values: Array  # [n]
    pairs: NDArray[np.int64]  # [n, 2]

    @classmethod
    def of(cls, values: Array, pairs: NDArray[np.int64]) -> Sample:
        order = np.argsort(values, kind="stable")
        return cls(values[order], pairs[order])

    @property
    def layers(self) -> int:
        return len(np.unique(self.pairs))


def goodness(sample: Sample, bootstraps: int, rng: np.random.Generator) -> dict[str, Any]:
    """{alpha, xmin, tail, distance, p, p_pairs, alpha_ci95, ratios, verdict, why} of a sample of at least LEAST
    distinct values.

    p is the share of replicates, drawn where the fitted law holds exactly, whose law lies farther from them than the
    observed one does from the sample; every replicate is fitted anew, xmin and alpha. `p_pairs` draws replicates as
    published: independent values, from the law with the share of the tail, else from the values below xmin. `p` keeps
    what the layers do to each other: values above xmin are moved onto the law, keeping their ranks, and the distance
    of layers l and m gets the weight u_l u_m v_lm, with u ~ Gamma of mean 1 and variance `sharing` per layer and v ~
    Exp(1) per pair (`sharing` is 0 where layers do not matter, and all but 1 where they are all that matters).
    Plain resampling of layers triples the variance where they do not matter, and the bias-corrected bootstrap of Babu
    & Rao (2004), whose replicates do not share the search for the nearest law, rejected nothing at all in trials.

    Known of p, from simulated arrays of 12 and 30 layers (tests/zoo/statistics/test_goodness.py): with nothing shared
    it rejects as often as p_pairs does; where one side's vectors decide, it keeps its level (p_pairs rejects a true
    power law in most trials); where both sides' do, it is conservative. Neither has much power: half-normal distances
    of 30 layers are rejected in less than half of the trials, because xmin retreats into the tail, so a high p says
    little by itself, and `ratios` and `tail` are to be read beside it."""
    law = fit_power_law(sample.values)
    found: dict[str, Any] = {"alpha": law.alpha, "xmin": law.xmin, "tail": law.tail, "distance": law.distance}
    p, p_pairs, ci95 = _bootstrap(sample, bootstraps, rng)
    found |= {"p": p, "p_pairs": p_pairs, "alpha_ci95": ci95}
    found["ratios"] = ratios(sample, law.alpha, law.xmin)
    found["verdict"], found["why"] = verdict(found)
    return found


def verdict(found: dict[str, Any]) -> tuple[str, str]:
    """(verdict, why) by p, ratios and tail of `goodness`. Undecided: nothing speaks against a power law, but the tail
    is so short that nothing could."""
    if found["p"] <= LEVEL:
        return "not a power law", f"the fit is rejected (p = {found['p']:.2g})"
    better = _holm({name: r["p"] for name, r in found["ratios"].items() if r["R"] < 0})
    if better:
        name = min(better, key=lambda n: (better[n], found["ratios"][n]["R"]))
        words = name.replace("_", " ")
        return (
            "not a power law",
            f"a {words} law fits better (R = {found['ratios'][name]['R']:.1f}, p = {better[name]:.2g})",
        )
    if found["tail"] < TAIL:
        return "undecided", f"only {found['tail']} distances lie above xmin: too few to reject a power law"
    return "power law", f"the fit is not rejected (p = {found['p']:.2g}) and no other law fits better"


def ratios(sample: Sample, alpha: float, xmin: float) -> dict[str, dict[str, float]]:
    """{law: {R, p, p_pairs}} above xmin. R: log likelihood of the power law less that of the other, fitted to the same
    values; positive speaks for the power law. p: Vuong's test, with the variance of R over layers (dyadic-robust,
    2.8 of Fafchamps & Gubert 2007, never below that over pairs) and as many degrees of freedom as layers less one; for
    laws that contain the power law chi-squared with one degree of freedom, R divided by the same ratio of variances
    (Rao & Scott 1981). p_pairs: the same with pairs as if independent, as `powerlaw` has it."""
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
        effect = max(1.0, over_layers(centred, pairs) / independent) if independent > 1e-12 * len(x) else 1.0
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


def over_layers(terms: Array, pairs: NDArray[np.int64]) -> float:
    """Variance of the sum of centred terms [n, k] of pairs of layers, where terms that share a layer are dependent:
    the products of all pairs of terms that share one, summed over k."""
    return _by_layer(terms, pairs) - float((terms**2).sum())


def sharing(pairs: NDArray[np.int64], steps: int = 20) -> float:
    """How much of what a distance is, its layers decide: the variance in [0, 1] of weights per layer that, with
    weights per pair, give empirical distribution functions their dyadic-robust variance. pairs [n, 2] are in the order
    of their values."""
    shares = (np.arange(steps) + 0.5) / steps
    ranks = (np.arange(len(pairs)) + 0.5) / len(pairs)
    indicators = (ranks[:, None] <= shares) - shares
    indicators -= indicators.mean(0)
    by_layer = _by_layer(indicators, pairs)
    alone = 2 * float((indicators**2).sum())
    return float(np.clip((by_layer - alone) / by_layer, 0, 1)) if by_layer else 0.0


def _by_layer(terms: Array, pairs: NDArray[np.int64]) -> float:
    """Squares of the sums over the terms of every layer, summed; L / (L - 1) for the mean that was taken away."""
    names, index = np.unique(pairs, return_inverse=True)
    index = index.reshape(pairs.shape)
    sums = np.zeros((len(names), terms.shape[1]))
    np.add.at(sums, index[:, 0], terms)
    other = index[:, 0] != index[:, 1]
    np.add.at(sums, index[other, 1], terms[other])
    # A term of one layer alone counts once in the sums and once as itself: `over_layers` takes one away.
    alone = float((terms[~other] ** 2).sum())
    return (float((sums**2).sum()) + alone) * len(names) / max(len(names) - 1, 1)


def _bootstrap(sample: Sample, bootstraps: int, rng: np.random.Generator) -> tuple[float, float, tuple[float, float]]:
    """(p, p_pairs, alpha_ci95)."""
    logs, n = np.log(sample.values)[None], len(sample.values)
    (alpha,), (distance,), (start,) = _nearest(logs, np.ones((1, n)))
    ranks = (np.arange(n - start) + 0.5) / (n - start)
    moved = np.concatenate([logs[0, :start], logs[0, start] - np.log1p(-ranks) / (alpha - 1)])[None]
    _, index = np.unique(sample.pairs, return_inverse=True)
    first, second = index.reshape(sample.pairs.shape).T
    variance = sharing(sample.pairs)
    farther, farther_pairs, alphas = [], [], []
    most = max(1, CACHE // n)  # replicates at a time
    for b in [most] * (bootstraps // most) + [bootstraps % most] * (bootstraps % most > 0):
        u = rng.gamma(1 / variance, variance, (b, sample.layers)) if variance > 1e-6 else np.ones((b, sample.layers))
        weights = u[:, first] * np.where(first == second, 1.0, u[:, second]) * rng.exponential(size=(b, n))
        farther.append(_nearest(moved, weights)[1] >= distance)
        alphas.append(_nearest(logs, weights)[0])
        drawn = logs[0, start] + rng.exponential(1 / (alpha - 1), (b, n))
        if start:
            drawn = np.where(rng.random((b, n)) < 1 - start / n, drawn, logs[0, rng.integers(0, start, (b, n))])
        farther_pairs.append(_nearest(np.sort(drawn), np.ones((b, n)))[1] >= distance)
    low, high = np.quantile(np.concatenate(alphas), [0.025, 0.975])
    p, p_pairs = (float(np.concatenate(f).mean()) for f in (farther, farther_pairs))
    return p, p_pairs, (float(low), float(high))


def _nearest(logs: Array, weights: Array) -> tuple[Array, Array, NDArray[np.int64]]:
    """(alpha [b], distance [b], index of xmin [b]) of weighted samples; logs [b, n] or [1, n] ascending."""
    alphas, distances, starts = scan(logs, weights, CANDIDATES)
    best = pick(alphas, distances)
    rows = np.arange(len(best))
    return alphas[rows, best], distances[rows, best], starts[best]


def _holm(p: dict[str, float]) -> dict[str, float]:
    """Those whose p, adjusted for how many laws were compared, stays below BETTER."""
    adjusted, worst = {}, 0.0
    for i, name in enumerate(sorted(p, key=p.__getitem__)):
        worst = max(worst, min(1.0, p[name] * (len(ALTERNATIVES) - i)))
        adjusted[name] = worst
    return {name: value for name, value in adjusted.items() if value < BETTER}
