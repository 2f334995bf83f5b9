"""Modules in memory as donors and as targets."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from tests.support.tiny import config
from zoo.donors.donor import provenance
from zoo.donors.memory import ModuleDonor, load_into, zoo_of
from zoo.errors import UserError


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
