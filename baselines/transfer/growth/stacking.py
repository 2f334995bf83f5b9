"""Stacking: a deeper model from the blocks of a shallower one of the same width (2405.15319)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from baselines.transfer.gather import copy_tensors
from baselines.transfer.growth.base import (
    Growth,
    changed_layer_kind,
    growth_mismatches,
    has_post_norm,
    repeated_layers,
    silence_layers,
)
from baselines.transfer.index_maps import AxisMap, IndexMaps
from baselines.transfer.index_rules import even_layers, repeated_layer_list
from baselines.transfer.sizes import axis_sizes, expert_ffn_size, metadata_pair, shared_ffn_size
from zoo.options import option
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata

if TYPE_CHECKING:
    from zoo.donors.donor import Donor


@dataclass(kw_only=True)
class Stacking(Growth):
    """Repeats the blocks of a donor (2405.15319). Widths, heads and FFN are the donor's.

    `order=stack` repeats the whole list (0 1 2 0 1 2) and cuts it where the target's depth is not a multiple.
    `order=interleave` repeats each block in place (0 0 1 1 2 2), which was the worse order in the paper.

    The stacked model does not compute the donor's function. It still trains faster: in the paper a 7B model needed 194B
    tokens for the loss that took 300B from scratch. With `exact` only the first copy of a block writes anything at
    first. The output projections of the others (or the gains of the norms after them) are zero and receive gradients,
    and the function is the donor's.
    """

    name: ClassVar[str] = "stacking"
    summary: ClassVar[str] = "a donor's list of blocks repeated to a deeper model of the same width"
    reference: ClassVar[str] = "2405.15319"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"order": ("stack", "interleave")}

    order: str = option(
        "stack", "order of the copies: stack (the whole list again) or interleave (each block after its original)"
    )
    exact: bool = option(False, "copies write nothing at first, so that the donor's function stays")

    def extra_mismatches(self, donor: Donor, blueprint: Blueprint) -> list[str]:
        source, target = metadata_pair(donor, blueprint)
        different = [
            f"{axis} {n_source} is not the target's {n_target}"
            for axis, n_source, n_target in axis_sizes(source, target)
            if n_source != n_target and axis not in ("layers", "vocab", "positions")
        ]
        if different:
            return [f"{', '.join(different)}: stacking only changes the depth; use net2wider"]
        found = growth_mismatches(donor, blueprint, silent=self.exact and target.layers > source.layers)
        if not found and self.exact and target.layers > source.layers:
            if has_post_norm(blueprint):
                found.append(
                    "its norms act on the residual stream, so that no layer can be silent: leave out exact=true"
                )
            elif moved := changed_layer_kind(donor, blueprint, self._layers(source, target)):
                other = "interleave" if self.order == "stack" else "stack"
                found.append(f"{moved}: try order={other}, or leave out exact=true")
        return found

    def function_differences(self, blueprint: Blueprint) -> list[str]:
        if blueprint.metadata is None:  # a copy of a donor with the same config
            return []
        source, target = metadata_pair(self.source, blueprint)
        found = super().function_differences(blueprint)
        if target.layers > source.layers and not self.exact:
            found.append(f"{target.layers} layers where the donor has {source.layers} (exact=true keeps it)")
            if moved := changed_layer_kind(self.source, blueprint, self._layers(source, target)):
                found.append(moved)
        return found

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        if self.is_copy(blueprint):
            yield from copy_tensors(self.source, blueprint, self.only)
            return
        source, target = metadata_pair(self.source, blueprint)
        fixed: dict[str, Any] = self.fixed_maps(blueprint)
        heads, kv_heads = (AxisMap(torch.arange(n * source.head_dim)) for n in (source.heads, source.kv_heads))
        layers = self._layers(source, target)
        maps = IndexMaps(
            layers,
            AxisMap(torch.arange(source.width)),
            (heads,) * target.layers,
            (kv_heads,) * target.layers,
            (AxisMap(torch.arange(source.ffn)),) * target.layers,
            (AxisMap(torch.arange(expert_ffn_size(source))),) * target.layers,
            shared_ffn=(AxisMap(torch.arange(shared_ffn_size(source))),) * target.layers,
            **fixed,
        )
        tensors = self.gather(blueprint, lambda _: maps, seed)
        yield from silence_layers(tensors, blueprint, repeated_layers(layers) if self.exact else ())

    def _layers(self, source: Metadata, target: Metadata) -> tuple[int, ...]:
        if self.order == "stack":
            return repeated_layer_list(source.layers, target.layers)
        return even_layers(source.layers, target.layers)
