"""Resizing the units of a decoder: other widths, depths, head counts and FFN sizes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.linear_algebra import symmetric_eigenvectors
from zoo.tensors import Metadata
from zoo.units.units import READER_ROLES, ROLES


def layer_map(n_source: int, n_target: int) -> Tensor:
    """The source layer for each target layer, int64 [n_target]: evenly spaced, including the first and the last.

    A deeper target repeats layers."""
    if n_target == 1:
        return torch.zeros(1, dtype=torch.int64)
    return torch.linspace(0, n_source - 1, n_target, dtype=torch.float64).round().long()


def unit_map(source: Metadata, target: Metadata) -> dict[str, tuple[Tensor, Tensor]]:
    """For each unit of the target, the source's unit that it takes, int64 [N], and the number of copies of that unit,
    float32 [N]; by kind. Copies share the output of the unit.

    Each layer takes the most important units. A deeper target repeats layers; more neurons or heads repeat the most
    important ones. Raises UserError if head_dim or vocabulary differ."""
    for axis in ("head_dim", "vocab"):
        if getattr(source, axis) != getattr(target, axis):
            raise UserError(
                f"units: {axis} is {getattr(source, axis)} in the donor and {getattr(target, axis)} in the target; "
                "use a donor with the same"
            )
    layers = layer_map(source.layers, target.layers)
    heads = _heads_map(source, target)
    neurons = torch.arange(target.ffn) % source.ffn

    def rows(index: Tensor, copies: Tensor, per_layer: int) -> tuple[Tensor, Tensor]:
        return (layers[:, None] * per_layer + index).flatten(), copies.float().repeat(len(layers))

    def head_rows(size: int) -> tuple[Tensor, Tensor]:
        index = (heads[:, None] * size + torch.arange(size)).flatten()
        return rows(index, _copy_counts(heads, source.heads).repeat_interleave(size), source.heads * size)

    planes, ones = head_rows(source.head_dim // 2)
    return {
        "vocab": (torch.arange(target.vocab), torch.ones(target.vocab)),
        "neuron": rows(neurons, _copy_counts(neurons, source.ffn), source.ffn),
        "qk": (planes, torch.ones_like(ones)),  # queries and keys have no output
        "vo": head_rows(source.head_dim),
    }


def resize_units(units: dict[str, Tensor], source: Metadata, target: Metadata) -> dict[str, Tensor]:
    """Resizes the units of a canonical decoder to another shape: vectors [N, P, d] by kind, see `unit_map`.

    A narrower target keeps the first coordinates, a wider one gets zeros. At equal depth, growth in neurons and KV
    groups keeps the function exactly, growth in width up to the norm's eps."""
    resized = {}
    for kind, (index, copies) in unit_map(source, target).items():
        if kind not in units:
            continue
        vectors = units[kind][index]  # a copy
        vectors[:, -1] /= copies[:, None].to(vectors)
        resized[kind] = to_width(vectors, target.width)
    return resized


def to_width(vectors: Tensor, width: int) -> Tensor:
    """Crops the last axis to `width`, or pads it with zeros: [..., d] -> [..., width]."""
    if width <= vectors.shape[-1]:
        return vectors[..., :width]
    return torch.nn.functional.pad(vectors, (0, width - vectors.shape[-1]))


def residual_energy(units: Mapping[str, Tensor], metadata: Metadata) -> Tensor:
    """The sum of outer products of all residual vectors of a decoder, float64 [D, D].

    units: vectors [N, P, D] by kind; each counts as much as it does in the decoder's tensors."""
    total = torch.zeros(())
    for kind, vectors in units.items():
        for part, role in enumerate(ROLES[kind]):
            rows = vectors[:, part].double()
            scale = metadata.width if role in READER_ROLES else 1  # readers are width-free
            copies = metadata.heads // metadata.kv_heads if role in ("k", "v") else 1  # one per query head
            total = total + rows.mT @ rows / (scale * copies)
    return total


def principal_axes(energy: Tensor, width: int) -> Tensor:
    """The orthonormal axes with the most energy, [D, width], largest first. energy: from `residual_energy`, [D, D].

    The largest entry of each axis is positive."""
    return symmetric_eigenvectors(energy)[1][:, :width]


def project_to_axes(units: Mapping[str, Tensor], axes: Tensor) -> dict[str, Tensor]:
    """Projects vectors [N, P, D] by kind to axes [D, d].

    With principal axes, this is the narrower model that keeps the most energy (slicing, 2401.15024)."""
    return {kind: vectors @ axes.to(vectors.dtype) for kind, vectors in units.items()}


def _heads_map(source: Metadata, target: Metadata) -> Tensor:
    """The source's query head for each target head, int64 [heads]: whole groups in order of energy, repeated if there
    are too few."""
    n_source, n_target = source.heads // source.kv_heads, target.heads // target.kv_heads
    groups = torch.arange(target.kv_heads) % source.kv_heads
    return (groups[:, None] * n_source + torch.arange(n_target) % n_source).flatten()


def _copy_counts(index: Tensor, size: int) -> Tensor:
    return torch.bincount(index, minlength=size)[index]
