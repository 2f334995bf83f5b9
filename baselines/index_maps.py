"""Where each coordinate of a target comes from in a donor: the rules that selection, pruning and growth share.

One map for the whole residual stream, one per layer for its FFN, one per layer over whole KV groups (a KV head with
all its query heads): flattened head rows are never sliced, because that mixes heads. t: donor's size, s: target's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.tensors import Metadata, Part


@dataclass(frozen=True)
class Axis:
    """One hidden space of the target."""

    index: Tensor  # [s] int64, the donor's coordinate that each of the target's is a copy of
    scale: Tensor | float = 1.0  # [s] float64: what the matrices that read this space multiply their columns by


@dataclass(frozen=True)
class Maps:
    """All index maps from a donor to a target. Rows of `vocab` and `position` that the donor lacks point past its
    last row, in order."""

    layers: tuple[int, ...]  # the donor's layer of each of the target's
    residual: Axis
    heads: tuple[Axis, ...]  # per layer of the target, over heads x head_dim flattened
    kv_heads: tuple[Axis, ...]  # likewise
    ffn: tuple[Axis, ...]  # per layer of the target
    expert_ffn: tuple[Axis, ...]  # likewise, shared by the experts of a layer; empty without experts
    head_dim: Axis
    vocab: Axis
    position: Axis = field(default_factory=lambda: Axis(torch.empty(0, dtype=torch.long)))
    experts: tuple[int, ...] = ()  # the donor's expert of each of the target's
    embed_scale: float = 1.0  # multiplies the token embedding

    def axis(self, name: str, layer: int | None = None, expert: bool = False) -> Axis:
        """The map of an axis (of zoo.tensors.AXES) in a layer of the target."""
        found = getattr(self, "expert_ffn" if expert and name == "ffn" else name)
        if isinstance(found, Axis):
            return found
        assert layer is not None
        return found[layer]


def take(matrix: Tensor, part: Part, maps: Maps, layer: int | None, expert: bool = False) -> Tensor:
    """The target's part from the donor's: gathers every axis by its map, and scales the columns of what reads a
    hidden space (every matrix but an embedding, whose rows are written to the stream).

    matrix: the donor's logical matrix [out, in], bias or gain; part: the target's; layer: the target's; expert:
    whether it belongs to one."""
    for dim, name in enumerate(part.axes):
        matrix = matrix.index_select(dim, maps.axis(name, layer, expert).index)
    if part.role == "embed":
        return matrix * maps.embed_scale if part.axes[0] == "vocab" else matrix
    if len(part.axes) == 2:
        matrix = matrix * torch.as_tensor(maps.axis(part.axes[1], layer, expert).scale, dtype=matrix.dtype)
    return matrix


def uniform(t: int, s: int) -> Tensor:
    """[s] int64: i * (t / s) if s divides t, else round(linspace(0, t - 1, s)); for s > t, floor(i * t / s), which
    repeats evenly. (2311.18823, OscarXZQ/weight-selection)"""
    if s > t:
        return torch.arange(s) * t // s
    if t % s == 0:
        return torch.arange(s) * (t // s)
    return torch.linspace(0, t - 1, s).round().long()


def first(t: int, s: int) -> Tensor:
    """[s] int64: the first s, from the start again where s > t."""
    return torch.arange(s) % t


def random_subset(t: int, s: int, generator: torch.Generator) -> Tensor:
    """[s] int64, sorted: s of t without repetition; where s > t, every one floor(s / t) times and the rest drawn."""
    return torch.cat([torch.arange(t).repeat(s // t), torch.randperm(t, generator=generator)[: s % t]]).sort().values


def multiplicity(index: Tensor) -> Tensor:
    """[s] float64: how often the coordinate that stands at each place occurs in the map."""
    return torch.bincount(index)[index].double()


def even_layers(t: int, s: int) -> tuple[int, ...]:
    """The donor's layer of each of the target's, evenly spaced, the first and the last kept; a deeper target repeats
    each layer in place."""
    if s > t:
        return tuple(int(i) * t // s for i in range(s))
    return tuple(torch.linspace(0, t - 1, s).round().long().tolist())


def rope_pairs(t: int, s: int, rotary: int) -> Tensor:
    """[s] int64: the coordinates of a head that a narrower head keeps: every (t / s)-th, in both halves of the part
    that is rotated (i and i + half are one pair), so that the frequencies of the pairs kept are those of the target.

    rotary: how many of the donor's coordinates are rotated, the first ones. Raises UserError where t / s is no
    integer or does not divide the halves."""
    stride, rest = divmod(t, s)
    if rest or rotary % (2 * stride):
        raise UserError(f"head_dim {t} does not shrink to {s} by a whole stride")
    return torch.arange(s) * stride


def spread_queries(groups: Tensor, t: int, s: int) -> Tensor:
    """[K, s] int64: the query head, within its KV group, of every query head of the target.

    groups [K]: the donor's group of each of the target's; t, s: query heads per group. The copies of a group share
    out its query heads, so that MHA from GQA, or twice the query heads, loses and invents none."""
    queries = torch.empty(len(groups), s, dtype=torch.long)
    for group in groups.unique():
        copies = (groups == group).nonzero().flatten()
        queries[copies] = uniform(t, len(copies) * s).view(len(copies), s)
    return queries


def head_axes(donor: Metadata, groups: Tensor, queries: Tensor, head_dim: Tensor) -> tuple[Axis, Axis]:
    """(heads, kv_heads) of one layer over flattened heads, unscaled. groups [K], queries [K, G], head_dim [h]."""
    per_group = donor.heads // donor.kv_heads
    heads = (groups[:, None] * per_group + queries).flatten()
    return Axis(flatten_heads(heads, donor.head_dim, head_dim)), Axis(flatten_heads(groups, donor.head_dim, head_dim))


def flatten_heads(heads: Tensor, donor_head_dim: int, head_dim: Tensor) -> Tensor:
    """[H] heads and [h] coordinates within a head -> [H * h] rows."""
    return (heads[:, None] * donor_head_dim + head_dim).flatten()


def rows_by_token(donor: dict[str, int], target: dict[str, int], rows: int, wanted: int) -> Tensor:
    """[wanted] int64: the donor's row for every token string of the target, -1 where the donor has none.

    rows: of the donor's embedding; wanted: of the target's."""
    index = torch.full((wanted,), -1)
    for token, row in target.items():
        if row < wanted and donor.get(token, rows) < rows:
            index[row] = donor[token]
    return index


def past_the_end(index: Tensor, rows: int) -> Tensor:
    """-1 -> rows, rows + 1, …: the place of the rows that are appended to the donor's for what it lacks."""
    missing = index < 0
    index = index.clone()
    index[missing] = rows + torch.arange(int(missing.sum()))
    return index


def changes(axes: Sequence[tuple[str, int, int]]) -> str:
    """[(axis, donor's size, target's size)] -> 'width 64 -> 96, layers 5 -> 8', of those that differ."""
    return ", ".join(f"{name} {t} -> {s}" for name, t, s in axes if t != s) or "same shape"
