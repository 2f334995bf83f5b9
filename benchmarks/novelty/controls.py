"""Controls of the novelty audit (2506.07998): models mixed from donors without learning anything.

Each is a sampler for a shape that donors have. It works in canonical coordinates, with heads and neurons matched to
those of the first donor by their weights (optimal assignment), and turns the result back into a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.peers.weights import Weights, read_weights, to_checkpoint
from zoo.errors import UserError
from zoo.options import option
from zoo.sampler import Sampler
from zoo.streams import stream

if TYPE_CHECKING:
    from zoo.donors.zoo import Zoo
    from zoo.targets.blueprint import Blueprint


@dataclass(kw_only=True)
class SameShapeControl(Sampler):
    """Base of the controls: reads the donors of the target's shape. UserError if there are fewer than `least`."""

    family: ClassVar[str] = "control"
    reference: ClassVar[str] = "2506.07998"
    needs: ClassVar[tuple[str, ...]] = ("donors",)
    least: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._donors: list[Weights] = []

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        if zoo is None:
            raise UserError(f"{self.name}: needs donors; give --zoo")
        self._donors = donors_of_shape(read_weights(zoo, "canonical"), blueprint)
        if len(self._donors) < self.least:
            raise UserError(f"{self.name}: needs {self.least} donors of the target's shape, has {len(self._donors)}")
        first = self._donors[0]
        self._donors = [first, *(match_units(donor, first) for donor in self._donors[1:])]
        return self

    @property
    def donors(self) -> tuple[str, ...]:
        return tuple(d.name for d in self._donors)

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        mixed = ((name, self.mix(name, seed)) for name in self._donors[0].tensors)
        yield from to_checkpoint(mixed, blueprint, "canonical")

    def mix(self, name: str, seed: int) -> Tensor:
        """The tensor `name` of the sample, float32."""
        raise NotImplementedError

    def values(self, name: str) -> Tensor:
        """[donors, ...] float32"""
        return torch.stack([d.tensors[name] for d in self._donors])

    def picked_donor(self, seed: int) -> int:
        """Index of the donor that a seed picks."""
        return int(torch.randint(len(self._donors), (), generator=stream(seed, self.name)))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        raise NotImplementedError("controls are not saved")

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        raise NotImplementedError("controls are not saved")


@dataclass(kw_only=True)
class Noise(SameShapeControl):
    name: ClassVar[str] = "noise on a donor"
    summary: ClassVar[str] = "a donor plus normal noise, in proportion to the size of each tensor"

    amount: float = option(0.1, "deviation of the noise over the root mean square of the tensor", above=0.0)

    def mix(self, name: str, seed: int) -> Tensor:
        own = self._donors[self.picked_donor(seed)].tensors[name]
        noise = torch.randn(own.shape, generator=stream(seed, f"{self.name}/{name}"))
        return own + self.amount * own.square().mean().sqrt() * noise


@dataclass(kw_only=True)
class Average(SameShapeControl):
    name: ClassVar[str] = "average of donors"
    summary: ClassVar[str] = "the mean of all donors of the shape"
    least: ClassVar[int] = 2

    def mix(self, name: str, seed: int) -> Tensor:
        return self.values(name).mean(0)


@dataclass(kw_only=True)
class Interpolation(SameShapeControl):
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
class PerDimension(SameShapeControl):
    name: ClassVar[str] = "Gaussian per dimension"
    summary: ClassVar[str] = "every entry from the normal distribution of that entry over the donors of the shape"
    least: ClassVar[int] = 2

    def mix(self, name: str, seed: int) -> Tensor:
        values = self.values(name)
        noise = torch.randn(values.shape[1:], generator=stream(seed, f"{self.name}/{name}"))
        return values.mean(0) + values.std(0) * noise


def donors_of_shape(donors: Sequence[Weights], blueprint: Blueprint) -> list[Weights]:
    """The donors whose tensors, untied, have the blueprint's shapes."""
    from benchmarks.peers.weights import learned_blueprint

    shapes = {spec.name: spec.shape for spec in learned_blueprint(blueprint, "canonical").specs}
    return [d for d in donors if {name: tuple(t.shape) for name, t in d.tensors.items()} == shapes]


def match_units(donor: Weights, to: Weights) -> Weights:
    """A donor with key-value groups and neurons of every layer reordered to be most alike those of another donor of its
    shape: the permutation with the largest sum of inner products. The function does not change."""
    tensors = dict(donor.tensors)
    shape = donor.metadata
    for layer in range(shape.layers):
        names = {s.role: s.name for s in donor.blueprint.specs if s.layer == layer and s.name in tensors}
        blocks = {"attn.q": 0, "attn.k": 0, "attn.v": 0, "attn.o": 1}, {"mlp.gate": 0, "mlp.up": 0, "mlp.down": 1}
        for axes, count in zip(blocks, (shape.kv_heads, shape.ffn), strict=True):
            own, other = (_unit_rows(source, names, axes, count) for source in (tensors, to.tensors))
            _, order = linear_sum_assignment((other @ own.T).numpy(), maximize=True)
            for role, axis in axes.items():
                if role in names:
                    tensors[names[role]] = _reorder_blocks(tensors[names[role]], axis, count, torch.from_numpy(order))
    return replace(donor, tensors=tensors)


def _unit_rows(tensors: Mapping[str, Tensor], names: Mapping[str, str], axes: Mapping[str, int], count: int) -> Tensor:
    """[count, ...]: everything that belongs to a group of heads or to a neuron, in one row."""
    parts = (tensors[names[role]].movedim(axis, 0).reshape(count, -1) for role, axis in axes.items() if role in names)
    return torch.cat(list(parts), 1)


def _reorder_blocks(matrix: Tensor, axis: int, count: int, order: Tensor) -> Tensor:
    blocks = matrix.movedim(axis, 0).unflatten(0, (count, -1))[order]
    return blocks.flatten(0, 1).movedim(0, axis).contiguous()
