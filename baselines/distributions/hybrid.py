"""A mixture of a donor's values and draws from a fitted distribution, with noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from baselines.distributions.auto_fit import AutoFit
from baselines.distributions.empirical import KDE, Histogram, Permuted
from baselines.distributions.parametric import GeneralizedNormal, Laplace, Mixture, Normal, Parametric, Stable, StudentT
from zoo.options import option
from zoo.parallel.threads import make_in_order
from zoo.sampler import Sampler, wanted_specs
from zoo.streams import stream
from zoo.tensors import TensorSpec, join_parts, split_parts

if TYPE_CHECKING:
    from zoo.donors.zoo import Zoo
    from zoo.targets.blueprint import Blueprint

VALUE_METHODS: dict[str, type[Histogram | KDE | Permuted]] = {"histogram": Histogram, "kde": KDE, "permuted": Permuted}
LAW_METHODS: dict[str, type[Parametric]] = {
    law.name: law for law in (Normal, Laplace, StudentT, GeneralizedNormal, Stable, Mixture, AutoFit)
}


@dataclass(kw_only=True)
class Hybrid(Sampler):
    """Values of a donor, mixed with a share `mix` of draws from a fitted distribution, plus noise (1902.07208).

    Our choice: the published text leaves open what mixing means, so that the option `mixing` decides it.

    entries  Each entry is, with probability `mix` and independently, the draw instead of the value. The distribution of
             the entries is (1 - mix) values + mix draws. Whatever both have in common stays: mean, variance, tails.
             This is why it is the default.
    linear   m + sqrt(1 - mix) (value - mean) + sqrt(mix) (draw - mean), where m is the mix of both means. For
    independent
             entries the variance is the mix of both variances; factors 1 - mix and mix would lose up to half of it.
             Every entry keeps a part of its value, but sums of heavy-tailed numbers have lighter tails.

    Noise N(0, (noise * std)^2) is added last, where std is that of the matrix, bias or gain. The variance grows by the
    factor 1 + noise^2. Values and draws are those of the methods `values` and `law` with the same seed. With
    mixing=entries and noise=0, mix=0 therefore equals the one method and mix=1 the other.
    """

    name: ClassVar[str] = "hybrid"
    family: ClassVar[str] = "empirical"
    summary: ClassVar[str] = "a donor's values mixed with draws from a fitted distribution, with relative noise"
    reference: ClassVar[str] = "1902.07208"
    needs: ClassVar[tuple[str, ...]] = ("donors",)
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "values": tuple(VALUE_METHODS), "law": tuple(LAW_METHODS), "mixing": ("entries", "linear"),
        "granularity": ("layer", "role", "global"), "rescale": ("fan-in", "none"),
    }  # fmt: skip

    donor: str | None = option(None, "name of the donor; none: as the method of `values` chooses")
    values: str = option("histogram", "method that gives the values: histogram, kde or permuted")
    law: str = option("student-t", "method that gives the draws: any parametric one, or auto-fit")
    mix: float = option(0.5, "share of the draws, from 0 to 1", least=0.0, most=1.0)
    mixing: str = option("entries", "entries (draws replace a share of them) or linear (weighted sum in all entries)")
    noise: float = option(0.0, "standard deviation of added normal noise, relative to the tensor's own", least=0.0)
    granularity: str = option("layer", "one fit per tensor (layer), per role, or for all matrices (global)")
    rescale: str = option("fan-in", "scaling of the spread with the size of the input axis: fan-in (1 / sqrt) or none")

    def __post_init__(self) -> None:
        super().__post_init__()
        shared: dict[str, Any] = {"donor": self.donor, "rescale": self.rescale, "device": self.device}
        grouping: dict[str, Any] = {"granularity": self.granularity}
        self._values = VALUE_METHODS[self.values](**shared, **({} if self.values == "permuted" else grouping))
        self._law = LAW_METHODS[self.law](**shared, **grouping)

    @property
    def donors(self) -> tuple[str, ...]:
        return self._values.donors

    def planned_donors(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        return self._values.planned_donors(zoo, blueprint)

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        self._values.only = self._law.only = self.only
        self._values.fit(zoo, blueprint)
        if self.values == "permuted":  # one donor's values: the distribution is fitted to the same donor
            self._law.donor = self._values.donors[0]
        self._law.fit(zoo, blueprint)
        return self

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        def make(spec: TensorSpec) -> Tensor | None:
            values, draws = (sampler.tensor(blueprint, spec, seed) for sampler in (self._values, self._law))
            if values is None or draws is None:
                return None
            return self._mix(spec, values, draws, stream(seed, f"{self.name}/{spec.name}", self.device)).cpu()

        yield from make_in_order(wanted_specs(blueprint, self.only), make)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = self._values.state()
        law, law_tensors = self._law.state()
        return {"values": values, "law": law}, {
            **{f"values/{name}": tensor for name, tensor in tensors.items()},
            **{f"law/{name}": tensor for name, tensor in law_tensors.items()},
        }

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for key, sampler in (("values", self._values), ("law", self._law)):
            own = {name.removeprefix(f"{key}/"): t for name, t in tensors.items() if name.startswith(f"{key}/")}
            sampler.restore(values[key], own)

    def _mix(self, spec: TensorSpec, values: Tensor, draws: Tensor, generator: torch.Generator) -> Tensor:
        parts = {}
        drawn = split_parts(spec, draws)
        for role, value in split_parts(spec, values).items():
            draw = drawn[role]
            if self.mixing == "entries":
                is_drawn = torch.rand(value.shape, generator=generator, device=generator.device) < self.mix
                part = torch.where(is_drawn.to(value.device), draw, value)
            else:
                center = (1 - self.mix) * value.mean() + self.mix * draw.mean()
                part = math.sqrt(1 - self.mix) * (value - value.mean()) + math.sqrt(self.mix) * (draw - draw.mean())
                part += center
            if self.noise:
                noise = torch.randn(part.shape, generator=generator, device=generator.device).to(part.device)
                part = part + self.noise * part.std(correction=0) * noise
            parts[role] = part
        return join_parts(spec, parts)
