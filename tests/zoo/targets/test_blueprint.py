from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tests.support.architectures import LISTED, SIZES, UNLISTED
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.targets.configs import meta_model, parse_config, quiet_transformers, to_disk

EVERY = {**LISTED, **UNLISTED}


def on_disk(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


def real_model(config: dict[str, Any]) -> nn.Module:
    parsed = parse_config(config)
    with quiet_transformers():
        return type(meta_model(parsed))._from_config(parsed)


@pytest.mark.parametrize("name", EVERY)
def test_names_shapes_and_dtypes_are_those_that_save_pretrained_writes(name: str, tmp_path: Path) -> None:
    blueprint = Blueprint.from_config(EVERY[name])
    with quiet_transformers():
        real_model(EVERY[name]).save_pretrained(tmp_path)
    written = on_disk(tmp_path)
    assert {s.name: (s.shape, s.dtype) for s in blueprint.specs} == written
    assert not set(blueprint.ties) & set(written)
    assert set(blueprint.ties.values()) <= set(written)
    # The folder's own config, as transformers writes it, says the same.
    again = Blueprint.from_config(tmp_path)
    assert again.specs == blueprint.specs and again.metadata == blueprint.metadata


@pytest.mark.parametrize("name", ["mixtral", "gpt_neox", "gpt2", "gemma3"])
def test_to_disk_gives_the_tensors_that_save_pretrained_writes(name: str, tmp_path: Path) -> None:
    model = real_model(LISTED[name])
    ties = model.all_tied_weights_keys
    state = {k: v for k, v in model.state_dict().items() if k not in ties}
    with quiet_transformers():
        model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        converted = to_disk(model, state)
        assert set(converted) == set(file.keys())
        for key, tensor in converted.items():
            torch.testing.assert_close(tensor, file.get_tensor(key), rtol=0, atol=0)


@pytest.mark.parametrize("name", EVERY)
def test_a_model_in_memory_has_the_blueprint_of_its_config(name: str) -> None:
    blueprint = Blueprint.from_module(meta_model(parse_config(EVERY[name])))
    expected = Blueprint.from_config(EVERY[name])
    assert (blueprint.specs, blueprint.metadata, blueprint.ties) == (expected.specs, expected.metadata, expected.ties)


def test_real_checkpoints_hold_what_their_blueprint_says(shared_data: Path) -> None:
    folders = sorted(
        p.parent for p in (shared_data / "models").rglob("config.json") if (p.parent / "model.safetensors").exists()
    )
    assert folders
    for folder in folders:
        blueprint = Blueprint.from_config(folder)
        written = on_disk(folder)
        assert {s.name: s.shape for s in blueprint.specs} == {n: s for n, (s, _) in written.items()}, folder
        assert not blueprint.unknown, folder


def metadata(name: str, **changes: Any) -> Any:
    found = Blueprint.from_config({**EVERY[name], **changes}).metadata
    assert found is not None
    return found


def test_metadata_of_the_families() -> None:
    llama = metadata("llama-gqa-tied", rope_theta=5e5)
    assert (llama.layers, llama.width, llama.heads, llama.kv_heads, llama.head_dim) == (2, 32, 4, 2, 8)
    assert (llama.ffn, llama.vocab, llama.tied, llama.norm, llama.rope_theta) == (48, 64, True, "rms", 5e5)
    gpt2 = metadata("gpt2", n_inner=None)
    assert (gpt2.width, gpt2.ffn, gpt2.norm, gpt2.rope_theta, gpt2.positions) == (32, 128, "layer", None, 16)
    gemma = metadata("gemma3_text")
    assert gemma.extra["rms_offset"] and gemma.extra["embed_scale"] == 32**0.5
    assert (gemma.rope_theta, gemma.extra["rope_theta_local"]) == (1e6, 1e4)
    inner, outer = metadata("gemma3_text"), metadata("gemma3")
    assert (inner.width, inner.heads, inner.ffn) == (outer.width, outer.heads, outer.ffn)
    neox = metadata("gpt_neox")
    assert neox.extra["parallel_block"] and not neox.extra["shared_norm"] and neox.extra["rotary_dim"] == 2
    assert metadata("mixtral").experts == 3
    assert metadata("falcon").kv_heads == 1 and metadata("falcon").extra["shared_norm"]
    assert metadata("t5").norm == "rms" and metadata("bert").norm == "layer"


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "olmo2", "gemma", "gemma2", "gemma3_text"])
def test_stored_gains_give_the_identity_where_rms_offset_says_so(name: str) -> None:
    """A freshly built RMSNorm multiplies by one: what it stores must be one, or zero under an offset."""
    model = real_model(LISTED[name])
    stored = model.state_dict()["model.norm.weight"]
    offset = float(bool(metadata(name).extra["rms_offset"]))
    torch.testing.assert_close(stored + offset, torch.ones_like(stored))


def test_an_8b_config_costs_no_memory_and_little_time() -> None:
    config = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16",
    }  # fmt: skip
    blueprint = Blueprint.from_config(config)
    assert blueprint.parameters == 8_030_261_248
    assert blueprint.nbytes == 2 * blueprint.parameters


def test_look_up() -> None:
    blueprint = Blueprint.from_config(LISTED["llama-gqa-tied"])
    name = "model.layers.1.self_attn.k_proj.weight"
    assert name in blueprint and blueprint[name].layer == 1 and blueprint[name].shape == (16, 32)
    assert "lm_head.weight" not in blueprint
    with pytest.raises(KeyError, match=r"tied to 'model\.embed_tokens\.weight'"):
        blueprint["lm_head.weight"]
    with pytest.raises(KeyError, match=r"did you mean 'model\.layers\.1\.self_attn\.k_proj\.weight'"):
        blueprint["model.layers.1.self_attn.k_proj.wieght"]
    assert len(blueprint.find("attn.q")) == 2 and len(blueprint.find("attn.q", layer=0)) == 1
    assert [s.name for s, _ in blueprint.find("norm", site="final")] == ["model.norm.weight"]
    assert not blueprint.find("attn.q", kind="bias")
    experts = Blueprint.from_config(LISTED["mixtral"])
    assert len(experts.find("mlp.gate")) == 6 and len(experts.find("mlp.gate", layer=1, expert=2)) == 1


BAD = {
    "not an object with a type": ({}, "no model_type"),
    "typing error in the type": ({**SIZES, "model_type": "lama"}, "did you mean 'llama'"),
    "remote code": ({**SIZES, "model_type": "my-own", "auto_map": {"AutoModel": "x.Y"}}, "remote code"),
    "negative": ({**LISTED["llama"], "hidden_size": -32}, "hidden_size is -32"),
    "zero under the family's own name": ({**LISTED["gpt2"], "n_embd": 0}, "n_embd is 0"),
    "text": ({**LISTED["llama"], "hidden_size": "32"}, "hidden_size is '32'"),
    "fraction": ({**LISTED["llama"], "num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
    "absurd": ({**LISTED["llama"], "num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "absurd together": ({**LISTED["llama"], "hidden_size": 2**24, "vocab_size": 2**24}, "parameters"),
    "heads do not divide the width": ({**LISTED["gpt2"], "n_head": 5}, "n_embd 32 is not a multiple of n_head 5"),
    "heads do not divide the width, checked by transformers": ({**LISTED["llama"], "num_attention_heads": 5}, "(32)"),
    "kv heads do not divide heads": (
        {**LISTED["llama"], "num_key_value_heads": 3},
        "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
    ),
    "odd head": ({**LISTED["llama"], "hidden_size": 12}, "head_dim 3 is odd"),
    "more experts than there are": ({**LISTED["mixtral"], "num_experts_per_tok": 4}, "num_experts_per_tok 4"),
    "dtype": ({**LISTED["llama"], "dtype": "float17"}, "dtype is 'float17'"),
    "list of dtypes": ({**LISTED["llama"], "dtype": ["float32"] * 200}, "dtype is ['float32', 'float32'"),
    "dtype of a part": (
        {**LISTED["gemma3"], "text_config": {**LISTED["gemma3_text"], "dtype": 32}},
        "dtype is 32, not a dtype",
    ),
    "activation": ({**LISTED["llama"], "hidden_act": "nope"}, "hidden_act is 'nope'"),
    "rope": ({**LISTED["llama"], "rope_parameters": {"rope_type": "nope"}}, "rope_parameters is 'nope'"),
    "padding outside the vocabulary": ({**LISTED["llama"], "pad_token_id": 64}, "padding"),
    "inside a multimodal config": (
        {**LISTED["gemma3"], "text_config": {**LISTED["gemma3_text"], "num_key_value_heads": 3}},
        "num_key_value_heads 3",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_config_that_cannot_be_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    config, reason = BAD[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        Blueprint.from_config(path)
    message = str(error.value)
    assert reason.lower() in message.lower() and str(path) in message
    assert "\n" not in message and len(message) < 400 + len(str(path))


def test_the_weights_for_a_quantised_config_are_not_quantised(caplog: pytest.LogCaptureFixture) -> None:
    quantised = {**LISTED["gemma3"], "quantization_config": {"quant_method": "fp8"}}
    quantised["text_config"] = {**LISTED["gemma3_text"], "quantization_config": {"quant_method": "fp8"}}
    plain = {**LISTED["gemma3"], "text_config": LISTED["gemma3_text"]}
    with caplog.at_level("INFO"):
        blueprint = Blueprint.from_config(quantised)
    assert blueprint.config == plain and blueprint.specs == Blueprint.from_config(plain).specs
    assert "quantization_config is left out" in caplog.text


@pytest.mark.parametrize("text", ["[]", "{", "", "\xff", '{"model_type": ["llama"]}'])
def test_a_file_that_is_not_a_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json"):
        Blueprint.from_config(tmp_path)


def test_what_is_not_there_is_refused_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("a local path reached for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    for source in (tmp_path, tmp_path / "missing", "./org/name", "folder", "org/name.json", str(tmp_path / "a" / "b")):
        with pytest.raises(UserError):
            Blueprint.from_config(source)
    (tmp_path / "config.json").write_text(json.dumps(LISTED["llama"]))
    assert Blueprint.from_config(str(tmp_path)).metadata == Blueprint.from_config(LISTED["llama"]).metadata


def test_remote_code_is_ignored_where_transformers_knows_the_type() -> None:
    config = {**LISTED["llama"], "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}
    assert Blueprint.from_config(config).specs == Blueprint.from_config(LISTED["llama"]).specs


def test_the_config_object_is_left_as_it_is() -> None:
    config = parse_config(LISTED["llama-bfloat16"])
    before = config.to_dict()
    blueprint = Blueprint.from_pretrained_config(config)
    assert config.to_dict() == before
    assert blueprint.specs == Blueprint.from_config(LISTED["llama-bfloat16"]).specs
    assert blueprint.config is not None and Blueprint.from_config(blueprint.config).specs == blueprint.specs


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.layers[1].weight = self.layers[0].weight
        self.scale = nn.Parameter(torch.ones(()))


def test_any_module_has_a_blueprint() -> None:
    module = Plain()
    blueprint = Blueprint.from_module(module)
    assert blueprint.metadata is None and blueprint.config is None
    assert blueprint.parameters == sum(p.numel() for p in module.parameters())
    assert {n: s.shape for n, s in blueprint._by_name.items()} == {
        n: tuple(p.shape) for n, p in module.named_parameters()
    }
    assert blueprint.ties == {"layers.1.weight": "layers.0.weight"}
    assert blueprint["conv.weight"].role == "conv" and blueprint["conv.bias"].kind == "bias"
    assert blueprint["layers.0.weight"].role == "other" and blueprint["scale"].role == "other"
    assert "scale" in blueprint.unknown and "conv.weight" not in blueprint.unknown


@pytest.mark.parametrize(("config", "named"), [
    ({"model_type": "glm4_moe_lite", "mlp_layer_types": []}, "mlp_layer_types has 0 entries"),
    ({"model_type": "gpt_neo", "attention_types": [[]]}, "attention_types has 1 entries"),
    ({"model_type": "smollm3", "no_rope_layers": []}, "no_rope_layers has 0 entries"),
    ({"model_type": "falcon_h1", "mlp_multipliers": [], "num_hidden_layers": 2}, "mlp_multipliers has 0 entries"),
    ({"model_type": "falcon_h1", "ssm_multipliers": [], "num_hidden_layers": 2}, "ssm_multipliers has 0 entries"),
])  # fmt: skip
def test_a_list_that_is_too_short_is_named(config: dict, named: str) -> None:
    with pytest.raises(UserError, match=rf"a list is too short: {named}; make it longer$"):
        Blueprint.from_config(config)
