"""The rules that all methods with index maps share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baselines.index_maps import (
    even_layers,
    head_axes,
    multiplicity,
    past_the_end,
    random_subset,
    rope_pairs,
    rows_by_token,
    spread_queries,
    uniform,
)
from zoo.errors import UserError
from zoo.streams import stream
from zoo.tensors import Metadata


def published_rule(t: int, s: int) -> list[int]:
    """The rule as the paper states it, in numpy: every (t / s)-th, or evenly spaced and rounded."""
    if t % s == 0:
        return [i * (t // s) for i in range(s)]
    return np.round(np.linspace(0, t - 1, s)).astype(int).tolist()


@pytest.mark.parametrize(("t", "s"), [(8, 4), (768, 192), (384, 192), (172, 80), (12, 5), (7, 7), (5, 1)])
def test_uniform_is_the_published_rule(t: int, s: int) -> None:
    assert uniform(t, s).tolist() == published_rule(t, s)


@pytest.mark.parametrize(("t", "s"), [(4, 6), (5, 8), (64, 96)])
def test_growing_uses_every_coordinate_evenly(t: int, s: int) -> None:
    for index in (uniform(t, s), random_subset(t, s, stream(0, "a"))):
        counts = torch.bincount(index, minlength=t)
        assert counts.min() == s // t and counts.max() == -(-s // t)
        assert torch.allclose((1 / multiplicity(index)).sum(), torch.tensor(float(t), dtype=torch.double))


def test_rotary_pairs_keep_the_frequencies_of_the_target() -> None:
    t, s, base = 128, 32, 10000.0
    kept = rope_pairs(t, s, rotary=t)
    assert torch.equal(kept[s // 2 :], kept[: s // 2] + t // 2)  # i and i + half stay a pair
    donor = base ** (-2 * torch.arange(t // 2).double() / t)
    target = base ** (-2 * torch.arange(s // 2).double() / s)
    assert torch.allclose(donor[kept[: s // 2]], target, rtol=1e-12)


def test_partly_rotated_heads_keep_pairs_and_rest() -> None:
    kept = rope_pairs(16, 8, rotary=8)
    assert kept.tolist() == [0, 2, 4, 6, 8, 10, 12, 14]  # {0, 2 | 4, 6} rotated, the rest not


@pytest.mark.parametrize(("t", "s"), [(8, 16), (12, 8), (6, 3)])
def test_heads_that_do_not_shrink_by_a_whole_stride_are_refused(t: int, s: int) -> None:
    with pytest.raises(UserError, match=f"head_dim {t} does not shrink to {s}"):
        rope_pairs(t, s, rotary=t)


def test_copies_of_a_group_share_its_query_heads() -> None:
    # 2 groups of 4 queries -> 4 groups of 2: every query head stays, once, with a copy of its own KV head.
    queries = spread_queries(torch.tensor([0, 0, 1, 1]), 4, 2)
    assert queries.tolist() == [[0, 1], [2, 3], [0, 1], [2, 3]]
    # twice the query heads in each group: every one twice
    assert spread_queries(torch.tensor([0, 1]), 2, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    # fewer: the published rule
    assert spread_queries(torch.tensor([0]), 8, 4).tolist() == [[0, 2, 4, 6]]


def test_flattened_heads_are_whole_heads_of_the_same_group() -> None:
    donor = Metadata("llama", 1, 32, heads=8, kv_heads=4, head_dim=4, ffn=8, vocab=8)
    groups = torch.tensor([1, 3])
    heads, kv = head_axes(donor, groups, spread_queries(groups, 2, 2), torch.arange(4))
    assert kv.index.tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    assert heads.index.view(4, 4)[:, 0].tolist() == [8, 12, 24, 28]  # heads 2, 3 and 6, 7


def test_layers_keep_both_ends_and_repeat_in_place() -> None:
    assert even_layers(12, 4) == (0, 4, 7, 11)
    assert even_layers(3, 6) == (0, 0, 1, 1, 2, 2)
    assert even_layers(5, 1) == (0,)


def test_rows_are_matched_by_token_string() -> None:
    donor, target = {"a": 0, "b": 1, "c": 2}, {"c": 0, "x": 1, "a": 2, "y": 3}
    index = rows_by_token(donor, target, rows=3, wanted=5)
    assert index.tolist() == [2, -1, 0, -1, -1]
    assert past_the_end(index, 3).tolist() == [2, 3, 0, 4, 5]
