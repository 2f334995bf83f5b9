"""The alpha-stable distribution, fitted by its characteristic function.

Draws use the method of Chambers, Mallows and Stuck, densities a quadrature. Parameters are Nolan's S0, which is
continuous at alpha = 1: log E exp(itx) = -|st|^a (1 + i b sign(t) tan(pi a / 2) (|st|^(1 - a) - 1)) + i t loc, scale s.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from baselines.distributions.summary import moments, sort_values, weighted_points

ALPHA_RANGE = (0.7, 2.0)  # range of the fit; trained weights are between 1.5 and 2
SYMMETRIC_FROM = 1.95  # from this alpha on beta cannot be estimated and is 0
CF_POINTS = torch.arange(1, 11, dtype=torch.float64) / 10  # points where the characteristic function is evaluated
TABLE_RANGE = 20.0  # the density has a table up to this many scales and a power law beyond


def fit_stable(values: Tensor, clip: float = 1e-4) -> dict[str, float]:
    """Fits an alpha-stable distribution (Koutrouvelis 1980, in the form of Kogon & Williams 1998).

    Regression of log(-log |phi(t)|) on log t gives alpha and the scale, regression of the phase on t the location and
    beta. The values are standardised by the result and the regression is repeated twice.

    A stable distribution has no variance. Draws are clipped to the values' quantiles `clip` and 1 - `clip` (`low`,
    `high`), then moved and scaled from the mean and spread of the clipped distribution (`center`, `spread`) to those of
    the values (`mean`, `std`).
    """
    mean, std, is_plain = moments(values)
    if is_plain:
        law = {"alpha": 2.0, "beta": 0.0, "loc": mean, "scale": std / math.sqrt(2)}
        law |= {"low": mean - 6 * std, "high": mean + 6 * std}
        return law | {"center": mean, "spread": std or 1.0, "mean": mean, "std": std}
    x, count = weighted_points(values)
    share = count / count.sum()
    quartiles = x[torch.searchsorted(share.cumsum(0), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))].tolist()
    alpha, beta, loc = 2.0, 0.0, quartiles[1]
    scale = (quartiles[2] - quartiles[0]) / 1.908 or std  # exact for the normal distribution
    for _ in range(3):
        z = CF_POINTS[:, None] * (x - loc) / scale
        real, imaginary = (share * z.cos()).sum(1), (share * z.sin()).sum(1)
        decay = -torch.hypot(real, imaginary).clamp(1e-12, 1 - 1e-12).log()
        slope = (
            torch.linalg.lstsq(_stack_columns(CF_POINTS.log(), torch.ones(10)), decay.log()[:, None]).solution[0].item()
        )
        alpha = min(max(slope, ALPHA_RANGE[0]), ALPHA_RANGE[1])
        shift, beta = _location_and_beta(torch.atan2(imaginary, real), alpha)
        loc += scale * shift
        scale *= math.exp((decay.log() - alpha * CF_POINTS.log()).mean().item() / alpha)
    sorted_values = sort_values(values)
    ends = [round(q * (len(sorted_values) - 1)) for q in (clip, 1 - clip)]
    low, high = (sorted_values[i].item() for i in ends)
    law = {"alpha": alpha, "beta": beta, "loc": loc, "scale": scale, "low": low, "high": high}
    k = torch.arange(1 << 16, dtype=torch.float64) + 1  # even points, so that a fit needs no seed
    even = _clipped_draws(law, (k * 0.7548776662466927) % 1, (k * 0.5698402909980532) % 1)
    spread, center = torch.std_mean(even, correction=0)
    return law | {"center": center.item(), "spread": spread.item() or 1.0, "mean": mean, "std": std}


def sample_stable(law: dict[str, float], shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    u, v = torch.rand((2, *shape), generator=generator, dtype=torch.float64, device=generator.device)
    draws = (_clipped_draws(law, u, 1 - v) - law["center"]) / law["spread"] * law["std"] + law["mean"]
    return draws.float()


def log_prob_stable(law: dict[str, float], values: Tensor) -> Tensor:
    """Log density of the stable distribution itself, without clipping and scaling, interpolated in a table."""
    table = _log_density(law["alpha"], law["beta"]).to(values.device)
    z = (values.double() - law["loc"]) / law["scale"]
    inside = z.clamp(-TABLE_RANGE, TABLE_RANGE)
    at = (inside.asinh() / math.asinh(TABLE_RANGE) + 1) / 2 * (len(table) - 1)
    left = at.long().clamp(max=len(table) - 2)
    log_density = torch.lerp(table[left], table[left + 1], at - left)
    beyond = (1 + law["alpha"]) * (z.abs() / TABLE_RANGE).clamp(min=1).log()
    return log_density - beyond - math.log(law["scale"])


def standard_stable(alpha: float, beta: float, u: Tensor, v: Tensor) -> Tensor:
    """Draws of location 0 and scale 1 from uniform u in [0, 1) and v in (0, 1] (Chambers, Mallows & Stuck 1976)."""
    angle, wait = math.pi * (u - 0.5), -v.log()
    if abs(alpha - 1) < 1e-6:
        lean = math.pi / 2 + beta * angle
        return 2 / math.pi * (lean * angle.tan() - beta * (math.pi / 2 * wait * angle.cos() / lean).log())
    skew = beta * math.tan(math.pi * alpha / 2)
    turned = alpha * angle + math.atan(skew)
    size = (1 + skew * skew) ** (0.5 / alpha) * turned.sin() / angle.cos().pow(1 / alpha)
    return size * ((angle - turned).cos() / wait).pow((1 - alpha) / alpha) - skew


def _clipped_draws(law: dict[str, float], u: Tensor, v: Tensor) -> Tensor:
    draws = law["loc"] + law["scale"] * standard_stable(law["alpha"], law["beta"], u, v)
    return draws.nan_to_num(law["loc"]).clamp(law["low"], law["high"])


def _location_and_beta(phase: Tensor, alpha: float) -> tuple[float, float]:
    """Location and beta from the phase of the characteristic function at TIMES, both in units of the scale."""
    beta = 0.0
    if alpha < SYMMETRIC_FROM:
        found = (
            torch.linalg.lstsq(_stack_columns(CF_POINTS, -_skew_term(CF_POINTS, alpha)), phase[:, None])
            .solution[1]
            .item()
        )
        beta = min(max(found, -1.0), 1.0)
    return ((CF_POINTS * (phase + beta * _skew_term(CF_POINTS, alpha))).sum() / CF_POINTS.square().sum()).item(), beta


def _skew_term(t: Tensor, alpha: float) -> Tensor:
    """tan(pi alpha / 2) (t - t^alpha), with its limit at alpha = 1."""
    if abs(alpha - 1) < 1e-6:
        return 2 / math.pi * torch.special.xlogy(t, t)
    return math.tan(math.pi * alpha / 2) * (t - t.pow(alpha))


def _stack_columns(*columns: Tensor) -> Tensor:
    return torch.stack([column.double() for column in columns], dim=1)


def _log_density(alpha: float, beta: float) -> Tensor:
    """[513] float64, for scale 1 and location 0, at points evenly spaced in asinh(x) within TABLE_RANGE."""
    x = torch.linspace(-math.asinh(TABLE_RANGE), math.asinh(TABLE_RANGE), 513, dtype=torch.float64).sinh()
    t = torch.arange(0, 25 ** (1 / alpha), 0.02, dtype=torch.float64)  # puts periodic images of the density 314 away
    step = torch.full_like(t, 0.02)
    step[0] /= 2
    density = (step * (-t.pow(alpha)).exp() * torch.cos(x[:, None] * t + beta * _skew_term(t, alpha))).sum(1) / math.pi
    return density.clamp(min=1e-15).log()
