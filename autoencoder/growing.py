"""Tables beyond the field's largest shape: the function of the largest one within it, in more coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from autoencoder.field import FieldSizes
from zoo.streams import stream
from zoo.tensors import Metadata
from zoo.units.family import coordinates, family_of
from zoo.units.tables import numbers_of

NOISE = 0.1  # of a vector's RMS, in coordinates that the field lacks: training cannot move exact zeros away from zero


def capped_shape(shape: Metadata, sizes: FieldSizes) -> Metadata:
    """The largest shape within the field's that a target can be grown from. Depth and query heads have no bound."""
    groups = min(shape.kv_heads, sizes.groups)
    share = shape.heads // shape.kv_heads
    return replace(
        shape,
        width=min(shape.width, sizes.width),
        ffn=min(shape.ffn, sizes.neurons),
        kv_heads=groups,
        heads=groups * share,
    )


def grow_tables(tables: Mapping[str, Tensor], shape: Metadata, index: int) -> dict[str, Tensor]:
    """The tables of block number `index` at `shape`, from those of `capped_shape`. The most important neurons and heads
    are repeated, and copies share their output, so that the function stays."""
    counts = {"neuron": shape.ffn, "query": shape.kv_heads, "key": shape.kv_heads}
    numbers = {numbers_of(t): count for t, count in counts.items()}
    found = {}
    for name, table in tables.items():
        if name in numbers:
            found[name] = _repeated(table, numbers[name], shares_output=False)
        else:
            repeated = _repeated(table, counts[name], shares_output=name != "key") if name in counts else table
            found[name] = _wider(repeated, coordinates(shape), f"block {index} {name}")
    return found


def grow_tokens(pairs: Tensor, shape: Metadata) -> Tensor:
    """Vocabulary pairs [V, 2, d] with further coordinates. Where LayerNorm hides the last one, it stays the last."""
    if family_of(shape).norm != "layer":
        return _wider(pairs, shape.width, "tokens")
    return torch.cat([_wider(pairs[..., :-1], coordinates(shape), "tokens"), pairs[..., -1:]], dim=-1)


def grow_positions(positions: Tensor, shape: Metadata) -> Tensor:
    """A position table [P, 1, c] with further coordinates."""
    return _wider(positions, coordinates(shape), "positions")


def _repeated(table: Tensor, count: int, shares_output: bool = True) -> Tensor:
    """A table with `count` entries; the last vector of an entry is its output."""
    have = len(table)
    if count <= have:
        return table
    index = torch.arange(count) % have
    grown = table[index]
    if shares_output:
        copies = torch.bincount(index, minlength=have)[index].to(table)
        grown[..., -1, :] /= copies.view(-1, *[1] * (table.ndim - 2))
    return grown


def _wider(table: Tensor, width: int, name: str) -> Tensor:
    missing = width - table.shape[-1]
    if missing <= 0:
        return table
    rms = table.square().mean(-1, keepdim=True).sqrt()
    noise = torch.randn(*table.shape[:-1], missing, generator=stream(0, f"beyond the field: {name}"))
    return torch.cat([table, NOISE * rms * noise.to(table)], dim=-1)
