"""Parametric fits: every tensor drawn from the law that a donor's tensors of the same role and depth follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines.distributions.families import FAMILIES, fit_mixture
from baselines.distributions.stable import fit_stable
from baselines.distributions.statistical import Fit, Statistical
from zoo.errors import UserError
from zoo.options import option


@dataclass(kw_only=True)
class Parametric(Statistical):
    """A law of a few numbers for the values of each group of tensors: the one that LAWS has under the method's name."""

    family: ClassVar[str] = "parametric"

    def fit_values(self, values: Tensor) -> Fit:
        return FAMILIES[self.name].fit(values)

    def draw(self, fit: Fit, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return FAMILIES[self.name].sample(fit, shape, generator)


@dataclass(kw_only=True)
class Normal(Parametric):
    """A normal law with the donors' mean and standard deviation."""

    name: ClassVar[str] = "normal"
    summary: ClassVar[str] = "independent normal draws with a donor's mean and spread, per role and depth"
    reference: ClassVar[str] = "1902.07208"


@dataclass(kw_only=True)
class Laplace(Parametric):
    """A Laplace law at the donors' median, with their mean distance from it."""

    name: ClassVar[str] = "laplace"
    summary: ClassVar[str] = "independent Laplace draws with a donor's median and spread, per role and depth"
    reference: ClassVar[str] = "1902.07208"


@dataclass(kw_only=True)
class StudentT(Parametric):
    """Student's t, which most tensors of language models follow; draws end where the donors' values do."""

    name: ClassVar[str] = "student-t"
    summary: ClassVar[str] = "independent Student-t draws with a donor's tails, per role and depth"
    reference: ClassVar[str] = "2405.03103"


@dataclass(kw_only=True)
class GeneralizedNormal(Parametric):
    """Density exp(-|x|^shape): from spikes through Laplace (1) and normal (2) to nearly uniform."""

    name: ClassVar[str] = "generalized-normal"
    summary: ClassVar[str] = "independent draws of density exp(-|x|^shape), shape fitted per role and depth"
    reference: ClassVar[str] = "Nadarajah 2005"


@dataclass(kw_only=True)
class Stable(Parametric):
    """An alpha-stable law, clipped to the donors' quantiles `clip` and 1 - `clip` and rescaled to their mean and
    spread, because the law itself has no variance. Which quantile is left open in the literature [R]."""

    name: ClassVar[str] = "stable"
    summary: ClassVar[str] = "independent alpha-stable draws, clipped and rescaled to a donor's range and spread"
    reference: ClassVar[str] = "Koutrouvelis 1980; Kogon & Williams 1998"

    clip: float = option(1e-4, "quantile of the donors' values at which draws are clipped on either side", least=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip >= 0.25:
            raise UserError(f"{self.name}: clip is {self.clip}; give less than 0.25")

    def fit_values(self, values: Tensor) -> Fit:
        return fit_stable(values, self.clip)


@dataclass(kw_only=True)
class Mixture(Parametric):
    """A mixture of normal laws."""

    name: ClassVar[str] = "mixture"
    summary: ClassVar[str] = "independent draws from a Gaussian mixture fitted per role and depth"
    reference: ClassVar[str] = "Dempster, Laird & Rubin 1977"

    components: int = option(3, "normal laws in the mixture", least=1, most=64)

    def fit_values(self, values: Tensor) -> Fit:
        return fit_mixture(values, self.components)
