"""Sizes that differ between layers, norms without weights, routers, infinity in a config, buffers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from baselines.schemes.default import Default
from tests.support.architectures import EXPERTS, LISTED, UNLISTED
from tests.zoo.targets.test_blueprint import real_model
from zoo.checkpoints.writer import write_checkpoint
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.targets.configs import parse_config

GEMMA4 = UNLISTED["gemma4_text"]


def test_layers_with_their_own_head_dim_have_the_roles_of_the_others() -> None:
    blueprint = Blueprint.from_config(GEMMA4)
    assert blueprint.metadata is not None
    assert blueprint.metadata.layer_sizes == {"head_dim": (8, 8, 8, 8, 8, 16)}
    assert (blueprint.metadata.head_dim, blueprint.metadata.at_layer(5).head_dim) == (8, 16)
    for layer, head_dim in ((0, 8), (5, 16)):
        shapes = {role: blueprint.find(role, layer=layer)[0][1].shape for role in ("attn.q", "attn.k", "attn.o")}
        assert shapes == {"attn.q": (4 * head_dim, 32), "attn.k": (2 * head_dim, 32), "attn.o": (32, 4 * head_dim)}
        sites = {spec.site: part.axes for spec, part in blueprint.find("norm", layer=layer)}
        assert sites["q"] == sites["k"] == ("head_dim",)


def test_numbers_that_disagree_in_one_layer_are_refused() -> None:
    config = json.loads(parse_config(GEMMA4).to_json_string())
    config["per_layer_config"]["5"]["num_key_value_heads"] = 3
    with pytest.raises(UserError, match="num_attention_heads 4 is not a multiple of num_key_value_heads 3"):
        Blueprint.from_config(config)


def test_most_models_have_one_size_for_all_layers() -> None:
    for config in (LISTED["llama"], LISTED["gemma3"], UNLISTED["olmo"]):
        metadata = Blueprint.from_config(config).metadata
        assert metadata is not None and metadata.layer_sizes == {} and metadata.at_layer(1) is metadata


@pytest.mark.parametrize("spelling", [{"__float__": "Infinity"}, math.inf])
def test_infinity_in_a_config_is_read_and_written(spelling: Any, tmp_path: Path) -> None:
    """transformers 5 writes {"__float__": "Infinity"}, earlier versions a bare Infinity."""
    config = {**UNLISTED["mamba2"], "time_step_limit": [0.0, spelling]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    blueprint = Blueprint.from_config(tmp_path)
    assert parse_config(config).time_step_limit == [0.0, math.inf]
    write_checkpoint(tmp_path / "out", blueprint, Default().sample(blueprint))
    assert parse_config(json.loads((tmp_path / "out" / "config.json").read_text())).time_step_limit == [0.0, math.inf]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert list(model.config.time_step_limit) == [0.0, math.inf]


def test_what_transformers_saves_with_infinity_is_read(tmp_path: Path) -> None:
    real_model(UNLISTED["mamba2"]).save_pretrained(tmp_path)
    assert "Infinity" in (tmp_path / "config.json").read_text()
    assert Blueprint.from_config(tmp_path).specs == Blueprint.from_config(UNLISTED["mamba2"]).specs


def test_a_size_of_infinity_is_refused() -> None:
    with pytest.raises(UserError, match="hidden_size"):
        Blueprint.from_config({**LISTED["llama"], "hidden_size": {"__float__": "Infinity"}})


def test_norms_without_weights_are_found() -> None:
    olmo = Blueprint.from_config(UNLISTED["olmo"])
    assert olmo.metadata is not None and olmo.metadata.norm == "layer" and not olmo.find("norm")
    assert [site for site in ("attn", "mlp", "final", "attn.out") if olmo.has_norm(site)] == ["attn", "mlp", "final"]
    llama = Blueprint.from_config(LISTED["llama"])
    assert llama.has_norm("final") and not llama.has_norm("attn.out")
    assert llama.metadata is not None and "bare_norms" not in llama.metadata.extra
    bare_opt = Blueprint.from_config({**LISTED["opt"], "layer_norm_elementwise_affine": False})
    assert bare_opt.metadata is not None and bare_opt.metadata.norm == "layer" and bare_opt.has_norm("attn")


@pytest.mark.parametrize("name", EXPERTS)
def test_routers_and_shared_experts_have_axes(name: str) -> None:
    blueprint = Blueprint.from_config(EXPERTS[name])
    meta = blueprint.metadata
    assert meta is not None and not [s.name for s in blueprint.specs if "other" in s.parts[0].axes]
    routers = [part for spec in blueprint.specs for part in spec.parts if part.axes[0] == "experts"]
    assert {part.shape for part in routers if len(part.shape) == 2} == {(4, 32)}
    shared = {part.shape for spec in blueprint.specs for part in spec.parts if part.axes[0] == "shared_ffn"}
    sizes = {"qwen2_moe": 24, "deepseek_v2": 16, "deepseek_v3": 16}
    assert shared == ({(sizes[name], 32)} if name in sizes else set()) and meta.extra.get("shared_ffn") == sizes.get(
        name
    )


@pytest.mark.parametrize(
    ("name", "tensor", "value"),
    [("bart", "final_logits_bias", 0.0), ("gemma4_text", "model.layers.0.layer_scalar", 1.0)],
)
def test_default_gives_buffers_the_values_of_the_constructor(name: str, tensor: str, value: float) -> None:
    blueprint = Blueprint.from_config(UNLISTED[name])
    tensors = dict(Default().sample(blueprint))
    assert set(tensors) == set(blueprint.names)
    assert torch.equal(tensors[tensor], torch.full(blueprint[tensor].shape, value))
