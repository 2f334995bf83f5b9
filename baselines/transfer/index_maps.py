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
class AxisMap:
    """One hidden space of the target."""

    index: Tensor  # [s] int64, the donor's coordinate that each of the target's is a copy of
    scale: Tensor | float = 1.0  # [s] float64: what the matrices that read this space multiply their columns by
    write: Tensor | float = 1.0  # [s] float64: what is written to this space is multiplied by; shifts of norms too
    free: Tensor | None = None  # [s] bool, coordinates that copy none: writers give them the mean of the donor's
    # (times `write`), norms' shifts zero, and the columns of their readers are drawn like the layer's others


@dataclass(frozen=True)
class IndexMaps:
    """All index maps from a donor to a target. Rows of `vocab` and `position` that the donor lacks point past its
    last row, in order."""

    layers: tuple[int, ...]  # the donor's layer of each of the target's
    residual: AxisMap
    heads: tuple[AxisMap, ...]  # per layer of the target, over heads x head_dim flattened
    kv_heads: tuple[AxisMap, ...]  # likewise
    ffn: tuple[AxisMap, ...]  # per layer of the target
    expert_ffn: tuple[AxisMap, ...]  # likewise, shared by the experts of a layer; empty without experts
    head_dim: AxisMap
    vocab: AxisMap
    position: AxisMap = field(default_factory=lambda: AxisMap(torch.empty(0, dtype=torch.long)))
    experts: tuple[int, ...] = ()  # the donor's expert of each of the target's
    embed_scale: float = 1.0  # multiplies the token embedding

    def axis(self, name: str, layer: int | None = None, expert: bool = False) -> AxisMap:
        """The map of an axis (of zoo.tensors.AXES) in a layer of the target."""
        found = getattr(self, "expert_ffn" if expert and name == "ffn" else name)
        if isinstance(found, AxisMap):
            return found
        assert layer is not None
        return found[layer]


def map_part(
    matrix: Tensor,
    part: Part,
    maps: IndexMaps,
    layer: int | None,
    expert: bool = False,
    kind: str = "weight",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The target's part from the donor's: gathers every axis by its map, and scales what reads or writes a hidden
    space by the map's `scale` and `write`.

    matrix: the donor's logical matrix [out, in], bias or gain; part: the target's; layer: the target's; expert:
    whether it belongs to one; kind: weight or bias; generator: of the columns of free coordinates."""
    for dim, name in enumerate(part.axes):
        axis = maps.axis(name, layer, expert)
        use = _use_of_axis(part, dim, kind)
        mean = matrix.mean(dim, keepdim=True)
        matrix = matrix.index_select(dim, axis.index)
        if axis.free is not None:
            matrix = torch.where(_broadcast_along(axis.free, matrix, dim), mean, matrix)
        if use == "read":
            matrix = matrix * _broadcast_along(axis.scale, matrix, dim)
            matrix = matrix if axis.free is None else _draw_free_columns(matrix, axis.free, generator)
        elif use in ("write", "shift"):
            matrix = matrix * _broadcast_along(axis.write, matrix, dim)
            if use == "shift" and axis.free is not None:
                matrix = matrix.masked_fill(axis.free, 0.0)
        elif use == "gain" and name != "residual":  # what was written for the norm's sake is undone by its gain
            matrix = matrix / _broadcast_along(axis.write, matrix, dim)
    return matrix * maps.embed_scale if part.role == "embed" and part.axes[0] == "vocab" else matrix


def _use_of_axis(part: Part, dim: int, kind: str) -> str:
    """What a part does with the space of one of its axes. Queries and keys are writers too: a norm may follow."""
    if part.role == "norm":
        return "gain" if kind == "weight" else "shift"
    if part.role == "embed" or dim == 0:
        writes = part.role in ("attn.q", "attn.k", "attn.o", "mlp.down") or dim == 1
        return "write" if writes else "copy"
    return "read"


def _broadcast_along(values: Tensor | float, matrix: Tensor, dim: int) -> Tensor:
    """[s] or a number -> shaped to multiply `matrix` along `dim`, in its dtype; masks stay masks."""
    mask = isinstance(values, Tensor) and values.dtype == torch.bool
    values = torch.as_tensor(values, dtype=torch.bool if mask else matrix.dtype)
    return values if values.ndim == 0 else values.view(-1, *[1] * (matrix.ndim - 1 - dim))


def _draw_free_columns(matrix: Tensor, free: Tensor, generator: torch.Generator | None) -> Tensor:
    """The free columns normal, with the standard deviation of the others."""
    draws = torch.randn(len(matrix), int(free.sum()), generator=generator).to(matrix.dtype)
    matrix = matrix.clone()
    matrix[:, free] = matrix[:, ~free].std() * draws
    return matrix


def uniform_index(t: int, s: int) -> Tensor:
    """[s] int64: i * (t / s) if s divides t, else round(linspace(0, t - 1, s)); for s > t, floor(i * t / s), which
    repeats evenly. (2311.18823, OscarXZQ/weight-selection)"""
    if s > t:
        return torch.arange(s) * t // s
    if t % s == 0:
        return torch.arange(s) * (t // s)
    return torch.linspace(0, t - 1, s).round().long()


def leading_index(t: int, s: int) -> Tensor:
    """[s] int64: the first s, from the start again where s > t."""
    return torch.arange(s) % t


def random_index(t: int, s: int, generator: torch.Generator) -> Tensor:
    """[s] int64, sorted: s of t without repetition; where s > t, every one floor(s / t) times and the rest drawn."""
    return torch.cat([torch.arange(t).repeat(s // t), torch.randperm(t, generator=generator)[: s % t]]).sort().values


def growth_index(t: int, s: int, generator: torch.Generator) -> Tensor:
    """[s] int64, s >= t: each of the t in its place, then random ones, none twice before all were drawn once. (Net2Net
    draws with repetition; without it no coordinate has more than one copy more than another.)"""
    rounds = [torch.randperm(t, generator=generator) for _ in range(-(-s // t) - 1)]
    return torch.cat([torch.arange(t), *rounds])[:s]


def read_shares(index: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """[s] float64: what each copy of a coordinate contributes, one in sum over its copies: equal shares, or with a
    generator random ones (proportional to draws from [0.5, 1.5]), so that copies are told apart (LEMON, 2310.07999)."""
    if generator is None:
        return 1 / multiplicity(index)
    draws = 0.5 + torch.rand(len(index), generator=generator, dtype=torch.float64)
    return draws / torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add(0, index, draws)[index]


def copy_numbers(index: Tensor) -> Tensor:
    """[s] int64: how many places before each one hold the same donor's coordinate: 0 for the first of its copies."""
    order = index.argsort(stable=True)
    counts = torch.bincount(index)
    rank = torch.empty_like(index)
    rank[order] = torch.arange(len(index)) - (counts.cumsum(0) - counts)[index[order]]
    return rank


def multiplicity(index: Tensor) -> Tensor:
    """[s] float64: how often the coordinate that stands at each place occurs in the map."""
    return torch.bincount(index)[index].double()


def even_layers(t: int, s: int) -> tuple[int, ...]:
    """The donor's layer of each of the target's, evenly spaced, the first and the last kept; a deeper target repeats
    each layer in place."""
    if s > t:
        return tuple(int(i) * t // s for i in range(s))
    return tuple(torch.linspace(0, t - 1, s).round().long().tolist())


def rope_index(t: int, s: int, rotary: int) -> Tensor:
    """[s] int64: the coordinates of a head that a narrower head keeps: every (t / s)-th, in both halves of the part
    that is rotated (i and i + half are one pair), so that the frequencies of the pairs kept are those of the target.

    rotary: how many of the donor's coordinates are rotated, the first ones. Raises UserError where t / s is no
    integer or does not divide the halves."""
    stride, rest = divmod(t, s)
    if rest or rotary % (2 * stride):
        raise UserError(f"head_dim {t} does not shrink to {s} by a whole stride")
    return torch.arange(s) * stride


def spread_query_heads(groups: Tensor, t: int, s: int) -> Tensor:
    """[K, s] int64: the query head, within its KV group, of every query head of the target.

    groups [K]: the donor's group of each of the target's; t, s: query heads per group. The copies of a group share
    out its query heads, so that MHA from GQA, or twice the query heads, loses and invents none."""
    queries = torch.empty(len(groups), s, dtype=torch.long)
    for group in groups.unique():
        copies = (groups == group).nonzero().flatten()
        queries[copies] = uniform_index(t, len(copies) * s).view(len(copies), s)
    return queries


def head_maps(donor: Metadata, groups: Tensor, queries: Tensor, head_dim: Tensor) -> tuple[AxisMap, AxisMap]:
    """(heads, kv_heads) of one layer over flattened heads, unscaled. groups [K], queries [K, G], head_dim [h]."""
    per_group = donor.heads // donor.kv_heads
    heads = (groups[:, None] * per_group + queries).flatten()
    return AxisMap(flatten_head_index(heads, donor.head_dim, head_dim)), AxisMap(
        flatten_head_index(groups, donor.head_dim, head_dim)
    )


def flatten_head_index(heads: Tensor, donor_head_dim: int, head_dim: Tensor) -> Tensor:
    """[H] heads and [h] coordinates within a head -> [H * h] rows."""
    return (heads[:, None] * donor_head_dim + head_dim).flatten()


def index_new_rows(index: Tensor, rows: int) -> Tensor:
    """-1 -> rows, rows + 1, …: the place of the rows that are appended to the donor's for what it lacks."""
    missing = index < 0
    index = index.clone()
    index[missing] = rows + torch.arange(int(missing.sum()))
    return index


def describe_changes(axes: Sequence[tuple[str, int, int]]) -> str:
    """[(axis, donor's size, target's size)] -> 'width 64 -> 96, layers 5 -> 8', of those that differ."""
    return ", ".join(f"{name} {t} -> {s}" for name, t, s in axes if t != s) or "same shape"
