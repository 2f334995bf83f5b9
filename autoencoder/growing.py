"""Tables beyond the field's largest shape: the function of the largest one within it, in more coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from autoencoder.field import FieldSizes
from zoo.streams import stream
from zoo.tensors import Metadata

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
    neuron, query, key = (tables[t] for t in ("neuron", "query", "key"))
    neuron = _repeated(neuron, shape.ffn)
    query, key = _repeated(query, shape.kv_heads), _repeated(key, shape.kv_heads, shares_output=False)
    found = {"neuron": neuron, "query": query, "key": key}
    return {t: _wider(x, shape.width, f"block {index} {t}") for t, x in found.items()}


def grow_tokens(pairs: Tensor, width: int) -> Tensor:
    """Vocabulary pairs [V, 2, d] with further coordinates."""
    return _wider(pairs, width, "tokens")


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
