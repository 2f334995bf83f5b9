"""Distances that symmetries do not change, and overlaps of errors against what independence gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.novelty.distance import (
    distance,
    distance_to_all_donors,
    donor_frame,
    error_overlap,
    leave_one_out,
    nearest_donor_distance,
    predictions,
)
from tests.support.tiny import config
from zoo.donors.donor import Donor
from zoo.donors.memory import zoo_of
from zoo.units.aligned import read_donor_decoder, token_strings


def model(seed: int, **shape: int) -> LlamaForCausalLM:
    """Random, with neurons and vocabulary rows of very different energy, as trained ones have."""
    torch.manual_seed(seed)
    made = LlamaForCausalLM(config(**shape))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.ndim == 2:
                p.normal_(0, 0.3).mul_(torch.rand(p.shape[0], 1) + 0.1).mul_(torch.rand(1, p.shape[1]) + 0.1)
            elif "norm" in name:
                p.uniform_(0.5, 1.5)
    return made


def donor(name: str, module: torch.nn.Module) -> Donor:
    return zoo_of({name: module}).donors[0]


def scrambled(original: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same function in other coordinates: residual basis (signed permutation, gains along), neurons in another
    order with scales and signs, and a value-output component of each KV head with its sign turned."""
    made = LlamaForCausalLM(original.config)
    made.load_state_dict(original.state_dict())
    torch.manual_seed(99)
    width, ffn = original.config.hidden_size, original.config.intermediate_size
    order, sign = torch.randperm(width), torch.randint(0, 2, (width,)) * 2.0 - 1
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "norm" in name:
                p.copy_(p[order])
            elif "o_proj" in name or "down_proj" in name:
                p.copy_(p[order] * sign[:, None])
            else:
                p.copy_(p[:, order] * sign)
        for layer in made.model.layers:
            neurons, scale = torch.randperm(ffn), torch.rand(ffn) + 0.5
            scale[::2] *= -1
            layer.mlp.gate_proj.weight.copy_(layer.mlp.gate_proj.weight[neurons])
            layer.mlp.up_proj.weight.copy_(layer.mlp.up_proj.weight[neurons] * scale[:, None])
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, neurons] / scale)
    return made


def test_the_same_function_in_other_coordinates_is_a_copy() -> None:
    original = model(0)
    other = scrambled(original)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(other(ids).logits, original(ids).logits, atol=1e-4, rtol=1e-4)
    to = donor_frame(donor("original", original))
    again = donor("again", other)
    stored = original.model.layers[0].mlp.up_proj.weight
    moved = other.model.layers[0].mlp.up_proj.weight
    assert (moved - stored).norm() > stored.norm(), "as stored they have nothing in common"
    found = distance(read_donor_decoder(again), token_strings(again), to)
    assert found.total < 2e-3 and set(found.kinds) == {"vocab", "neuron", "qk", "vo"}


def test_distance_grows_with_noise_and_another_model_is_far() -> None:
    original = model(0)
    to = donor_frame(donor("original", original))
    for noise in (0.05, 0.2):
        noisy = model(0)
        with torch.no_grad():
            for p in noisy.parameters():
                if p.ndim == 2:
                    p.add_(torch.randn_like(p) * p.std() * noise)
        made = donor("noisy", noisy)
        found = distance(read_donor_decoder(made), token_strings(made), to)
        assert 0.6 * noise < found.kinds["neuron"] < 1.8 * noise, "some of it goes into the alignment"
    far = donor("far", model(1))
    assert distance(read_donor_decoder(far), token_strings(far), to).total > 0.6


def test_distance_ignores_the_scale_of_units() -> None:
    """A copy whose queries and keys are a tenth, which no symmetry undoes."""
    to = donor_frame(donor("original", model(0)))
    small = model(0)
    with torch.no_grad():
        for layer in small.model.layers:
            layer.self_attn.q_proj.weight.mul_(0.1)
            layer.self_attn.k_proj.weight.mul_(0.1)
    made = donor("small", small)
    found = distance(read_donor_decoder(made), token_strings(made), to)
    assert found.sizes["qk"] == pytest.approx(0.1, rel=1e-3) and found.kinds["qk"] < 2e-3
    same = donor("same", model(0))
    sizes = distance(read_donor_decoder(same), token_strings(same), to).sizes
    assert list(sizes.values()) == pytest.approx([1.0] * 4, abs=1e-4)


def test_a_model_that_is_part_of_a_donor_is_near_it() -> None:
    large = model(0, layers=2)
    part = LlamaForCausalLM(config(layers=1))
    part.load_state_dict({k: v for k, v in large.state_dict().items() if ".layers.1." not in k})
    others = [donor_frame(donor("other", model(1))), donor_frame(donor("large", large))]
    made = donor("part", part)
    found = nearest_donor_distance(read_donor_decoder(made), token_strings(made), others)
    assert found.donor == "large" and found.total < 1e-2


def test_leave_one_out_gives_the_distance_to_the_nearest_other_donor() -> None:
    donors = [donor("a", model(0)), donor("b", scrambled(model(0))), donor("c", model(2))]
    apart = leave_one_out(donors, [donor_frame(d) for d in donors])
    (near, _), (far, together) = apart["a"], apart["c"]
    assert near.donor == "b" and near.total < 2e-3
    assert far.total > 0.5 and 0.4 < together <= far.total


def test_copies_put_together_from_two_donors_are_far_from_each_and_near_to_both() -> None:
    """One layer of each of two models that have the vocabulary in common."""
    one, other = model(0, layers=2), model(1, layers=2)
    other.model.embed_tokens.load_state_dict(one.model.embed_tokens.state_dict())
    other.model.norm.load_state_dict(one.model.norm.state_dict())
    other.lm_head.load_state_dict(one.lm_head.state_dict())
    pieced = model(0, layers=2)
    pieced.model.layers[1].load_state_dict(other.model.layers[1].state_dict())
    frames = [donor_frame(donor("one", one)), donor_frame(donor("other", other))]
    made = donor("pieced", pieced)
    assert nearest_donor_distance(read_donor_decoder(made), token_strings(made), frames).total > 0.2
    assert distance_to_all_donors(read_donor_decoder(made), token_strings(made), frames) < 1e-2
    far = donor("far", model(2, layers=2))
    assert distance_to_all_donors(read_donor_decoder(far), token_strings(far), frames) > 0.4


def test_overlap_of_errors() -> None:
    truth = torch.zeros(8, dtype=torch.int64)
    one = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    other = torch.tensor([0, 0, 1, 1, 1, 2, 0, 0])
    found = error_overlap(one, other, truth)
    assert found["iou"] == pytest.approx(2 / 6) and found["same"] == pytest.approx(1 / 2)
    assert found["expected"] == pytest.approx(0.25 / 0.75)
    assert error_overlap(truth, truth, truth) == {"iou": 1.0, "expected": 1.0, "same": 0.0}


def test_independent_errors_overlap_as_expected() -> None:
    draw = torch.Generator().manual_seed(0)
    truth = torch.zeros(200_000, dtype=torch.int64)
    one, other = ((torch.rand(len(truth), generator=draw) < p).long() for p in (0.3, 0.6))
    found = error_overlap(one, other, truth)
    assert found["iou"] == pytest.approx(found["expected"], abs=0.005)


def test_predictions_are_of_the_next_token(tmp_path: Path) -> None:
    made = model(0)
    tokens = torch.randint(0, 48, (500,), generator=torch.Generator().manual_seed(0))
    guessed, truth = predictions(made, tokens, sequence=16, limit=4)
    assert guessed.shape == truth.shape == (64,)
    assert torch.equal(truth[:16], tokens[1:17])
    assert guessed[3] == made(tokens[:4][None]).logits[0, -1].argmax()
