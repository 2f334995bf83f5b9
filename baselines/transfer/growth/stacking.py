"""Stacking: a deeper model from the blocks of a shallower one of the same width (2405.15319)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from baselines.transfer.gather import fixed_maps, gather_tensors
from baselines.transfer.growth.base import (
    Growth,
    changed_layer_kind,
    growth_mismatches,
    has_post_norm,
    repeated_layers,
    silence_layers,
)
from baselines.transfer.index_maps import AxisMap, IndexMaps, even_layers
from baselines.transfer.sizes import axis_sizes, metadata_pair
from zoo.options import option
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata

if TYPE_CHECKING:
    from zoo.donors.donor import Donor


@dataclass(kw_only=True)
class Stacking(Growth):
    """Repeats the blocks of a donor: G_stack, the whole list again and again (0 1 2 0 1 2), cut off where the target's
    depth is no multiple; or each block in place (0 0 1 1 2 2), which was the worse order in the paper. Widths, heads
    and FFN are the donor's.

    The stacked model does not compute the donor's function, and trains faster all the same (7B: 194B tokens for what
    takes 300B). With `exact` all copies of a block but the first write nothing at first: zero output projections (or
    gains of the norms after them), which receive gradients. Then the function is the donor's.
    """

    name: ClassVar[str] = "stacking"
    summary: ClassVar[str] = "a donor's list of blocks repeated to a deeper model of the same width"
    reference: ClassVar[str] = "2405.15319"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"order": ("stack", "interleave")}

    order: str = option("stack", "of the copies: stack (the whole list again) or interleave (each block in place)")
    exact: bool = option(False, "copies write nothing at first, so that the donor's function is preserved")

    def refuses(self, donor: Donor, blueprint: Blueprint) -> list[str]:
        source, target = metadata_pair(donor, blueprint)
        other_size = [
            f"{axis} {t} is not the target's {s}"
            for axis, t, s in axis_sizes(source, target)
            if t != s and axis not in ("layers", "vocab", "positions")
        ]
        if other_size:
            return [f"{', '.join(other_size)}: stacking changes the depth alone, net2wider any size"]
        found = growth_mismatches(donor, blueprint)
        if not found and self.exact and target.layers > source.layers:
            if has_post_norm(blueprint):
                found.append("its norms stand on the stream itself, where no layer can be silent: leave out exact=true")
            elif moved := changed_layer_kind(donor, blueprint, self._layers(source, target)):
                other = "interleave" if self.order == "stack" else "stack"
                found.append(f"{moved}: try order={other}, or leave out exact=true")
        return found

    def inexact(self, blueprint: Blueprint) -> list[str]:
        source, target = metadata_pair(self.source, blueprint)
        found = super().inexact(blueprint)
        if target.layers > source.layers and not self.exact:
            found.append(f"{target.layers} layers where the donor has {source.layers} (exact=true keeps it)")
            if moved := changed_layer_kind(self.source, blueprint, self._layers(source, target)):
                found.append(moved)
        return found

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        source, target = metadata_pair(self.source, blueprint)
        tables: dict[str, Any] = fixed_maps(self.source, blueprint, self.rows(blueprint))
        heads, kv_heads = (AxisMap(torch.arange(n * source.head_dim)) for n in (source.heads, source.kv_heads))
        layers = self._layers(source, target)
        maps = IndexMaps(
            layers,
            AxisMap(torch.arange(source.width)),
            (heads,) * target.layers,
            (kv_heads,) * target.layers,
            (AxisMap(torch.arange(source.ffn)),) * target.layers,
            (),
            **tables,
        )
        tensors = gather_tensors(self.source, blueprint, lambda _: maps, seed, self.name)
        yield from silence_layers(tensors, blueprint, repeated_layers(layers) if self.exact else ())

    def _layers(self, source: Metadata, target: Metadata) -> tuple[int, ...]:
        if self.order == "stack":
            return tuple(i % source.layers for i in range(target.layers))
        return even_layers(source.layers, target.layers)
