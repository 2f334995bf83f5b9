"""Stacking repeats its donor's blocks, and with `exact` computes its function."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from baselines.transfer.growth.stacking import Stacking
from tests.support.grown import CONFIGS, grown, largest_logit_change, logit_tolerance, random_model, resized
from zoo.donors.memory import zoo_of
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint

SHALLOW = "llama-gqa-tied"


@pytest.mark.parametrize(
    ("order", "layers", "expected"),
    [
        ("stack", 4, [0, 1, 0, 1]),
        ("stack", 5, [0, 1, 0, 1, 0]),
        ("interleave", 4, [0, 0, 1, 1]),
        ("interleave", 5, [0, 0, 0, 1, 1]),
        ("stack", 2, [0, 1]),
    ],
)
@pytest.mark.parametrize("keep", [False, True])
def test_blocks_are_the_donors_whole(order: str, layers: int, expected: list[int], keep: bool) -> None:
    donor = random_model(CONFIGS[SHALLOW])
    got = grown(Stacking(order=order, exact=keep), donor, resized(SHALLOW, num_hidden_layers=layers)).state_dict()
    w = donor.state_dict()
    for place, layer in enumerate(expected):
        for name in (n for n in w if n.startswith(f"model.layers.{layer}.")):
            copy = got[name.replace(f"layers.{layer}.", f"layers.{place}.")]
            silent = keep and layer in expected[:place] and name.endswith(("o_proj.weight", "down_proj.weight"))
            assert torch.equal(copy, torch.zeros_like(copy) if silent else w[name]), name
    assert torch.equal(got["model.embed_tokens.weight"], w["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("name", "order"),
    [(name, "stack") for name in ("llama-mqa-biased", "gemma3", "olmo2", "gpt2", "gpt_neox")]
    + [(name, "interleave") for name in ("qwen3", "gemma3", "opt")],
)
def test_exact_copies_keep_the_function(name: str, order: str) -> None:
    config = resized(name, num_hidden_layers=5)
    donor = random_model(CONFIGS[name])
    assert largest_logit_change(Stacking(order=order, exact=True), donor, config) < logit_tolerance(name)


def test_silent_copies_learn() -> None:
    tokens = torch.arange(28).view(2, 14) * 11 % 40
    model = grown(Stacking(exact=True), random_model(CONFIGS[SHALLOW]), resized(SHALLOW, num_hidden_layers=4))
    model(tokens, labels=tokens).loss.backward()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert model.get_parameter(f"model.layers.3.{name}.weight").grad.norm() > 1e-3


def test_kinds_of_layers_stay_in_their_places(caplog: pytest.LogCaptureFixture) -> None:
    """Gemma 2's layers alternate between sliding and full attention, which interleaving would mix up."""
    donor = random_model(CONFIGS["gemma2"])
    config = resized("gemma2", num_hidden_layers=4)
    assert largest_logit_change(Stacking(exact=True), donor, config) < logit_tolerance("gemma2")
    zoo, blueprint = zoo_of({"donor": donor}), Blueprint.from_config(config)
    with pytest.raises(UserError, match=r"layer 1 \(full_attention\) .* layer 2 \(sliding.*try order=stack"):
        Stacking(order="interleave", exact=True).fit(zoo, blueprint)
    caplog.set_level(logging.INFO)
    Stacking(order="interleave").fit(zoo, blueprint)
    assert "4 layers where the donor has 2 (exact=true keeps it)" in caplog.text
    assert "layer 1 (full_attention) would be the target's layer 2" in caplog.text


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (
            {"hidden_size": 64},
            "width 32 is not the target's 64.*: stacking only changes the depth; use net2wider",
        ),
        ({"intermediate_size": 40}, "ffn 48 is not the target's 40"),
        ({"num_attention_heads": 8}, "heads per KV head 2 is not the target's 4"),
        ({"num_hidden_layers": 1}, "layers 2 would shrink to 1: for a smaller one use"),
    ],
)
def test_any_other_difference_is_refused(sizes: dict[str, int], reason: str) -> None:
    zoo = zoo_of({"donor": random_model(CONFIGS[SHALLOW])})
    blueprint = Blueprint.from_config(resized(SHALLOW, **{"num_hidden_layers": 4, **sizes}))
    for act in (Stacking().fit, Stacking().planned_donors):
        with pytest.raises(UserError, match=reason):
            act(zoo, blueprint)


@pytest.mark.parametrize("name", ["stories260K", "makemore-en-a"])
def test_real_checkpoints(shared_data: Path, name: str) -> None:
    donor = AutoModelForCausalLM.from_pretrained(shared_data / "models" / name).eval()
    config = donor.config.to_dict()
    key = "n_layer" if name == "makemore-en-a" else "num_hidden_layers"
    deeper = config | {key: config[key] + 3}
    assert largest_logit_change(Stacking(exact=True), donor, deeper) < 1e-4
    assert largest_logit_change(Stacking(), donor, deeper) > 0.1
