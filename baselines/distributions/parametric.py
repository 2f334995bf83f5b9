"""Parametric fits: every tensor drawn from the distribution of donors' tensors of the same role and depth."""

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
    """Fits the family of FAMILIES that has the method's name to the values of each group of tensors."""

    family: ClassVar[str] = "parametric"

    def fit_values(self, values: Tensor) -> Fit:
        return FAMILIES[self.name].fit(values)

    def draw(self, fit: Fit, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return FAMILIES[self.name].sample(fit, shape, generator)


@dataclass(kw_only=True)
class Normal(Parametric):
    """Normal draws with the donors' mean and standard deviation."""

    name: ClassVar[str] = "normal"
    summary: ClassVar[str] = "independent normal draws with a donor's mean and spread, per role and depth"
    reference: ClassVar[str] = "1902.07208"


@dataclass(kw_only=True)
class Laplace(Parametric):
    """Laplace draws at the donors' median, with their mean distance from it."""

    name: ClassVar[str] = "laplace"
    summary: ClassVar[str] = "independent Laplace draws with a donor's median and spread, per role and depth"
    reference: ClassVar[str] = "1902.07208"


@dataclass(kw_only=True)
class StudentT(Parametric):
    """Student's t, which fits most tensors of language models (2405.03103). Draws are clipped to the donors' range."""

    name: ClassVar[str] = "student-t"
    summary: ClassVar[str] = "independent Student-t draws with a donor's tails, per role and depth"
    reference: ClassVar[str] = "2405.03103"


@dataclass(kw_only=True)
class GeneralizedNormal(Parametric):
    """Density exp(-|x|^shape): a spike for small shapes, Laplace at 1, normal at 2, nearly uniform for large ones."""

    name: ClassVar[str] = "generalized-normal"
    summary: ClassVar[str] = "independent draws of density exp(-|x|^shape), shape fitted per role and depth"
    reference: ClassVar[str] = "Nadarajah 2005"


@dataclass(kw_only=True)
class Stable(Parametric):
    """Alpha-stable draws, clipped to the donors' quantiles `clip` and 1 - `clip`, rescaled to their mean and spread.

    A stable distribution has no variance, hence the clipping. Our choice: the quantile, which the literature leaves
    open.
    """

    name: ClassVar[str] = "stable"
    summary: ClassVar[str] = "independent alpha-stable draws, clipped and rescaled to a donor's range and spread"
    reference: ClassVar[str] = "Koutrouvelis 1980; Kogon & Williams 1998"

    clip: float = option(1e-4, "quantile at which draws are clipped on either side, below 0.25", least=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip >= 0.25:
            raise UserError(f"{self.name}: clip is {self.clip}; give less than 0.25")

    def fit_values(self, values: Tensor) -> Fit:
        return fit_stable(values, self.clip)


@dataclass(kw_only=True)
class Mixture(Parametric):
    """A mixture of normal distributions."""

    name: ClassVar[str] = "mixture"
    summary: ClassVar[str] = "independent draws from a Gaussian mixture fitted per role and depth"
    reference: ClassVar[str] = "Dempster, Laird & Rubin 1977"

    components: int = option(3, "normal components of the mixture", least=1, most=64)

    def fit_values(self, values: Tensor) -> Fit:
        return fit_mixture(values, self.components)
