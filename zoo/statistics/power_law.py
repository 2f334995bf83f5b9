"""Power laws fitted by maximum likelihood (Clauset, Shalizi & Newman 2009, arXiv 0706.1062)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zoo.errors import UserError

Array = NDArray[np.float64]

MIN_DISTINCT_VALUES = 10  # fewer cannot describe a tail
# As `powerlaw` with parameter_ranges={"alpha": [1.01, 20]}, which stays 0.01 away from the ends of a range.
ALPHA_BOUNDS = (1.02, 19.99)
BOUND_VALUES = 32  # at which a deviation from a law is measured first, in float32
BOUND_MARGIN = 1e-6  # more than the rounding errors of these deviations


@dataclass(frozen=True)
class PowerLaw:
    """density(x) = (alpha - 1) / xmin * (x / xmin) ** -alpha for x >= xmin."""

    alpha: float
    xmin: float
    distance: float  # Kolmogorov-Smirnov, between the law and the values >= xmin
    tail: int  # how many values are >= xmin


def fit_power_law(values: ArrayLike, candidates: int | None = None) -> PowerLaw:
    """Fits a continuous power law: alpha by maximum likelihood, xmin by the smallest Kolmogorov-Smirnov distance.

    Only positive values count. Arithmetic is float64. candidates: how many distinct values are tried as xmin, evenly
    spread over their ranks; None: all but the two largest. The distance is that of Clauset's code and of `powerlaw`:
    the largest |F(x) - share of values below x| over the values x. An xmin whose alpha leaves ALPHA_BOUNDS is
    skipped if another one remains.

    Raises UserError for fewer than MIN_DISTINCT_VALUES distinct positive values, and for NaN or infinity."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    if not np.isfinite(flat).all():
        raise UserError("a power law cannot be fitted to NaN or infinity; leave these values out")
    x, counts = np.unique(flat[flat > 0], return_counts=True)
    if len(x) < MIN_DISTINCT_VALUES:
        raise UserError(
            f"{len(x)} distinct positive values are too few to fit a power law; give at least {MIN_DISTINCT_VALUES}"
        )
    (alpha,), (distance,), (start,) = fit_best_xmin(np.log(x)[None], counts.astype(np.float64)[None], candidates)
    return PowerLaw(float(alpha), float(x[start]), float(distance), int(counts[start:].sum()))


def fit_best_xmin(
    logs: Array, weights: Array, candidates: int | None = None, two_sided: bool = False, min_tail: float = 0.0
) -> tuple[Array, Array, NDArray[np.int64]]:
    """Fits power laws to many samples at once: (alphas [b], distances [b], indices [b] of xmin in logs).

    logs [b, n], or [1, n] for all samples: logarithms of values, ascending. weights [b, n]: how often each value
    occurs. candidates: as in `fit_power_law`. two_sided: the distance also compares with the share of values up to each
    value, as Kolmogorov and Smirnov do, not only with the share below it. min_tail: the least weight above xmin.

    The distance of a law is the largest over all values, so the largest over a few values bounds it from below. A
    candidate whose bound exceeds the distance of another one is not looked at again, which saves most of the work."""
    sample = _Samples(logs, weights, _candidate_starts(logs.shape[1] - 2, candidates), two_sided)
    bounds = np.where(sample.allowed(min_tail), sample.lower_bounds(), np.inf)
    distances = sample.nearest_by_bound(bounds)
    rows, best = np.arange(len(bounds)), distances.min(axis=1)
    for i in np.flatnonzero((bounds <= best[:, None]).any(axis=0)).tolist():
        own = rows[(bounds[:, i] <= best) & np.isinf(distances[:, i])]
        if len(own):
            distances[own, i] = sample.distances(own, i)
            best = np.minimum(best, distances[:, i])
    distances[np.isinf(bounds)] = np.inf
    chosen = distances.argmin(axis=1)
    return sample.alphas[rows, chosen], distances[rows, chosen], sample.starts[chosen]


def are_farther(logs: Array, weights: Array, candidates: int | None, distance: float) -> NDArray[np.bool_]:
    """Whether the two-sided distances that `fit_best_xmin` finds are at least `distance`, [b]. This is quicker, because
    one candidate that is nearer decides."""
    sample = _Samples(logs, weights, _candidate_starts(logs.shape[1] - 2, candidates), two_sided=True)
    bounds = np.where(sample.allowed(0.0), sample.lower_bounds(), np.inf)
    distances = sample.nearest_by_bound(bounds)
    rows, farther = np.arange(len(bounds)), distances.min(axis=1) >= distance
    for i in np.flatnonzero((bounds < distance).any(axis=0)).tolist():
        own = rows[farther & (bounds[:, i] < distance) & np.isinf(distances[:, i])]
        if len(own):
            farther[own] = sample.distances(own, i) >= distance
    return farther


class _Samples:
    """Weighted samples and their power laws above each candidate xmin."""

    def __init__(self, logs: Array, weights: Array, starts: NDArray[np.int64], two_sided: bool) -> None:
        self.logs, self.weights, self.starts, self.two_sided = logs, weights, starts, two_sided
        self.remaining = np.cumsum(weights[:, ::-1], axis=1)[:, ::-1]  # total weight from each value on
        above = np.cumsum((weights * logs)[:, ::-1], axis=1)[:, ::-1]  # the same, weight times logarithm
        self.tails = self.remaining[:, starts]
        self.alphas = 1 + self.tails / np.maximum(above[:, starts] - self.tails * logs[:, starts], 1e-300)

    def allowed(self, min_tail: float) -> NDArray[np.bool_]:
        """Which candidates [b, c] can be chosen: alpha in ALPHA_BOUNDS unless none is, and enough weight above."""
        usable = (self.alphas > ALPHA_BOUNDS[0]) & (self.alphas < ALPHA_BOUNDS[1])
        usable |= ~usable.any(axis=1, keepdims=True)
        return usable & (self.tails >= min_tail)

    def distances(self, rows: NDArray[np.int64], candidate: int) -> Array:
        """The Kolmogorov-Smirnov distances of some samples from their law above one candidate."""
        start = self.starts[candidate]
        tails, steepness = self.tails[rows, candidate, None], 1 - self.alphas[rows, candidate, None]
        logs = self.logs if len(self.logs) == 1 else self.logs[rows]
        survival = logs[:, start:] - logs[:, start, None]
        survival = survival * steepness
        np.exp(survival, out=survival)
        survival -= self.remaining[rows, start:] / tails
        largest = np.abs(survival).max(axis=1)
        if self.two_sided:
            survival += self.weights[rows, start:] / tails
            largest = np.maximum(largest, np.abs(survival, out=survival).max(axis=1))
        return largest

    def lower_bounds(self) -> Array:
        """The largest deviation [b, c] from each law at BOUND_VALUES values above its xmin, less BOUND_MARGIN."""
        places = np.unique(np.linspace(0, self.logs.shape[1] - 1, BOUND_VALUES).astype(int))
        is_below = places < self.starts[:, None]  # [c, k]
        exponents = self.logs[:, None, places] - self.logs[:, self.starts, None]  # [b, c, k]
        exponents = exponents * (1 - self.alphas[:, :, None])
        exponents[:, is_below] = 0.0
        survival = np.exp(exponents.astype(np.float32))
        share = self.remaining[:, None, places].astype(np.float32) * (1 / self.tails[:, :, None]).astype(np.float32)
        share[:, is_below] = 1.0
        survival -= share
        return np.abs(survival, out=survival).max(axis=2).astype(np.float64) - BOUND_MARGIN

    def nearest_by_bound(self, bounds: Array) -> Array:
        """The distances [b, c] for the candidate with the least bound of each sample, infinite for all others."""
        distances, rows, first = np.full(bounds.shape, np.inf), np.arange(len(bounds)), bounds.argmin(axis=1)
        for i in np.unique(first):
            own = rows[first == i]
            distances[own, i] = self.distances(own, i)
        return distances


def _candidate_starts(last: int, candidates: int | None) -> NDArray[np.int64]:
    """The indices of the values that are tried as xmin: the first `last`, or as many as `candidates` evenly spread."""
    if candidates is not None and candidates < last:
        return np.unique(np.linspace(0, last - 1, candidates).astype(int))
    return np.arange(last)
