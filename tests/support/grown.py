"""Donors with weights far from any initialisation, in float64; models grown from them, and how their logits differ."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.zoo.units.test_canonical import CONFIGS as CANONICAL
from tests.zoo.units.test_canonical import attention, in_own_dtype, random_model
from zoo.donors.memory import zoo_of
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint

CONFIGS: dict[str, dict[str, Any]] = {name: dict(config) for name, config in CANONICAL.items()}
CONFIGS["gemma2"]["sliding_window"] = CONFIGS["gemma3"]["sliding_window"] = 8  # shorter than the text
CONFIGS["gpt2"] |= {"n_inner": 48}
CONFIGS["gpt2-untied"] |= {"n_inner": 48}
GPT2_NAMES = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
}  # fmt: skip
FIXED_HEADS = ("gpt2", "gpt_neox", "opt")  # head_dim is width / heads, every query head has its own key


def resized(name: str, **sizes: int) -> dict[str, Any]:
    """A config of CONFIGS with other sizes, by Llama's names; the dimension of a head stays."""
    config = dict(CONFIGS[name])
    kind = config["model_type"]
    if kind in FIXED_HEADS:
        sizes.pop("num_key_value_heads", None)
        sizes["num_attention_heads"] = sizes.get("hidden_size", 32) // 8
    else:
        config.setdefault("head_dim", 8)
    if kind == "opt":
        sizes["word_embed_proj_dim"] = sizes.get("hidden_size", 32)
        sizes["ffn_dim"] = sizes.get("intermediate_size", 48)
    names = GPT2_NAMES if kind == "gpt2" else {}
    return config | {names.get(key, key): value for key, value in sizes.items()}


def grown(sampler: Sampler, donor: nn.Module, config: dict[str, Any], seed: int = 0) -> nn.Module:
    """The transformers model of a config, in the donor's dtype, with the tensors that the sampler gives for it."""
    loaded = AutoConfig.for_model(**config)
    blueprint = Blueprint.from_pretrained_config(loaded)
    tensors = dict(sampler.fit(zoo_of({"donor": donor}), blueprint).sample(blueprint, seed))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {s.name: s.shape for s in blueprint.specs}
    with tempfile.TemporaryDirectory() as folder:
        loaded.save_pretrained(folder)
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=next(donor.parameters()).dtype,
            output_loading_info=True,
            attn_implementation=attention(config["model_type"]),
        )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    """[2, 14, V] of fixed tokens, computed in the model's dtype throughout."""
    ids = torch.arange(28).view(2, 14) * 7 % model.config.vocab_size
    with torch.no_grad():
        return in_own_dtype(copy.deepcopy(model))(ids).logits


def largest_logit_change(sampler: Sampler, donor: nn.Module, config: dict[str, Any], seed: int = 0) -> float:
    """max |logits of the grown model - logits of the donor|; asserts that the donor's have a spread above 0.1."""
    before = logits(donor)
    assert before.std() > 0.1
    return float((logits(grown(sampler, donor, config, seed)) - before).abs().max())


def logit_tolerance(name: str) -> float:
    """The tolerance in float64; Gemma 2's only attention has a softmax in float32."""
    return 1e-5 if name == "gemma2" else 1e-9


__all__ = ["CONFIGS", "grown", "largest_logit_change", "logit_tolerance", "logits", "random_model", "resized"]
