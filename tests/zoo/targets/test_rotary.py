"""The coordinates that a rotary embedding turns in pairs, and heads of a smaller dimension."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from baselines.transfer.weight_selection import WeightSelection
from benchmarks.architectures.checks import TOLERANCE, random_donor
from benchmarks.architectures.rotary import largest_change, rotary_pairs
from benchmarks.architectures.tiny_configs import tiny_config
from benchmarks.architectures.walk import build_model
from zoo.donors.zoo import open_standalone
from zoo.errors import UserError
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint
from zoo.targets.configs import NEIGHBOUR_PAIRS
from zoo.tensors import Rotary

HALVES = ("llama", "phi", "gpt_neox", "gemma3_text", "gpt_oss")
CHANGES: dict[str, dict[str, Any]] = {"gptj": {"rotary_dim": 4}, "codegen": {"rotary_dim": 4}}


def tiny(name: str, **changes: Any) -> Any:
    config = tiny_config(name)
    for key, value in {**CHANGES.get(name, {}), **changes}.items():
        setattr(config, key, value)
    return config


@pytest.mark.parametrize("name", [*HALVES, *NEIGHBOUR_PAIRS])
def test_the_pairs_are_those_that_the_model_turns(name: str) -> None:
    model = build_model("causal", tiny(name))
    outcome = rotary_pairs(model)
    assert outcome.ok and outcome.text == ("neighbours" if name in NEIGHBOUR_PAIRS else "halves")
    metadata = Blueprint.from_module(model).metadata
    assert metadata is not None
    if metadata.rotary.size > 2:  # a single pair is a half and a neighbour
        wrong = largest_change(model, Rotary(metadata.rotary.size, not metadata.rotary.neighbours))
        assert wrong is not None and wrong > 10 * TOLERANCE


@pytest.mark.parametrize(("name", "kept"), [("helium", [0, 1, 4, 5]), ("llama", [0, 2, 4, 6])])
def test_a_smaller_head_keeps_every_second_pair(tmp_path: Path, name: str, kept: list[int]) -> None:
    model = build_model("causal", tiny(name, head_dim=8))
    donor = open_standalone(random_donor(tmp_path / "donor", model))
    config = tiny(name, head_dim=4, hidden_size=16).to_dict() | {"model_type": name}
    sampler: Sampler = WeightSelection().fit(donor, Blueprint.from_config(config))
    written = dict(sampler.sample(Blueprint.from_config(config), 0))
    for role in ("q_proj", "k_proj"):
        tensor = f"model.layers.0.self_attn.{role}.weight"
        before, after = model.state_dict()[tensor].unflatten(0, (-1, 8)), written[tensor].unflatten(0, (-1, 4))
        assert torch.equal(after, before[:, kept, ::2])


def test_pairs_move_to_where_the_target_has_them(tmp_path: Path) -> None:
    """A Llama into a Helium of the same shape: the tensors have the same names, the heads another order."""
    model = build_model("causal", tiny("llama", head_dim=8))
    donor = open_standalone(random_donor(tmp_path / "donor", model))
    config = tiny("helium", head_dim=8, rms_norm_eps=model.config.rms_norm_eps)
    config.rope_parameters = model.config.rope_parameters
    target = build_model("causal", config).eval()
    blueprint = Blueprint.from_config(config.to_dict() | {"model_type": "helium"})
    written = dict(WeightSelection().fit(donor, blueprint).sample(blueprint, 0))
    missing = target.load_state_dict(written, strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        expected, got = model.eval()(input_ids=ids).logits, target(input_ids=ids).logits
    assert (got - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 1, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}},
         "turn 4 of the 8 coordinates of a head, those of the target 8 of the 8"),
        ({"hidden_size": 64}, "head_dim 8 must be a whole multiple of the target's 16"),
    ],
)  # fmt: skip
def test_another_share_of_the_head_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    donor = open_standalone(random_donor(tmp_path / "donor", build_model("causal", tiny("phi"))))
    config = tiny("phi").to_dict() | {"model_type": "phi"} | changes
    with pytest.raises(UserError, match=reason):
        WeightSelection().fit(donor, Blueprint.from_config(config))


def test_layers_that_turn_different_shares_keep_their_heads(tmp_path: Path) -> None:
    """Laguna turns half of a head in some layers and all of it in others."""
    model = build_model("causal", tiny("laguna", head_dim=8))
    donor = open_standalone(random_donor(tmp_path / "donor", model))
    config = tiny("laguna", head_dim=4).to_dict() | {"model_type": "laguna"}
    with pytest.raises(UserError, match="the rotary positions of its layers differ, so head_dim 8 cannot change"):
        WeightSelection().fit(donor, Blueprint.from_config(config))
