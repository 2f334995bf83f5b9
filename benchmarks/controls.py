"""What anyone can make of donors without learning anything: the controls of the novelty audit (2506.07998).

Each fills a blueprint of a shape that donors have, in canonical coordinates, where donors of one shape correspond as
well as they can, and is turned back into a checkpoint. Samplers like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from benchmarks.peers.weights import Weights, finish, read
from zoo.errors import UserError
from zoo.sampler import Sampler, option
from zoo.streams import stream

if TYPE_CHECKING:
    from zoo.blueprint import Blueprint
    from zoo.store import Zoo


@dataclass(kw_only=True)
class OfOneShape(Sampler):
    """Reads the donors of the target's shape. UserError where there are fewer than `least`."""

    family: ClassVar[str] = "control"
    reference: ClassVar[str] = "2506.07998"
    needs: ClassVar[tuple[str, ...]] = ("donors",)
    least: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._donors: list[Weights] = []

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        if zoo is None:
            raise UserError(f"{self.name}: give a --zoo")
        self._donors = of_shape(read(zoo, "canonical"), blueprint)
        if len(self._donors) < self.least:
            raise UserError(f"{self.name}: needs {self.least} donors of the target's shape, has {len(self._donors)}")
        return self

    @property
    def donors(self) -> tuple[str, ...]:
        return tuple(d.name for d in self._donors)

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        made = ((name, self.mix(name, seed)) for name in self._donors[0].tensors)
        yield from finish(made, blueprint, "canonical")

    def mix(self, name: str, seed: int) -> Tensor:
        """The tensor called `name`, float32."""
        raise NotImplementedError

    def values(self, name: str) -> Tensor:
        """[donors, ...] float32"""
        return torch.stack([d.tensors[name] for d in self._donors])

    def one(self, seed: int) -> int:
        """Which donor a seed takes."""
        return int(torch.randint(len(self._donors), (), generator=stream(seed, self.name)))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        raise NotImplementedError("controls are not saved")

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        raise NotImplementedError("controls are not saved")


@dataclass(kw_only=True)
class Noise(OfOneShape):
    name: ClassVar[str] = "noise on a donor"
    summary: ClassVar[str] = "a donor plus normal noise, in proportion to the size of each tensor"

    amount: float = option(0.1, "deviation of the noise over the root mean square of the tensor", above=0.0)

    def mix(self, name: str, seed: int) -> Tensor:
        own = self._donors[self.one(seed)].tensors[name]
        noise = torch.randn(own.shape, generator=stream(seed, f"{self.name}/{name}"))
        return own + self.amount * own.square().mean().sqrt() * noise


@dataclass(kw_only=True)
class Average(OfOneShape):
    name: ClassVar[str] = "average of donors"
    summary: ClassVar[str] = "the mean of all donors of the shape"
    least: ClassVar[int] = 2

    def mix(self, name: str, seed: int) -> Tensor:
        return self.values(name).mean(0)


@dataclass(kw_only=True)
class Interpolation(OfOneShape):
    name: ClassVar[str] = "interpolation of two donors"
    summary: ClassVar[str] = "a uniformly drawn point between two donors of the shape"
    least: ClassVar[int] = 2

    def mix(self, name: str, seed: int) -> Tensor:
        generator = stream(seed, self.name)
        first, second = torch.randperm(len(self._donors), generator=generator)[:2].tolist()
        return torch.lerp(
            self._donors[first].tensors[name], self._donors[second].tensors[name], torch.rand((), generator=generator)
        )


@dataclass(kw_only=True)
class PerDimension(OfOneShape):
    name: ClassVar[str] = "Gaussian per dimension"
    summary: ClassVar[str] = "every entry from the normal law of that entry over the donors of the shape"
    least: ClassVar[int] = 2

    def mix(self, name: str, seed: int) -> Tensor:
        values = self.values(name)
        noise = torch.randn(values.shape[1:], generator=stream(seed, f"{self.name}/{name}"))
        return values.mean(0) + values.std(0) * noise


def of_shape(donors: Sequence[Weights], blueprint: Blueprint) -> list[Weights]:
    """The donors whose tensors, untied, have the blueprint's shapes."""
    from benchmarks.peers.weights import modelled

    wanted = {spec.name: spec.shape for spec in modelled(blueprint, "canonical").specs}
    return [d for d in donors if {name: tuple(t.shape) for name, t in d.tensors.items()} == wanted]
