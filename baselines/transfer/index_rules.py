"""Rules that choose, for each coordinate of a target, the coordinate of the donor that it copies.

n_source is the donor's size of an axis, n_target the target's. An index is int64 [n_target].
"""

from __future__ import annotations

import torch
from torch import Tensor

from baselines.transfer.index_maps import AxisMap
from zoo.errors import UserError
from zoo.tensors import Metadata, Rotary


def uniform_index(n_source: int, n_target: int) -> Tensor:
    """Every (n_source / n_target)-th coordinate, or evenly spaced and rounded ones if the ratio is not a whole number.

    A larger target repeats coordinates evenly: floor(i n_source / n_target). (2311.18823, OscarXZQ/weight-selection)
    """
    if n_target > n_source:
        return torch.arange(n_target) * n_source // n_target
    if n_source % n_target == 0:
        return torch.arange(n_target) * (n_source // n_target)
    return torch.linspace(0, n_source - 1, n_target).round().long()


def leading_index(n_source: int, n_target: int) -> Tensor:
    """The first coordinates, starting again where the target is larger."""
    return torch.arange(n_target) % n_source


def random_index(n_source: int, n_target: int, generator: torch.Generator) -> Tensor:
    """Random coordinates without repetition, sorted. A larger target has every one floor(n_target / n_source) times."""
    repeats = torch.arange(n_source).repeat(n_target // n_source)
    return torch.cat([repeats, torch.randperm(n_source, generator=generator)[: n_target % n_source]]).sort().values


def growth_index(n_source: int, n_target: int, generator: torch.Generator) -> Tensor:
    """Every coordinate in its place, then random copies, none twice before all were drawn once.

    Net2Net draws copies with repetition. Without it the numbers of copies differ by one at most.
    """
    rounds = [torch.randperm(n_source, generator=generator) for _ in range(-(-n_target // n_source) - 1)]
    return torch.cat([torch.arange(n_source), *rounds])[:n_target]


def read_shares(index: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """[n_target] float64: what readers multiply each copy by; the copies of a coordinate sum to one.

    Shares are equal, or with a generator in proportion to draws from [0.5, 1.5], so that copies receive different
    gradients (LEMON, 2310.07999).
    """
    if generator is None:
        return 1 / multiplicity(index)
    draws = 0.5 + torch.rand(len(index), generator=generator, dtype=torch.float64)
    return draws / torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add(0, index, draws)[index]


def copy_numbers(index: Tensor) -> Tensor:
    """[n_target] int64: how many earlier places hold the same coordinate; 0 for the first of its copies."""
    order = index.argsort(stable=True)
    counts = torch.bincount(index)
    rank = torch.empty_like(index)
    rank[order] = torch.arange(len(index)) - (counts.cumsum(0) - counts)[index[order]]
    return rank


def multiplicity(index: Tensor) -> Tensor:
    """[n_target] float64: how often the coordinate at each place occurs in the index."""
    return torch.bincount(index)[index].double()


def even_layers(n_source: int, n_target: int) -> tuple[int, ...]:
    """The donor's layer for each layer of the target: evenly spaced, with the first and the last.

    A deeper target repeats each layer in place.
    """
    if n_target > n_source:
        return tuple(int(i) * n_source // n_target for i in range(n_target))
    return tuple(torch.linspace(0, n_source - 1, n_target).round().long().tolist())


def repeated_layer_list(n_source: int, n_target: int) -> tuple[int, ...]:
    """The donor's layer for each layer of the target: the whole list of layers again and again."""
    return tuple(i % n_source for i in range(n_target))


def rope_index(n_source: int, n_target: int, source: Rotary, target: Rotary) -> Tensor:
    """The coordinates of a head that a head of smaller dimension keeps: every (n_source / n_target)-th pair of the
    rotated ones, so that the pairs turn at the frequencies of the target, and every such coordinate of the others.

    Pairs go to where the target has its pairs. Raises UserError if the stride is not a whole number, does not divide
    the pairs, or gives another number of rotated coordinates than the target has.
    """
    if (n_source, source) == (n_target, target):
        return torch.arange(n_target)
    stride, rest = divmod(n_source, n_target)
    if rest or source.size > n_source or source.size % (2 * stride) or source.size != stride * target.size:
        raise UserError(f"head_dim {n_source} does not shrink to {n_target} by a whole stride")
    index = torch.arange(n_target) * stride
    index[target.planes()] = source.planes()[:, ::stride]
    return index


def spread_query_heads(groups: Tensor, n_source: int, n_target: int) -> Tensor:
    """[K, n_target] int64: the query head, within its KV group, that each query head of the target copies.

    groups [K]: the donor's KV group for each group of the target. n_source, n_target: query heads per group. The copies
    of a group share out its query heads, so that none is lost or repeated where there is room for all.
    """
    queries = torch.empty(len(groups), n_target, dtype=torch.long)
    for group in groups.unique():
        places = (groups == group).nonzero().flatten()
        queries[places] = uniform_index(n_source, len(places) * n_target).view(len(places), n_target)
    return queries


def head_maps(donor: Metadata, groups: Tensor, queries: Tensor, head_dim: Tensor) -> tuple[AxisMap, AxisMap]:
    """The maps (heads, kv_heads) of one layer over flattened heads, unscaled.

    groups [K]: KV groups of the donor; queries [K, G]: query heads within their group; head_dim [h]: coordinates.
    """
    per_group = donor.heads // donor.kv_heads
    heads = (groups[:, None] * per_group + queries).flatten()
    flat_heads = flatten_head_index(heads, donor.head_dim, head_dim)
    return AxisMap(flat_heads), AxisMap(flatten_head_index(groups, donor.head_dim, head_dim))


def flatten_head_index(heads: Tensor, donor_head_dim: int, head_dim: Tensor) -> Tensor:
    """Heads [H] and coordinates within a head [h] -> rows [H * h]."""
    return (heads[:, None] * donor_head_dim + head_dim).flatten()


def number_new_rows(index: Tensor, rows: int) -> Tensor:
    """Replaces -1 by rows, rows + 1, …: where the rows that the donor does not have are appended to its own."""
    missing = index < 0
    index = index.clone()
    index[missing] = rows + torch.arange(int(missing.sum()))
    return index
