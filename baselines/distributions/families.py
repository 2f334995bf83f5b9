"""Families of distributions for weights: how each is fitted to values, sampled and scored. FAMILIES lists them.

A fitted distribution is a dict of floats, which JSON holds unchanged. Fits sort the values once and work on a summary,
so that a million values take a fraction of a second. Constant values, or too few to show a shape, give a distribution
without spread or the member of the family that is nearest to the normal distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baselines.distributions.lookup import BLOCK
from baselines.distributions.stable import fit_stable, log_prob_stable, sample_stable
from baselines.distributions.summary import moments, weighted_points

Params = dict[str, float]
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Family:
    """fit       values [n] float32, on any device -> parameters
    sample    parameters, shape, a generator -> independent draws, float32 on the generator's device
    log_prob  parameters, values -> log density of each, float64, on the values' device
    """

    fit: Callable[[Tensor], Params]
    sample: Callable[[Params, tuple[int, ...], torch.Generator], Tensor]
    log_prob: Callable[[Params, Tensor], Tensor]


def fit_normal(values: Tensor) -> Params:
    mean, std, _ = moments(values)
    return {"mean": mean, "std": std}


def sample_normal(law: Params, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device) * law["std"] + law["mean"]


def log_prob_normal(law: Params, values: Tensor) -> Tensor:
    z = (values.double() - law["mean"]) / law["std"]
    return -0.5 * z.square() - math.log(law["std"] * math.sqrt(2 * math.pi))


def fit_laplace(values: Tensor) -> Params:
    """Maximum likelihood: the median and the mean distance from it."""
    loc = values.median().item()
    return {"loc": loc, "scale": (values.double() - loc).abs().mean().item()}


def sample_laplace(law: Params, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    size = torch.empty(shape, device=generator.device).exponential_(generator=generator)
    return law["loc"] + law["scale"] * size * _random_signs(shape, generator)


def log_prob_laplace(law: Params, values: Tensor) -> Tensor:
    return -(values.double() - law["loc"]).abs() / law["scale"] - math.log(2 * law["scale"])


NU_RANGE = (1.0, 1e4)  # below 1 only spikes are left; at 1e4 the distribution is normal


def fit_student_t(values: Tensor) -> Params:
    """Maximum likelihood by ECME (Liu & Rubin 1994).

    EM steps for location and scale, with the parameter expansion of Liu, Rubin & Wu (1998), alternate with a
    one-dimensional search over nu. `low` and `high` are the extreme values. Draws are clipped there, because a tensor
    that is nearly all spike has a nu of infinite variance.
    """
    mean, std, is_plain = moments(values)
    if is_plain:
        return {"nu": NU_RANGE[1], "loc": mean, "scale": std, "low": mean - 6 * std, "high": mean + 6 * std}
    x, share = _weighted_points((values - mean) / std)
    loc, scale, nu = x[len(x) // 2].item(), 0.7, 5.0
    squares = ((x - loc) / scale) ** 2

    def loss(log_nu: float) -> float:
        nu = math.exp(log_nu)
        shape = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - math.log(nu) / 2
        return (nu + 1) / 2 * float(share @ np.log1p(squares / nu)) - shape

    for _ in range(100):
        before = (loc, scale, 1 / nu)
        weight = share * (nu + 1) / (nu + squares)
        loc = float(weight @ x / weight.sum())
        scale = max(math.sqrt(weight @ (x - loc) ** 2 / weight.sum()), 1e-4)
        squares = ((x - loc) / scale) ** 2
        near = [math.log(min(max(nu * factor, NU_RANGE[0]), NU_RANGE[1])) for factor in (0.4, 2.5)]
        nu = math.exp(minimize_bounded(loss, near[0], near[1]))
        if math.dist(before, (loc, scale, 1 / nu)) < 1e-7:
            break
    low, high = values.min().item(), values.max().item()
    return {"nu": nu, "loc": mean + std * loc, "scale": std * scale, "low": low, "high": high}


def sample_student_t(law: Params, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draws by Bailey's polar method (1994), clipped to the donors' range."""
    place = generator.device
    uniform = torch.rand((2, *shape), generator=generator, dtype=torch.float64, device=place)
    drawn = torch.empty(shape, device=place)
    for u, v, out in zip(*(part.view(-1).split(BLOCK) for part in (*uniform, drawn)), strict=True):
        size = (law["nu"] * torch.expm1(-2 / law["nu"] * torch.log1p(-u))).sqrt()
        draws = law["loc"] + law["scale"] * size * torch.cos(2 * math.pi * v)
        out.copy_(draws.clamp(law["low"], law["high"]))
    return drawn


def log_prob_student_t(law: Params, values: Tensor) -> Tensor:
    """Log density of the distribution without the clipping."""
    nu, z = law["nu"], (values.double() - law["loc"]) / law["scale"]
    norm = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - math.log(nu * math.pi) / 2 - math.log(law["scale"])
    return norm - (nu + 1) / 2 * torch.log1p(z.square() / nu)


SHAPE_RANGE = (0.3, 20.0)  # of the generalised normal: 1 is Laplace, 2 normal, large values nearly uniform


def fit_generalized_normal(values: Tensor) -> Params:
    """Maximum likelihood of shape and location in turn (they are orthogonal), with the scale in closed form.

    The location is the median where the shape is 1 or less, because the likelihood then has a cusp at every value.
    """
    mean, std, is_plain = moments(values)
    if is_plain:
        return {"shape": 2.0, "loc": mean, "scale": math.sqrt(2) * std}
    x, share = _weighted_points((values - mean) / std)
    median = x[int(np.searchsorted(share.cumsum(), 0.5))].item()
    loc, shape, scale = median, 2.0, 1.0

    def size(shape: float, loc: float) -> float:
        """The scale of maximum likelihood."""
        return (shape * float(share @ np.abs(x - loc) ** shape)) ** (1 / shape)

    def loss(log_shape: float) -> float:
        shape = math.exp(log_shape)
        scale = (shape * float(share @ np.exp(shape * distances))) ** (1 / shape)
        return math.log(scale / shape) + math.lgamma(1 / shape) + 1 / shape

    for _ in range(50):
        before = (shape, loc)
        with np.errstate(divide="ignore"):  # a value at the centre has a distance of exp(-inf), which is 0
            distances = np.log(np.abs(x - loc))
        shape = math.exp(minimize_bounded(loss, math.log(SHAPE_RANGE[0]), math.log(SHAPE_RANGE[1])))
        loc = minimize_bounded(partial(size, shape), -1.0, 1.0) if shape > 1 else median
        scale = size(shape, loc)
        if abs(shape - before[0]) < 1e-6 and abs(loc - before[1]) < 1e-6:
            break
    return {"shape": shape, "loc": mean + std * loc, "scale": std * scale}


def sample_generalized_normal(law: Params, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The shape-th root of a gamma variate, with a random sign."""
    alpha = torch.full(shape, 1 / law["shape"], dtype=torch.float64, device=generator.device)
    size = torch._standard_gamma(alpha, generator=generator).pow(1 / law["shape"])
    return (law["loc"] + law["scale"] * size * _random_signs(shape, generator)).float()


def log_prob_generalized_normal(law: Params, values: Tensor) -> Tensor:
    z = (values.double() - law["loc"]).abs() / law["scale"]
    return math.log(law["shape"] / (2 * law["scale"])) - math.lgamma(1 / law["shape"]) - z.pow(law["shape"])


def fit_mixture(values: Tensor, components: int = 3) -> Params:
    """A mixture of normal distributions by EM, from the better of two starts after 45 steps.

    The starts are slices of the sorted values, and one centre with several spreads, which is typical of weights.
    """
    mean, std, is_plain = moments(values)
    if is_plain:
        return {"weight0": 1.0, "mean0": mean, "std0": std}
    x, share = _weighted_points((values - mean) / std, most=2048)
    slices = x[np.searchsorted(share.cumsum(), (np.arange(components) + 0.5) / components)]
    equal, spreads = np.full_like(slices, 1 / components), np.logspace(-0.5, 0.5, components)
    starts = [(equal, slices, equal), (equal, np.zeros_like(slices), spreads)]
    ends = [_fit_em(x, share, np.stack([np.log(w), m, np.log(s)]), leaps=15) for w, m, s in starts]
    found, _ = _fit_em(x, share, max(ends, key=lambda end: end[1])[0], leaps=100)
    weights, means, stds = np.exp(_log_softmax(found[0])), found[1], np.exp(found[2])
    law: Params = {}
    for i in range(components):
        law |= {f"weight{i}": weights[i].item(), f"mean{i}": mean + std * means[i].item()}
        law |= {f"std{i}": std * stds[i].item()}
    return law


def sample_mixture(law: Params, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    weights, means, stds = _mixture_components(law)
    place = generator.device
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=place)
    which = torch.bucketize(uniform, weights.cumsum(0)[:-1].to(place))
    draws = torch.randn(shape, generator=generator, device=place)
    return draws * stds.float().to(place)[which] + means.float().to(place)[which]


def log_prob_mixture(law: Params, values: Tensor) -> Tensor:
    weights, means, stds = (part.to(values.device) for part in _mixture_components(law))
    z = (values.double()[..., None] - means) / stds
    return ((weights / stds).log() - math.log(2 * math.pi) / 2 - z.square() / 2).logsumexp(-1)


EM_DECIMALS, EM_LIKELIHOOD_DECIMALS = 7, 11  # of parameters of standardised values, and of their mean log-likelihood


def _fit_em(x: Array, share: Array, start: Array, leaps: int) -> tuple[Array, float]:
    """EM with the squared extrapolation of Varadhan & Roland (2008).

    After two steps it extrapolates along their line, and undoes that where the likelihood falls. Overlapping components
    would need thousands of plain steps. x [n], share [n] of the whole, start [3, k] (log weights, means, log stds).
    Returns [3, k] and the mean log-likelihood less a constant.
    """
    powers = np.stack([np.ones_like(x), x, x * x])
    at, last, longest = start, -math.inf, 4.0
    for _ in range(leaps):
        first, _ = _em_step(powers, share, at)
        second, likelihood = _em_step(powers, share, first)
        line, bend = first - at, second - 2 * first + at
        stretch = min(max(1.0, math.sqrt((line * line).sum()) / max(math.sqrt((bend * bend).sum()), 1e-12)), longest)
        landed, there = _em_step(powers, share, at + 2 * stretch * line + stretch**2 * bend)
        longest = max(longest / 2, 1.0) if there < likelihood else longest * (4 if stretch == longest else 1)
        at, likelihood = (landed, there) if there > likelihood else (second, likelihood)
        if abs(likelihood - last) < 1e-9:
            break
        last = likelihood
    return at, likelihood


def _em_step(powers: Array, share: Array, at: Array) -> tuple[Array, float]:
    """One EM step: the next parameters [3, k], and the likelihood of `at`. powers: [3, n] of the values.

    The log density of a component is a parabola, so that a step is two matrix products.
    """
    log_weights, means, precisions = _log_softmax(at[0]), at[1], np.exp(-2 * at[2])
    constant = log_weights - at[2] - means * means * precisions / 2
    joint = np.stack([constant, means * precisions, -precisions / 2], axis=1) @ powers  # [k, n]
    largest = joint.max(0)
    joint -= largest
    np.exp(joint, out=joint)
    total = joint.sum(0)
    joint *= share / total
    sums = joint @ powers.T  # [k, 3]
    weights = sums[:, 0].clip(min=1e-12)
    means = sums[:, 1] / weights
    variances = (sums[:, 2] / weights - means * means).clip(min=1e-6)
    after = np.stack([np.log(weights), means, np.log(variances) / 2])
    # Without rounding, extrapolation along overlapping components turns the last bits, in which processors differ, into
    # a difference of 1e-2.
    return after.round(EM_DECIMALS), round(float(share @ (largest + np.log(total))), EM_LIKELIHOOD_DECIMALS)


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max()
    return shifted - math.log(np.exp(shifted).sum())


def _weighted_points(values: Tensor, most: int = 4096) -> tuple[Array, Array]:
    """The points of `weighted_points`, and the share of all values behind each, in numpy.

    Fits make hundreds of passes over a few thousand numbers, where numpy has much less overhead than torch.
    """
    x, count = weighted_points(values, most)
    return x.numpy(), (count / count.sum()).numpy()


def _mixture_components(law: Params) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means, stds [k] float64."""
    rows = [[law[f"{key}{i}"] for i in range(len(law) // 3)] for key in ("weight", "mean", "std")]
    weights, means, stds = torch.tensor(rows, dtype=torch.float64)
    return weights, means, stds


def minimize_bounded(loss: Callable[[float], float], low: float, high: float) -> float:
    """Where `loss` is least between low and high (Brent's method)."""
    from scipy.optimize import minimize_scalar  # takes a second to import, and a fit that is kept needs none of it

    return float(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-8}).x)


def _random_signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator, device=generator.device) * 2 - 1


FAMILIES: dict[str, Family] = {
    "normal": Family(fit_normal, sample_normal, log_prob_normal),
    "laplace": Family(fit_laplace, sample_laplace, log_prob_laplace),
    "student-t": Family(fit_student_t, sample_student_t, log_prob_student_t),
    "generalized-normal": Family(fit_generalized_normal, sample_generalized_normal, log_prob_generalized_normal),
    "stable": Family(fit_stable, sample_stable, log_prob_stable),
    "mixture": Family(fit_mixture, sample_mixture, log_prob_mixture),
}
