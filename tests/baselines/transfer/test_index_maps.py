"""The rules that all methods with index maps share."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from baselines.transfer.index_maps import AxisMap, IndexMaps, map_part
from baselines.transfer.index_rules import (
    copy_numbers,
    even_layers,
    growth_index,
    head_maps,
    multiplicity,
    number_new_rows,
    random_index,
    read_shares,
    rope_index,
    spread_query_heads,
    uniform_index,
)
from zoo.errors import UserError
from zoo.streams import stream
from zoo.tensors import Metadata, Part, Rotary
from zoo.vocabulary import rows_by_token


def published_rule(t: int, s: int) -> list[int]:
    """The rule as the paper states it, in numpy: every (t / s)-th, or evenly spaced and rounded."""
    if t % s == 0:
        return [i * (t // s) for i in range(s)]
    return np.round(np.linspace(0, t - 1, s)).astype(int).tolist()


@pytest.mark.parametrize(("t", "s"), [(8, 4), (768, 192), (384, 192), (172, 80), (12, 5), (7, 7), (5, 1)])
def test_uniform_is_the_published_rule(t: int, s: int) -> None:
    assert uniform_index(t, s).tolist() == published_rule(t, s)


def test_uniform_for_every_pair_of_sizes() -> None:
    """Against exact fractions: the nearest coordinate to i (t - 1) / (s - 1), either of the two at a tie."""
    for t in range(2, 60):
        for s in range(2, t + 1):
            index = uniform_index(t, s).tolist()
            if t % s == 0:
                assert index == list(range(0, t, t // s))
                continue
            assert index[0] == 0 and index[-1] == t - 1 and len(set(index)) == s
            assert all(abs(k - Fraction(i * (t - 1), s - 1)) <= Fraction(1, 2) for i, k in enumerate(index)), (t, s)


@pytest.mark.parametrize(("t", "s"), [(4, 6), (5, 8), (64, 96)])
def test_growing_uses_every_coordinate_evenly(t: int, s: int) -> None:
    for index in (uniform_index(t, s), random_index(t, s, stream(0, "a"))):
        counts = torch.bincount(index, minlength=t)
        assert counts.min() == s // t and counts.max() == -(-s // t)
        assert torch.allclose((1 / multiplicity(index)).sum(), torch.tensor(float(t), dtype=torch.double))


def test_rotary_pairs_keep_the_frequencies_of_the_target() -> None:
    t, s, base = 128, 32, 10000.0
    kept = rope_index(t, s, Rotary(t), Rotary(s))
    assert torch.equal(kept[s // 2 :], kept[: s // 2] + t // 2)  # i and i + half stay a pair
    donor = base ** (-2 * torch.arange(t // 2).double() / t)
    target = base ** (-2 * torch.arange(s // 2).double() / s)
    assert torch.allclose(donor[kept[: s // 2]], target, rtol=1e-12)


@pytest.mark.parametrize(("t", "s", "rotated"), [(64, 16, 1.0), (48, 16, 1.0), (64, 32, 0.25)])
def test_kept_pairs_turn_as_the_targets_do_in_transformers(t: int, s: int, rotated: float) -> None:
    """The frequencies of a Llama (or, partly rotated, a Pythia) with each dimension of a head."""

    def frequencies(head_dim: int) -> torch.Tensor:
        sizes = dict(hidden_size=4 * head_dim, num_attention_heads=4, intermediate_size=8, num_hidden_layers=1)
        if rotated == 1.0:
            return LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).model.rotary_emb.inv_freq
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotated}
        config = GPTNeoXConfig(vocab_size=8, rope_parameters=rope, **sizes)
        return GPTNeoXForCausalLM(config).gpt_neox.rotary_emb.inv_freq

    donor, target = frequencies(t), frequencies(s)
    kept = rope_index(t, s, Rotary(int(rotated * t)), Rotary(int(rotated * s)))
    half = len(target)
    assert len(donor) == int(rotated * t) // 2 and half == int(rotated * s) // 2
    torch.testing.assert_close(donor[kept[:half]], target)
    assert torch.equal(kept[half : 2 * half], kept[:half] + len(donor))  # the partner of i is i + half


def test_partly_rotated_heads_keep_pairs_and_rest() -> None:
    kept = rope_index(16, 8, Rotary(8), Rotary(4))
    assert kept.tolist() == [0, 2, 4, 6, 8, 10, 12, 14]  # {0, 2 | 4, 6} rotated, the rest not


def test_pairs_of_neighbours_stay_neighbours() -> None:
    assert rope_index(16, 8, Rotary(8, True), Rotary(4, True)).tolist() == [0, 1, 4, 5, 8, 10, 12, 14]
    assert rope_index(8, 8, Rotary(8), Rotary(8, True)).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]  # i and i + half meet
    assert rope_index(8, 4, Rotary(8, True), Rotary(4)).tolist() == [0, 4, 1, 5]


@pytest.mark.parametrize(("t", "s"), [(8, 16), (12, 8), (6, 3)])
def test_heads_that_do_not_shrink_by_a_whole_stride_are_refused(t: int, s: int) -> None:
    with pytest.raises(UserError, match=f"head_dim {t} does not shrink to {s}"):
        rope_index(t, s, Rotary(t), Rotary(s))


def test_copies_of_a_group_share_its_query_heads() -> None:
    # 2 groups of 4 queries -> 4 groups of 2: every query head stays, once, with a copy of its own KV head.
    queries = spread_query_heads(torch.tensor([0, 0, 1, 1]), 4, 2)
    assert queries.tolist() == [[0, 1], [2, 3], [0, 1], [2, 3]]
    # twice the query heads in each group: every one twice
    assert spread_query_heads(torch.tensor([0, 1]), 2, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    # fewer: the published rule
    assert spread_query_heads(torch.tensor([0]), 8, 4).tolist() == [[0, 2, 4, 6]]


def test_flattened_heads_are_whole_heads_of_the_same_group() -> None:
    donor = Metadata("llama", 1, 32, heads=8, kv_heads=4, head_dim=4, ffn=8, vocab=8)
    groups = torch.tensor([1, 3])
    heads, kv = head_maps(donor, groups, spread_query_heads(groups, 2, 2), torch.arange(4))
    assert kv.index.tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    assert heads.index.view(4, 4)[:, 0].tolist() == [8, 12, 24, 28]  # heads 2, 3 and 6, 7


@pytest.mark.parametrize("sizes", [(4, 2, 2, 2), (4, 3, 2, 5), (2, 4, 5, 2), (3, 2, 6, 1)])
def test_query_heads_stay_with_their_key(sizes: tuple[int, int, int, int]) -> None:
    """Groups, queries per group of donor and target: no query head ever moves to another group's key."""
    t, per_group, s, wanted = sizes
    donor = Metadata("llama", 1, 32, heads=t * per_group, kv_heads=t, head_dim=4, ffn=8, vocab=8)
    groups = random_index(t, s, stream(0, "groups"))
    heads, kv = head_maps(donor, groups, spread_query_heads(groups, per_group, wanted), torch.arange(4))
    assert torch.equal(heads.index % 4, torch.arange(s * wanted * 4) % 4)
    assert torch.equal(
        heads.index.view(s, wanted, 4) // (4 * per_group), (kv.index.view(s, 1, 4) // 4).expand(-1, wanted, -1)
    )


@pytest.mark.parametrize(("t", "s"), [(4, 4), (5, 8), (5, 15), (64, 200)])
def test_growth_keeps_every_coordinate_in_place_and_copies_evenly(t: int, s: int) -> None:
    index = growth_index(t, s, stream(0, "a"))
    assert torch.equal(index[:t], torch.arange(t))
    counts = torch.bincount(index)
    assert counts.sum() == s and counts.min() == s // t and counts.max() == -(-s // t)
    for generator in (None, stream(0, "b")):
        totals = torch.zeros(t, dtype=torch.float64).index_add(0, index, read_shares(index, generator))
        assert torch.allclose(totals, torch.ones(t, dtype=torch.float64))
    drawn = read_shares(index, stream(0, "b"))
    assert drawn.min() > 0.1 and (s == t or drawn[counts[index] > 1].std() > 0.01)


def test_copies_are_counted_in_order() -> None:
    assert copy_numbers(torch.tensor([2, 0, 2, 1, 2, 0])).tolist() == [0, 0, 1, 0, 2, 1]


def test_what_reads_and_writes_a_space_is_scaled() -> None:
    """One matrix of each kind through a residual map with amplitudes, readers' scales and a free coordinate."""
    free = torch.tensor([False, False, False, True])
    write, scale = torch.tensor([2.0, 1.0, 4.0, 3.0]), torch.tensor([0.5, 1.0, 0.25, 9.0])
    residual = AxisMap(torch.tensor([0, 1, 0, 0]), scale, write, free)
    two = AxisMap(torch.arange(2))
    maps = IndexMaps((0,), residual, (two,), (two,), (two,), (), head_dim=two, vocab=two)
    matrix = torch.tensor([[1.0, 3.0], [5.0, 7.0]])

    def part(role: str, *axes: str) -> Part:
        return Part(role, axes, (0,) * len(axes))

    assert map_part(matrix, part("mlp.down", "residual", "ffn"), maps, 0).tolist() == [[2, 6], [5, 7], [4, 12], [9, 15]]
    assert map_part(matrix, part("embed", "vocab", "residual"), maps, None).tolist() == [[2, 3, 4, 6], [10, 7, 20, 18]]
    up = map_part(matrix, part("mlp.up", "ffn", "residual"), maps, 0, generator=stream(0, "a"))
    assert up[:, :3].tolist() == [[0.5, 3, 0.25], [2.5, 7, 1.25]] and up[:, 3].unique().numel() == 2
    vector = torch.tensor([1.0, 3.0])
    assert map_part(vector, part("norm", "residual"), maps, 0).tolist() == [1, 3, 1, 2]
    assert map_part(vector, part("norm", "residual"), maps, 0, kind="bias").tolist() == [2, 3, 4, 0]
    assert map_part(vector, part("mlp.down", "residual"), maps, 0, kind="bias").tolist() == [2, 3, 4, 6]
    assert map_part(vector, part("mlp.up", "ffn"), maps, 0, kind="bias").tolist() == [1, 3]


def test_layers_keep_both_ends_and_repeat_in_place() -> None:
    assert even_layers(12, 4) == (0, 4, 7, 11)
    assert even_layers(3, 6) == (0, 0, 1, 1, 2, 2)
    assert even_layers(5, 1) == (0,)


def test_rows_are_matched_by_token_string() -> None:
    donor, target = {"a": 0, "b": 1, "c": 2}, {"c": 0, "x": 1, "a": 2, "y": 3}
    index = rows_by_token(donor, target, n_source=3, n_target=5)
    assert index.tolist() == [2, -1, 0, -1, -1]
    assert number_new_rows(index, 3).tolist() == [2, 3, 0, 4, 5]
