"""Power laws fitted by maximum likelihood (Clauset, Shalizi & Newman 2009, arXiv 0706.1062)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zoo.errors import UserError

MIN_DISTINCT_VALUES = 10  # fewer cannot describe a tail
# As `powerlaw` with parameter_ranges={"alpha": [1.01, 20]}, which stays 0.01 away from the ends of a range.
ALPHA_BOUNDS = (1.02, 19.99)


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
    alphas, distances, starts = fit_every_xmin(np.log(x)[None], counts.astype(np.float64)[None], candidates)
    best = select_best_fit(alphas, distances)[0]
    start = starts[best]
    return PowerLaw(float(alphas[0, best]), float(x[start]), float(distances[0, best]), int(counts[start:].sum()))


def fit_every_xmin(
    logs: NDArray[np.float64], weights: NDArray[np.float64], candidates: int | None = None, two_sided: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Fits a power law above each candidate xmin, for many samples at once.

    logs [b, n], or [1, n] for all samples: logarithms of values, ascending. weights [b, n]: how often each value
    occurs. two_sided: the distance also compares with the share of values up to each value, as Kolmogorov and
    Smirnov do, not only with the share below it. Returns alphas [b, c], distances [b, c] and starts [c], the indices
    of xmin in logs."""
    last = logs.shape[1] - 2
    starts = np.arange(last)
    if candidates is not None and candidates < last:
        starts = np.unique(np.linspace(0, last - 1, candidates).astype(int))
    remaining = np.cumsum(weights[:, ::-1], axis=1)[:, ::-1]  # total weight from each value on
    above = np.cumsum((weights * logs)[:, ::-1], axis=1)[:, ::-1]  # the same, weight times logarithm
    tails = remaining[:, starts]
    alphas = 1 + tails / np.maximum(above[:, starts] - tails * logs[:, starts], 1e-300)
    distances = np.empty_like(alphas)
    for i, start in enumerate(starts):
        survival = logs[:, start:] - logs[:, start, None]
        survival = survival * (1 - alphas[:, i, None])
        np.exp(survival, out=survival)
        survival -= remaining[:, start:] / tails[:, i, None]
        distances[:, i] = np.abs(survival).max(axis=1)
        if two_sided:
            survival += weights[:, start:] / tails[:, i, None]
            distances[:, i] = np.maximum(distances[:, i], np.abs(survival, out=survival).max(axis=1))
    return alphas, distances, starts


def select_best_fit(alphas: NDArray[np.float64], distances: NDArray[np.float64]) -> NDArray[np.int64]:
    """The index [b] of the best of the laws [b, c] of `fit_every_xmin`: the nearest with alpha in ALPHA_BOUNDS."""
    usable = (alphas > ALPHA_BOUNDS[0]) & (alphas < ALPHA_BOUNDS[1])
    usable |= ~usable.any(axis=1, keepdims=True)
    return np.where(usable, distances, np.inf).argmin(axis=1)
