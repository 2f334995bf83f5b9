"""Tiny models of many architectures, saved as donors; targets that samplers fill; their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from headstart.generate.sampling import sample_with_defaults
from zoo.checkpoints.writer import write_checkpoint
from zoo.donors.zoo import Zoo, open_standalone
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint

COMMON = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GQA = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **GQA, "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", **GQA, "tie_word_embeddings": True, "attention_bias": True},
    "qwen2": {"model_type": "qwen2", **GQA},
    "qwen3": {"model_type": "qwen3", **GQA, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", **GQA, "query_pre_attn_scalar": 8},
    "gemma3_text": {"model_type": "gemma3_text", **GQA, "query_pre_attn_scalar": 8},
    "phi3": {"model_type": "phi3", **GQA},
    "olmo2": {"model_type": "olmo2", **GQA},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "gpt_neox": {"model_type": "gpt_neox", **COMMON, "rotary_pct": 0.5},
    "opt": {
        "model_type": "opt", "vocab_size": 60, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 32, "word_embed_proj_dim": 32, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    },
    "mixtral": {"model_type": "mixtral", **GQA, "num_local_experts": 4},
}  # fmt: skip


def build(config: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """The model of a config, with noise added to every tensor, so that no gain is one and no bias is zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    rest = {k: v for k, v in config.items() if k != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **rest)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def donor(folder: Path, config: dict[str, Any], seed: int = 0) -> Zoo:
    """A zoo of one: a model of that config with noise on every tensor, saved to `folder`."""
    build(config, seed).save_pretrained(folder)
    return open_standalone(folder)


def filled(folder: Path, sampler: Sampler, zoo: Zoo, config: dict[str, Any], seed: int = 0) -> Path:
    """Fits the sampler, writes a checkpoint to `folder` and returns the folder."""
    blueprint = Blueprint.from_config(config)
    write_checkpoint(folder, blueprint, sample_with_defaults(sampler.fit(zoo, blueprint), blueprint, seed))
    return folder


def logits(folder: Path) -> torch.Tensor:
    """[2, 12, V] float32 of fixed tokens; the folder must load without a missing or unexpected tensor."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        return model.eval()(torch.arange(1, 25).view(2, 12)).logits
