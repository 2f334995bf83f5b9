"""Power laws fitted by maximum likelihood (Clauset, Shalizi & Newman 2009, arXiv 0706.1062)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zoo.errors import UserError

MIN_DISTINCT_VALUES = 10  # distinct values: fewer say nothing about a tail
# Exponents beyond these are no fit: `powerlaw` with parameter_ranges={"alpha": [1.01, 20]}, less the 0.01 by which
# it keeps away from the ends of a range.
ALPHA_BOUNDS = (1.02, 19.99)


@dataclass(frozen=True)
class PowerLaw:
    """density(x) = (alpha - 1) / xmin * (x / xmin) ** -alpha for x >= xmin."""

    alpha: float
    xmin: float
    distance: float  # Kolmogorov-Smirnov, between the law and the values >= xmin
    tail: int  # how many values are >= xmin


def fit_power_law(values: ArrayLike, candidates: int | None = None) -> PowerLaw:
    """Continuous power law: alpha by maximum likelihood above each possible xmin, and the xmin whose law lies nearest
    to the values above it. Positive values only are looked at; arithmetic is float64.

    candidates: how many of the distinct values are tried as xmin, evenly spread over their ranks (None: all but the
    two largest). The distance is that of Clauset's own code and of `powerlaw`: the largest |F(x) - share of values
    below x| over the values x. An xmin whose alpha leaves BOUNDS is passed over while another is left.

    Raises UserError for fewer than LEAST distinct positive values, and for NaN or infinity among them."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    if not np.isfinite(flat).all():
        raise UserError("a power law cannot be fitted to values with NaN or infinity among them; leave those out")
    x, counts = np.unique(flat[flat > 0], return_counts=True)
    if len(x) < MIN_DISTINCT_VALUES:
        raise UserError(
            f"{len(x)} distinct positive values are too few to fit a power law: give at least {MIN_DISTINCT_VALUES}"
        )
    alphas, distances, starts = fit_every_xmin(np.log(x)[None], counts.astype(np.float64)[None], candidates)
    best = select_best_fit(alphas, distances)[0]
    start = starts[best]
    return PowerLaw(float(alphas[0, best]), float(x[start]), float(distances[0, best]), int(counts[start:].sum()))


def fit_every_xmin(
    logs: NDArray[np.float64], weights: NDArray[np.float64], candidates: int | None = None, both: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """The laws above every candidate xmin, for many samples at once. logs [b, n], or [1, n] for all: logarithms of
    values, ascending; weights [b, n]: how often each occurs. Returns (alphas [b, c], KS distances [b, c], starts [c]),
    starts being the indices of xmin in logs. both: the distance to the share of values up to each value counts too, as
    Kolmogorov and Smirnov have it, and not only that to the share of those below it."""
    last = logs.shape[1] - 2
    starts = np.arange(last)
    if candidates is not None and candidates < last:
        starts = np.unique(np.linspace(0, last - 1, candidates).astype(int))
    left = np.cumsum(weights[:, ::-1], axis=1)[:, ::-1]  # weight at and after each value
    above = np.cumsum((weights * logs)[:, ::-1], axis=1)[:, ::-1]  # and weight times logarithm
    tails = left[:, starts]
    alphas = 1 + tails / np.maximum(above[:, starts] - tails * logs[:, starts], 1e-300)
    distances = np.empty_like(alphas)
    for i, start in enumerate(starts):
        survival = logs[:, start:] - logs[:, start, None]
        survival = survival * (1 - alphas[:, i, None])
        np.exp(survival, out=survival)
        survival -= left[:, start:] / tails[:, i, None]
        distances[:, i] = np.abs(survival).max(axis=1)
        if both:
            survival += weights[:, start:] / tails[:, i, None]
            distances[:, i] = np.maximum(distances[:, i], np.abs(survival, out=survival).max(axis=1))
    return alphas, distances, starts


def select_best_fit(alphas: NDArray[np.float64], distances: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which of the laws [b, c] that `fit_every_xmin` found are the fits [b]: the nearest whose exponent lies in BOUNDS."""
    usable = (alphas > ALPHA_BOUNDS[0]) & (alphas < ALPHA_BOUNDS[1])
    usable |= ~usable.any(axis=1, keepdims=True)
    return np.where(usable, distances, np.inf).argmin(axis=1)
