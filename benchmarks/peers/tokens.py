"""SANE's tokens: a model's rows cut to one size, with positions; standardization, permutations, windows with halos,
the correspondence of tokens in models of two shapes.

Letters: N tokens, T token size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers.weights import Weights, depth_third, layer_at_same_depth
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.tensors import TensorSpec


@dataclass(frozen=True)
class Tokens:
    values: Tensor  # [N, T], 0 where there is padding
    mask: Tensor  # bool [N, T]
    positions: Tensor  # int64 [N, 3]: token, tensor, row


def to_tokens(blueprint: Blueprint, tensors: Mapping[str, Tensor], size: int) -> Tokens:
    """Row by row; a vector (a norm's gain) is one row. The inverse is `detokenise`."""
    values, masks, positions = [], [], []
    for index, spec in enumerate(blueprint.specs):
        rows = tensors[spec.name].reshape(-1, spec.shape[-1])
        parts = math.ceil(rows.shape[1] / size)
        padded = F.pad(rows, (0, parts * size - rows.shape[1]))
        mask = F.pad(torch.ones_like(rows, dtype=torch.bool), (0, parts * size - rows.shape[1]))
        values.append(padded.reshape(-1, size))
        masks.append(mask.reshape(-1, size))
        row = torch.arange(len(rows)).repeat_interleave(parts)
        positions.append(torch.stack([torch.full_like(row, index), row], dim=1))
    place_in = torch.cat(positions)
    whole = torch.cat([torch.arange(len(place_in))[:, None], place_in], dim=1)
    return Tokens(torch.cat(values), torch.cat(masks), whole)


def from_tokens(blueprint: Blueprint, values: Tensor) -> dict[str, Tensor]:
    """Tokens [N, T] of a blueprint's tensors -> the tensors."""
    out, start = {}, 0
    for spec in blueprint.specs:
        rows, length = spec.numel // spec.shape[-1], spec.shape[-1]
        count = rows * math.ceil(length / values.shape[1])
        out[spec.name] = values[start : start + count].reshape(rows, -1)[:, :length].reshape(spec.shape)
        start += count
    return out


def layer_statistics(donors: list[Weights]) -> dict[str, list[float]]:
    """ "role/place" -> [mean, deviation] over the zoo: the layer-wise standardisation of the paper, where layers of
    models of several depths are matched by `place`."""
    sums: dict[str, list[Tensor]] = {}
    for donor in donors:
        for spec in donor.blueprint.specs:
            sums.setdefault(_statistics_key(spec, donor.metadata.layers), []).append(
                donor.tensors[spec.name].flatten().double()
            )
    found = {}
    for key, parts in sums.items():
        values = torch.cat(parts)
        std = float(values.std(correction=0))
        found[key] = [float(values.mean()), std if std > 1e-6 else 1.0]
    return found


def _statistics_key(spec: TensorSpec, layers: int) -> str:
    return f"{spec.role}{'.' + spec.site if spec.site else ''}/{depth_third(spec, layers)}"


def standardize(
    blueprint: Blueprint, tensors: Mapping[str, Tensor], known: Mapping[str, list[float]], inverse: bool = False
) -> dict[str, Tensor]:
    """Standardizes every tensor by the statistics of its key; those of the middle layers if the zoo has none there."""
    assert blueprint.metadata is not None
    out = {}
    for spec in blueprint.specs:
        key = _statistics_key(spec, blueprint.metadata.layers)
        others = (f"{key.split('/')[0]}/{where}" for where in ("middle", "last", "first"))
        mean, std = known[key if key in known else next(o for o in others if o in known)]
        t = tensors[spec.name]
        out[spec.name] = t * std + mean if inverse else (t - mean) / std
    return out


def random_permutation(weights: Weights, rng: torch.Generator) -> dict[str, Tensor]:
    """An equivalent donor: neurons of every layer, and its groups of heads, in random order."""
    meta, out = weights.metadata, dict(weights.tensors)
    orders: dict[tuple[int, str], Tensor] = {}
    for layer in range(meta.layers):
        groups = torch.randperm(meta.kv_heads, generator=rng)
        orders[layer, "ffn"] = torch.randperm(meta.ffn, generator=rng)
        for axis, heads in (("heads", meta.heads), ("kv_heads", meta.kv_heads)):
            size = heads // meta.kv_heads * meta.head_dim
            orders[layer, axis] = (groups[:, None] * size + torch.arange(size)).flatten()
    for spec in weights.blueprint.specs:
        if spec.layer is None:
            continue
        for dim, axis in enumerate(spec.parts[0].axes):
            if (spec.layer, axis) in orders:
                out[spec.name] = out[spec.name].index_select(dim, orders[spec.layer, axis])
    return out


def halo_windows(count: int, content: int, halo: int) -> list[tuple[int, int, int, int]]:
    """(start, stop, first, last) for every window of a sequence: the model reads tokens start..stop, and the
    results of first..last are kept. Content has `halo` neighbours on either side; at the ends all are on one side."""
    length = min(content + 2 * halo, count)
    found = []
    for first in range(0, count, content):
        last = min(first + content, count)
        start = min(max(0, first - halo), count - length)
        found.append((start, start + length, first, last))
    return found


def matching_tokens(target: Blueprint, anchor: Blueprint, size: int) -> Tensor:
    """int64 [N]: for every token of the target, the token of the anchor whose latents it is drawn from. Our choice: the
    same role at the nearest relative depth, the same row (modulo the anchor's rows), the same piece of the row (or
    the last). UserError if the anchor has no tensor of that role."""
    assert target.metadata is not None and anchor.metadata is not None
    starts, at = {}, 0
    for spec in anchor.specs:
        starts[spec.name] = at
        at += spec.numel // spec.shape[-1] * math.ceil(spec.shape[-1] / size)
    found = []
    for spec in target.specs:
        layer = spec.layer
        if layer is not None:
            layer = layer_at_same_depth(layer, target.metadata.layers, anchor.metadata.layers)
        alike = [s for s in anchor.specs if (s.role, s.layer, s.site) == (spec.role, layer, spec.site)]
        if not alike:
            raise UserError(f"the anchors have no tensor like {spec.name!r}; use a target of the zoo's architecture")
        source = alike[0]
        rows, parts = (spec.numel // spec.shape[-1], math.ceil(spec.shape[-1] / size))
        source_rows, source_parts = (source.numel // source.shape[-1], math.ceil(source.shape[-1] / size))
        row = torch.arange(rows)[:, None] % source_rows
        piece = torch.arange(parts).clamp(max=source_parts - 1)
        found.append((starts[source.name] + row * source_parts + piece).flatten())
    return torch.cat(found)
