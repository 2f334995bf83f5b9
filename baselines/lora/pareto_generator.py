"""The generator of 2509.00046: arrays that are perturbed copies of one template, and matrices made of them.

A template T of D values; member k is T with n_k of its entries, at random places, replaced or added to. How the counts
n_k are distributed is how the cosine distances between members are: for Pareto counts they follow a power law, for
Gaussian counts they are bell-shaped.

With n_k entries of D replaced by values of the template's own law, the expected distance 1 - cos is p = n_k / D from
the template and p + q - p q between two members (mean 0). Distances between members therefore have a skewness of -0.5
for Gaussian counts, and of 0 where little is added instead (`mode` add, strength 0.1: in proportion to p + q).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# The smallest Pareto count, as a share of an array's entries. Our choice: the largest possible distance is then 384
# times the smallest, which gives distances between copies the skewness of about 4.4 that the paper reports.
LEAST_SHARE = 1 / 384
PUBLISHED_EXPONENT = 0.78  # of the counts; the paper reports 1.78 for the distances of LLaMA 3.2 1B


def normal_template(size: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """[size] float32, independent N(mean, std)."""
    return torch.randn(size, generator=generator) * std + mean


def gaussian_process_template(
    size: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0, length: float = 1.0
) -> Tensor:
    """[size] float32: a draw of the Gaussian process over the indices 0 .. size - 1 with the RBF kernel
    std^2 exp(-d^2 / 2 length^2). Exact, in O(size log size): the kernel wrapped around a circle whose half holds all
    distances that matter is diagonal in Fourier space (circulant embedding)."""
    circle = 1 << math.ceil(math.log2(size + 10 * length))  # beyond 10 lengths the kernel is below 1e-21
    distance = torch.arange(circle, dtype=torch.float64)
    distance = torch.minimum(distance, circle - distance)
    spectrum = torch.fft.rfft(torch.exp(-0.5 * (distance / length) ** 2)).real.clamp(min=0)
    noise = torch.randn(circle, generator=generator, dtype=torch.float64)
    smooth = torch.fft.irfft(torch.fft.rfft(noise) * spectrum.sqrt(), n=circle)
    return (smooth[:size] * std + mean).float()


TEMPLATES: dict[str, Callable[..., Tensor]] = {"normal": normal_template, "gaussian-process": gaussian_process_template}
MODES = ("replace", "add")


def pareto_counts(
    number: int, size: int, generator: torch.Generator, least: float | None = None, exponent: float = PUBLISHED_EXPONENT
) -> Tensor:
    """[number] int64 in [0, size]: floor(least U^(-1 / exponent)), a density of exponent 1 + `exponent`; what exceeds
    the size is clipped to it. least: None for a share of LEAST_SHARE of the size, and no less than 1."""
    least = max(1.0, LEAST_SHARE * size) if least is None else least
    uniform = 1 - torch.rand(number, generator=generator, dtype=torch.float64)  # in (0, 1]
    return (least * uniform ** (-1 / exponent)).clamp(max=size).floor().long()


def gaussian_counts(number: int, size: int, generator: torch.Generator) -> Tensor:
    """[number] int64 in [0, size]: N(size / 2, size / 8), rounded and clipped."""
    normal = torch.randn(number, generator=generator, dtype=torch.float64)
    return (size / 2 + size / 8 * normal).round().clamp(0, size).long()


def perturb(
    template: Tensor,
    count: int,
    generator: torch.Generator,
    mode: str = "replace",
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """A copy of template [D] with `count` of its entries, at random places, replaced by draws of N(mean, std), or
    with such draws added to them. Replacing keeps the law of a template drawn with the same mean and deviation."""
    places = torch.randperm(len(template), generator=generator)[:count]
    drawn = torch.randn(count, generator=generator) * std + mean
    member = template.clone()
    member[places] = drawn if mode == "replace" else member[places] + drawn
    return member


def to_matrix(values: Tensor, rows: int, columns: int, std: float) -> Tensor:
    """values [rows columns] -> [rows, columns] float32, row by row, of mean 0 and this standard deviation (over all
    entries, divided by their number)."""
    wide = values.double()
    wide = wide - wide.mean()
    return (wide * (std / wide.square().mean().sqrt())).float().reshape(rows, columns)


def kaiming_std(inputs: int) -> float:
    """The deviation of PEFT's own A [r, inputs]: kaiming_uniform_ with a = sqrt(5) is uniform within
    inputs^-1/2."""
    return 1 / math.sqrt(3 * inputs)
