"""Growth of heads under ALiBi, where each head has a slope that depends on its place and on the number of heads.

A head of the donor goes to the head of the target with its slope. The other heads of the target have slopes that no
head of the donor has: they copy a head too, and write nothing at first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from baselines.transfer.index_maps import AxisMap
from baselines.transfer.index_rules import head_maps
from baselines.transfer.sizes import changes_alibi_heads
from zoo.tensors import Metadata


def alibi_slopes(architecture: str, heads: int) -> Tensor:
    """[heads] float64: the slope of each head (2108.12409), as transformers computes it for an architecture."""
    if architecture == "mpt":
        power = 2 ** math.ceil(math.log2(heads))
        slopes = _geometric_slopes(power)
        return slopes if power == heads else torch.cat([slopes[1::2], slopes[::2]])[:heads]
    power = 2 ** math.floor(math.log2(heads))
    return torch.cat([_geometric_slopes(power), _geometric_slopes(2 * power)[::2]])[:heads]


def _geometric_slopes(count: int) -> Tensor:
    return 2.0 ** (-8.0 / count * torch.arange(1, count + 1, dtype=torch.float64))


def alibi_mismatch(source: Metadata, target: Metadata) -> str | None:
    """Why the heads of a donor with ALiBi cannot keep their slopes in a target, or None.

    More heads always have the slopes of fewer, but not in the same groups of query heads that share keys.
    """
    one_group = source.kv_heads == target.kv_heads == 1
    own_keys = source.kv_heads == source.heads and target.kv_heads == target.heads
    if not changes_alibi_heads(source, target) or one_group or own_keys:
        return None
    return f"query heads of different ALiBi slopes share keys: keep its {source.heads} heads"


def alibi_head_maps(source: Metadata, target: Metadata) -> tuple[AxisMap, AxisMap]:
    """The maps (heads, kv_heads) of each layer. `alibi_mismatch` says where there are none."""
    found = _heads_by_slope(source, target)
    copied = torch.where(found >= 0, found, torch.arange(len(found)) % source.heads)
    if target.kv_heads == 1:
        groups, queries = torch.zeros(1, dtype=torch.int64), copied[None]
    else:
        groups, queries = copied, torch.zeros(len(copied), 1, dtype=torch.int64)
    heads, kv_heads = head_maps(source, groups, queries, torch.arange(source.head_dim))
    writes = (found >= 0).double().repeat_interleave(source.head_dim)
    return AxisMap(heads.index, writes), kv_heads


def _heads_by_slope(source: Metadata, target: Metadata) -> Tensor:
    """[heads of the target] int64: the donor's head of the same slope, -1 where there is none."""
    before, after = (alibi_slopes(side.architecture, side.heads) for side in (source, target))
    same = (after[:, None] / before - 1).abs() < 1e-9
    return torch.where(same.any(1), same.int().argmax(1), -1)
