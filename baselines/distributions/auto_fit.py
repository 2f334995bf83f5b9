"""Chooses the family of distributions for each tensor by the likelihood of held-out values."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from baselines.distributions.families import FAMILIES
from baselines.distributions.parametric import Parametric
from baselines.distributions.statistical import Fit, thin_values
from baselines.distributions.summary import moments
from zoo.errors import UserError, unknown
from zoo.options import option
from zoo.streams import stream

if TYPE_CHECKING:
    from zoo.donors.zoo import Zoo
    from zoo.targets.blueprint import Blueprint

log = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.25  # share of the values
MAX_VALUES = 1 << 20  # values used for the choice; the chosen family is fitted to all


@dataclass(kw_only=True)
class AutoFit(Parametric):
    """Fits every family to three quarters of a group's values and scores the rest (2405.03103).

    It takes the first of `families` whose mean log-likelihood is within two standard errors of the best, so that
    families with more parameters are taken only where they fit better. That family is fitted to all values. Constant
    groups, and those of fewer than 64 values, get the first family. The choice is logged, and saved with the scores in
    nats per value.
    """

    name: ClassVar[str] = "auto-fit"
    summary: ClassVar[str] = "per tensor the distribution of highest held-out likelihood among six families"
    reference: ClassVar[str] = "2405.03103"

    families: str = option(",".join(FAMILIES), "families to choose from, comma-separated; of equals the first")

    def __post_init__(self) -> None:
        super().__post_init__()
        for family in self._families:
            if family not in FAMILIES:
                raise unknown(f"family of {self.name}", family, FAMILIES)
        if not self._families:
            raise UserError(f"{self.name}: families is empty; give some of {', '.join(FAMILIES)}")

    @property
    def _families(self) -> list[str]:
        return [word.strip() for word in self.families.split(",") if word.strip()]

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        super().fit(zoo, blueprint)
        chosen = Counter(fit["family"] for fit in self._fits.values() if "family" in fit)
        log.info("%s: %s", self.name, ", ".join(f"{family} {count}" for family, count in chosen.most_common()))
        return self

    def fit_values(self, values: Tensor) -> Fit:
        scores = held_out_log_probs(thin_values(values, MAX_VALUES), self._families)
        family = simplest_family(scores) if scores else self._families[0]
        means = {name: score.mean().item() for name, score in scores.items()}
        return {"family": family, "law": FAMILIES[family].fit(values), "scores": means}

    def draw(self, fit: Fit, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return FAMILIES[fit["family"]].sample(fit["law"], shape, generator)


def held_out_log_probs(values: Tensor, families: list[str]) -> dict[str, Tensor]:
    """family -> log density, float64, of a fixed random quarter of the values under the family fitted to the others.

    Empty for constant values and for fewer than 64.
    """
    is_test = (torch.rand(len(values), generator=stream(0, "auto-fit/held-out")) < HELD_OUT_SHARE).to(values.device)
    train, test = values[~is_test], values[is_test]
    if len(values) < 64 or moments(train)[2]:
        return {}
    return {name: FAMILIES[name].log_prob(FAMILIES[name].fit(train), test) for name in families}


def simplest_family(scores: dict[str, Tensor]) -> str:
    """The first family whose mean is within two standard errors (of the paired difference) of the best."""
    best = max(scores.values(), key=lambda score: score.mean().item())
    for name, score in scores.items():
        gap = best - score
        if gap.mean() <= 2 * gap.std(correction=0) / math.sqrt(len(gap)):
            return name
    raise AssertionError("the best family is never behind itself")
