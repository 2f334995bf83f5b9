"""Alternatives to a power law: densities on x >= 1, fitted by maximum likelihood.

`powerlaw` has three of them. But its lognormal gains likelihood by rounding where it approaches a power law, its
truncated power law loses some where the cut-off is far, and it has no normal. Elsewhere both agree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import erfcx, log_ndtr

Array = NDArray[np.float64]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


def power_law(x: Array, alpha: float) -> Array:
    """Log-densities [n] of (alpha - 1) x^-alpha."""
    return np.log(alpha - 1) - alpha * np.log(x)


def lognormal(x: Array) -> Array:
    """Log-densities [n] of the lognormal law fitted to x."""
    y = np.log(x)
    return _half_normal_fit(y) - y


def exponential(x: Array) -> Array:
    """Log-densities [n] of the exponential law fitted to x."""
    mean = (x - 1).mean()
    return -np.log(mean) - (x - 1) / mean


def normal(x: Array) -> Array:
    """Log-densities [n] of the normal law, truncated at 1, fitted to x."""
    return _half_normal_fit(x - 1)


def truncated_power_law(x: Array) -> Array:
    """Log-densities [n] of x^-a exp(-rate x) with a >= 0, fitted to x: a power law with a cut-off."""
    logs, mean_log, mean = np.log(x), np.log(x).mean(), x.mean()

    def cost(p: Array) -> float:
        a, rate = abs(p[0]), np.exp(p[1])
        return a * mean_log + rate * mean + _log_mass(a, rate)

    steep = 1 / mean_log + 1
    starts = [(steep, np.log(1e-3 / mean)), (min(steep, 1.0), np.log(1 / mean))]
    a, rate = min((_minimise(cost, start) for start in starts), key=cost)
    a, rate = abs(a), np.exp(rate)
    return -a * logs - rate * x - _log_mass(a, rate)


# Names as in `powerlaw`, which has no `normal`. x [n] >= 1 -> log-densities [n] at the most likely parameters.
ALTERNATIVES: dict[str, Callable[[Array], Array]] = {
    "lognormal": lognormal,
    "exponential": exponential,
    "truncated_power_law": truncated_power_law,
    "normal": normal,
}
NESTING = ("truncated_power_law",)  # these contain the power law, so they fit at least as well


def _half_normal_fit(y: Array) -> Array:
    """Log-densities of exp(-a y - b y²) on y >= 0 with b >= 0, fitted to y: a normal law truncated at 0."""
    scale = y.mean()
    y = y / scale
    mean, square = y.mean(), (y**2).mean()

    def log_mass(a: float, b: float) -> float:
        z = a / (2 * np.sqrt(b))
        tail = np.log(erfcx(z)) if z > 0 else z**2 + np.log(2) + log_ndtr(-np.sqrt(2) * z)
        return float(0.5 * np.log(np.pi / b) - np.log(2) + tail)

    def cost(p: Array) -> float:
        b = np.exp(p[1])
        return p[0] * mean + b * square + log_mass(p[0], b)

    a, b = _minimise(cost, (1.0, np.log(0.1)))
    b = np.exp(b)
    return -a * y - b * y**2 - log_mass(a, b) - np.log(scale)


def _log_mass(a: float, rate: float) -> float:
    """log of the integral of x^-a exp(-rate x) over x >= 1, by quadrature in u = log x."""
    end = np.log1p(60 / rate)
    if a > 1:
        end = min(end, 60 / (a - 1))
    u = 0.5 * end * (_NODES + 1)
    return float(-rate + np.log(0.5 * end * (_WEIGHTS @ np.exp((1 - a) * u - rate * np.expm1(u)))))


def _minimise(cost: Callable[[Array], float], start: tuple[float, float]) -> Array:
    bounds = [(-1e6, 1e6), (-25.0, 25.0)]  # the second parameter is a logarithm; beyond the bounds nothing changes
    return minimize(
        cost, start, method="Nelder-Mead", bounds=bounds, options={"xatol": 1e-4, "fatol": 1e-9, "maxiter": 1000}
    ).x
