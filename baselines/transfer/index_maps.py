"""How the parts of a target are made of a donor's parts: one index map per hidden space.

There is one map for the whole residual stream, one per layer for its FFN, and one per layer over whole KV groups (a KV
head with all its query heads). Rows of flattened heads are never cut apart, because that would mix heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from zoo.tensors import Part
from zoo.vocabularies.row_map import RowMap


@dataclass(frozen=True)
class AxisMap:
    """How one hidden space of a target is made of the donor's. n is its size in the target."""

    index: Tensor  # [n] int64: the donor's coordinate that each coordinate of the target copies
    read_scale: Tensor | float = 1.0  # [n] float64: factor of the columns of matrices that read the space
    write_scale: Tensor | float = 1.0  # [n] float64: factor of what is written to the space, and of norms' shifts
    free: Tensor | None = None  # [n] bool: coordinates that copy none. Writers give them the mean of the donor's
    # coordinates (times `write_scale`), shifts of norms give zero, and the columns of their readers are drawn


@dataclass(frozen=True)
class IndexMaps:
    """All index maps from a donor to a target.

    Rows of `vocab` and `position` that the donor does not have point past its last row, in order. `tokens` says which
    of those of `vocab` are composed of the donor's rows.
    """

    layers: tuple[int, ...]  # the donor's layer for each layer of the target
    residual: AxisMap
    heads: tuple[AxisMap, ...]  # per layer of the target, over heads x head_dim flattened
    kv_heads: tuple[AxisMap, ...]  # likewise
    ffn: tuple[AxisMap, ...]  # per layer of the target
    expert_ffn: tuple[AxisMap, ...]  # likewise, shared by the experts of a layer; empty without experts
    head_dim: AxisMap
    vocab: AxisMap
    position: AxisMap = field(default_factory=lambda: AxisMap(torch.empty(0, dtype=torch.long)))
    experts: tuple[int, ...] = ()  # the donor's expert for each expert of the target
    embed_scale: float = 1.0  # factor of the token embedding
    shared_ffn: tuple[AxisMap, ...] = ()  # per layer of the target, of the MLP beside the experts; empty without one
    tokens: RowMap | None = None  # where the target has another tokenizer

    def axis(self, name: str, layer: int | None = None, expert: bool = False) -> AxisMap:
        """The map of an axis (one of zoo.tensors.AXES) in a layer of the target."""
        if name == "experts":
            return AxisMap(torch.tensor(self.experts))
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
    """The target's part from the donor's: every axis gathered by its map and multiplied by the map's scales.

    matrix: the donor's logical matrix [out, in], bias or gain, in its dtype on disk; part: the target's; layer: of the
    target; expert: whether the part belongs to an expert; kind: weight or bias; generator: for the columns of free
    coordinates. The result is float32, or float64 where the matrix is.
    """
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    axes = {
        dim: maps.axis(name, layer, expert)
        for dim, name in enumerate(part.axes)
        if name != "fixed"  # `donor_choice.mismatches` refuses a donor where its size differs
    }
    gather_first = all(axis.free is None for axis in axes.values())
    if gather_first:  # before the cast, and the axis that shrinks most before others: there is less to move
        for dim, axis in sorted(axes.items(), key=lambda item: len(item[1].index) / matrix.shape[item[0]]):
            matrix = _select(matrix, dim, axis.index)
    matrix = matrix.to(dtype)
    for dim, axis in axes.items():
        use = _use_of_axis(part, dim, kind)
        if not gather_first:
            mean = matrix.mean(dim, keepdim=True) if axis.free is not None else None
            matrix = _select(matrix, dim, axis.index)
            if axis.free is not None and mean is not None:
                matrix = torch.where(_broadcast_along(axis.free, matrix, dim), mean, matrix)
        if use == "read":
            matrix = _multiply(matrix, axis.read_scale, dim)
            matrix = matrix if axis.free is None else _draw_free_columns(matrix, axis.free, generator)
        elif use in ("write", "shift"):
            matrix = _multiply(matrix, axis.write_scale, dim)
            if use == "shift" and axis.free is not None:
                matrix = matrix.masked_fill(axis.free.to(matrix.device), 0.0)
        elif use == "gain" and part.axes[dim] != "residual":  # the gain undoes a scale that was written for the norm
            matrix = matrix / _broadcast_along(axis.write_scale, matrix, dim)
    scale = maps.embed_scale if part.role == "embed" and part.axes[0] == "vocab" else 1.0
    return _multiply(matrix, scale, 0)


def _select(matrix: Tensor, dim: int, index: Tensor) -> Tensor:
    """`matrix.index_select(dim, index)`; the matrix itself where the index keeps everything in its place."""
    size = matrix.shape[dim]
    keeps = len(index) == size and bool((index == torch.arange(size, device=index.device)).all())
    return matrix if keeps else matrix.index_select(dim, index.to(matrix.device))


def _multiply(matrix: Tensor, scale: Tensor | float, dim: int) -> Tensor:
    """The matrix times a scale along `dim`; the matrix itself where that is 1 everywhere."""
    is_one = bool((scale == 1).all()) if isinstance(scale, Tensor) else scale == 1
    return matrix if is_one else matrix * _broadcast_along(scale, matrix, dim)


def _use_of_axis(part: Part, dim: int, kind: str) -> str:
    """What a part does with the space of one of its axes. Queries and keys count as writers: a norm may follow them."""
    if part.role == "norm":
        return "gain" if kind == "weight" else "shift"
    if part.role == "embed" or dim == 0:
        writes = part.role in ("attn.q", "attn.k") or part.axes[dim] == "residual"
        return "write" if writes else "copy"
    return "read"


def _broadcast_along(values: Tensor | float, matrix: Tensor, dim: int) -> Tensor:
    """[n] or a number, shaped to multiply `matrix` along `dim`: a mask as bool, anything else in the matrix's dtype."""
    if not isinstance(values, Tensor) or values.ndim == 0:
        return torch.as_tensor(values, dtype=matrix.dtype)
    values = values.to(matrix.device, torch.bool if values.dtype == torch.bool else matrix.dtype)
    return values.view(-1, *[1] * (matrix.ndim - 1 - dim))


def _draw_free_columns(matrix: Tensor, free: Tensor, generator: torch.Generator | None) -> Tensor:
    """The matrix with its free columns drawn from a normal with the standard deviation of the others."""
    place = matrix.device if generator is None else generator.device
    draws = torch.randn(len(matrix), int(free.sum()), generator=generator, device=place).to(matrix)
    free, matrix = free.to(matrix.device), matrix.clone()
    matrix[:, free] = matrix[:, ~free].std() * draws
    return matrix
