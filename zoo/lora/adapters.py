"""What LoRA samplers share: the interface, the base that is adapted, and the change that a pair makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zoo.donors.donor import Donor
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.options import option
from zoo.sampler import Sampler
from zoo.targets.adapters import Pair
from zoo.targets.blueprint import Adapter, Blueprint


@dataclass(kw_only=True)
class LoraSampler(Sampler):
    """Fills A and B of every pair of an adapter's blueprint, float32.

    A compensated sampler also changes the base's weights to W - scaling B A, so that base and adapter together compute
    what the base computed.
    """

    family: ClassVar[str] = "lora"

    base: str | None = option(None, "the donor to adapt, else the zoo's first")

    def check(self, blueprint: Blueprint) -> tuple[Pair, ...]:
        """The pairs of the blueprint. UserError where this method cannot fill them. Reads no weights."""
        return lora_pairs(blueprint, self.name)

    @property
    def compensated(self) -> bool:
        """Whether it changes the base's weights as well."""
        return False

    @property
    def reads_base(self) -> bool:
        """Whether `fit` or `sample` reads the weights of the base. Otherwise its config is enough."""
        return self.compensated


def lora_pairs(blueprint: Blueprint, method: str) -> tuple[Pair, ...]:
    """The pairs of an adapter's blueprint. UserError for the blueprint of a model."""
    if blueprint.adapter is None:
        raise UserError(f"{method} fills LoRA adapters, not models; use `headstart lora` or Blueprint.from_lora")
    return blueprint.adapter.pairs


def base_donor(zoo: Zoo | None, name: str | None, method: str) -> Donor:
    """The donor to adapt: the one called `name`, else the zoo's first. UserError where there is none."""
    if zoo is None or not zoo.donors:
        raise UserError(f"{method} reads the weights of the base; give it a zoo that contains the base")
    return zoo.donors[0] if name is None else zoo.donor(name)


def base_weight(donor: Donor, pair: Pair) -> Tensor:
    """The weight that a pair adapts: [rows, columns], float32."""
    weight = donor.read(pair.weight, torch.float32)
    return weight.mT.contiguous() if pair.transposed else weight


def compensated_weight(weight: Tensor, pair: Pair, a: Tensor, b: Tensor) -> Tensor:
    """W - scaling B A, float32, for a weight as stored (transposed where the pair says so)."""
    change = (pair.scaling * b.float()) @ a.float()
    return weight.float() - (change.mT if pair.transposed else change)


def refuse_tied_weights(adapter: Adapter) -> None:
    """UserError where an adapted weight is tied to another layer (head and embedding), which would change as well."""
    tied = set(adapter.base.ties.values())
    pair = next((pair for pair in adapter.pairs if pair.weight in tied), None)
    if pair is not None:
        raise UserError(
            f"{pair.module} shares {pair.weight} with another layer, which this method would change as well; "
            "remove it from the targets"
        )


def change_norm(pair: Pair, a: Tensor, b: Tensor) -> float:
    """||scaling B A||_F, computed from the Gram matrices of A and B without their product."""
    a, b = a.double(), b.double()
    return pair.scaling * float(((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0).sqrt())
