"""Modules in memory as donors and as targets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.support.shaken import CONFIGS, build
from tests.support.tiny import config
from zoo.donors.donor import provenance
from zoo.donors.memory import ModuleDonor, load_into, zoo_of
from zoo.errors import UserError
from zoo.targets.configs import meta_model


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def test_a_zoo_of_modules_gives_their_tensors_back() -> None:
    modules = {"b": net(), "a": net()}
    zoo = zoo_of(modules)
    assert zoo.names == ("a", "b")
    donor = zoo.donor("b")
    assert donor.names == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert torch.equal(donor.read("3.weight"), modules["b"][3].weight)  # type: ignore[index]
    assert donor.sha256 != zoo.donor("a").sha256
    assert {s.role for s in donor.blueprint.specs if s.name == "0.weight"} == {"conv"}


def test_reading_is_a_copy_and_refuses_nan() -> None:
    module = net()
    donor = zoo_of({"a": module}).donor("a")
    donor.read("3.bias").fill_(7.0)
    assert not (module[3].bias == 7.0).any()  # type: ignore[index]
    with torch.no_grad():
        module[3].bias[0] = torch.nan  # type: ignore[index]
    with pytest.raises(UserError, match=r"3\.bias"):
        donor.read("3.bias")
    with pytest.raises(UserError, match="tensor of a"):
        donor.read("4.bias")


def test_a_transformers_model_gives_the_names_on_disk() -> None:
    model = LlamaForCausalLM(config(tie_word_embeddings=True))
    donor = zoo_of({"llama": model}).donor("llama")
    assert "lm_head.weight" not in donor.names and donor.blueprint.metadata is not None
    assert torch.equal(donor.read("model.embed_tokens.weight"), model.lm_head.weight)


def test_loading_into_a_module() -> None:
    module = net()
    filled = load_into(module, [("3.bias", torch.arange(10))])
    assert filled == ["3.bias"] and torch.equal(module[3].bias, torch.arange(10.0))  # type: ignore[index]
    with pytest.raises(UserError, match="parameter of Sequential"):
        load_into(module, [("5.bias", torch.zeros(10))])
    with pytest.raises(UserError, match="does not fit"):
        load_into(module, [("3.bias", torch.zeros(11))])


META = {
    "llama": CONFIGS["llama"],
    "tied": CONFIGS["qwen3"],
    "buffers of two rotary embeddings, scaled embedding": CONFIGS["gemma3_text"],
    "yarn": {**CONFIGS["llama"], "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
    "masks": {**CONFIGS["gpt2"]},
    "sinusoids": {
        "model_type": "xglm", "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "vocab_size": 60,
        "max_position_embeddings": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", META)
def test_loading_into_a_module_on_the_meta_device(name: str, tmp_path: Path) -> None:
    """The module then computes what `from_pretrained` gives, its buffers included."""
    model = build(META[name])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    empty = meta_model(model.config).eval()
    donor = zoo_of({"donor": model}).donor("donor")
    filled = load_into(empty, ((name, donor.read(name)) for name in donor.names))
    assert filled == donor.names and not any(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(b, buffers[key]) for key, b in empty.named_buffers())
    with torch.no_grad():
        tokens = torch.arange(1, 25).view(2, 12)
        assert torch.equal(empty(tokens).logits, loaded(tokens).logits)
    if loaded.config.tie_word_embeddings:
        assert empty.get_output_embeddings().weight is empty.get_input_embeddings().weight
    assert all(p.requires_grad for p in empty.parameters()) and not hasattr(
        next(empty.parameters()), "_is_hf_initialized"
    )


def test_a_meta_module_is_filled_in_steps_and_in_its_own_dtype() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(2, 3, dtype=torch.bfloat16), nn.Linear(3, 1))
    source = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert load_into(module, [("0.weight", source)]) == ["0.weight"]
    source.zero_()
    assert module[0].weight.dtype == torch.bfloat16 and module[0].weight.sum() == 21  # type: ignore[union-attr]
    assert module[0].bias.is_meta and module[1].weight.is_meta  # type: ignore[union-attr]
    load_into(module, [("0.weight", torch.ones(3, 2)), ("0.bias", torch.zeros(3))])
    assert module[0](torch.ones(1, 2).bfloat16()).tolist() == [[2.0] * 3]
    with pytest.raises(UserError, match="does not fit"):
        load_into(module, [("1.weight", torch.zeros(2))])


def test_a_buffer_on_the_meta_device_that_nobody_computes_is_named() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 3)
        module.register_buffer("table", torch.zeros(2), persistent=False)
    with pytest.raises(
        UserError, match="table: is a buffer on the meta device, which is not stored; make it on the CPU"
    ):
        load_into(module, [("weight", torch.zeros(3, 2))])


def test_stored_buffers_are_filled_like_parameters() -> None:
    with torch.device("meta"):
        module = nn.BatchNorm1d(3)
    names = ["weight", "running_mean", "num_batches_tracked"]
    assert load_into(module, [(n, torch.full(module.get_buffer(n).shape if n != "weight" else (3,), 2)) for n in names])
    assert module.running_mean is not None and module.running_mean.tolist() == [2.0] * 3
    assert module.num_batches_tracked is not None and module.num_batches_tracked.dtype == torch.int64


def test_weights_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    donor = ModuleDonor(module, "m", source="m", revision="memory", sha256="")
    with pytest.raises(UserError, match="weight is on the meta device; load the weights first"):
        donor.read("weight")


def test_a_module_has_neither_config_nor_facts_nor_vocabulary() -> None:
    donor = zoo_of({"a": net()}).donor("a")
    assert (donor.config, donor.facts, donor.vocabulary()) == ({}, {}, None)
    assert provenance(donor) == {
        "name": "a", "revision": f"sha256:{donor.sha256}", "sha256": donor.sha256, "license": "unknown",
    }  # fmt: skip
