"""config.json and generation_config.json, rebuilt from the metadata of a GGUF file.

The metadata has most numbers of a config. What it leaves out is what llama.cpp has in its own code: the scale of
Gemma's attention, the pattern of its sliding windows.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from zoo.checkpoints.headers import DAMAGED
from zoo.errors import UserError
from zoo.gguf.header import CONVERT, GgufTensor, typed_value

NUMBER = (int, float)
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}  # of the size whose attention llama.cpp scales by width and heads
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # in transformers -> in GGUF
SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


@dataclass(frozen=True)
class ModelFacts:
    """What a config is rebuilt from."""

    architecture: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    read: Callable[[str], list[float]]  # the values of a small tensor, by its name in the file
    where: str  # the file, for errors

    def value(self, key: str, kind: Any, default: Any = None) -> Any:
        """A value of the architecture, `default` where it is missing. A list of equal values stands for one of them."""
        full = f"{self.architecture}.{key}"
        values = self.metadata.get(full)
        if isinstance(values, list) and kind in (int, NUMBER):
            if not values or any(value != values[0] for value in values):
                raise UserError(f"{self.where}: {full} differs between layers, which is not read; {CONVERT}")
            return typed_value({full: values[0]}, full, kind, default, self.where)
        found = typed_value(self.metadata, full, kind, default, self.where)
        return _shortest(found) if isinstance(found, float) else found

    def need(self, key: str, kind: Any = int) -> Any:
        """A value of the architecture. UserError where it is missing."""
        found = self.value(key, kind)
        if found is None:
            raise UserError(f"{self.where}: has no {self.architecture}.{key}; {DAMAGED}")
        return found

    def token_id(self, name: str) -> int | None:
        """The id of a special token: bos, eos, unknown, padding, eot, eom."""
        return typed_value(self.metadata, f"tokenizer.ggml.{name}_token_id", int, None, self.where)

    def rows(self, name: str) -> int:
        """The number of rows of a tensor. UserError where it is missing."""
        if name not in self.tensors:
            raise UserError(f"{self.where}: has no tensor {name!r}; {DAMAGED}")
        return self.tensors[name].shape[0]


def rebuild_config(facts: ModelFacts) -> tuple[dict[str, Any], list[str]]:
    """(the parsed config.json of a model, what of the file it leaves out: one line each)."""
    notes: list[str] = []
    special = {f"{name}_token_id": facts.token_id(key) for name, key in SPECIAL_TOKENS.items() if name != "unk"}
    common = {
        "vocab_size": facts.rows("token_embd.weight"),
        "tie_word_embeddings": "output.weight" not in facts.tensors,
        "dtype": "bfloat16",
    }
    own = _gpt2_config(facts) if facts.architecture == "gpt2" else _decoder_config(facts, notes)
    return {**own, **common, **special}, notes


def rebuild_generation_config(facts: ModelFacts) -> dict[str, Any]:
    """The generation_config.json of a model: its special tokens, and how its authors sample where the file says so."""
    ends = [facts.token_id(name) for name in ("eos", "eot", "eom")]
    stops = list(dict.fromkeys(token for token in ends if token is not None))
    sampling = {
        name: _shortest(value)
        for key, name in SAMPLING.items()
        if (value := typed_value(facts.metadata, f"general.sampling.{key}", NUMBER, None, facts.where)) is not None
    }
    found = {
        "bos_token_id": facts.token_id("bos"),
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": facts.token_id("padding"),
        **({"do_sample": True, **sampling} if sampling else {}),
    }
    return {key: value for key, value in found.items() if value is not None}


def _gpt2_config(facts: ModelFacts) -> dict[str, Any]:
    width, ffn = facts.need("embedding_length"), facts.value("feed_forward_length", int)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": facts.need("block_count"),
        "n_embd": width,
        "n_head": facts.need("attention.head_count"),
        "n_positions": facts.rows("position_embd.weight"),
        "n_inner": None if ffn in (None, 4 * width) else ffn,
        "layer_norm_epsilon": facts.need("attention.layer_norm_epsilon", NUMBER),
    }


def _decoder_config(facts: ModelFacts, notes: list[str]) -> dict[str, Any]:
    heads = facts.need("attention.head_count")
    width = facts.need("embedding_length")
    if heads < 1:
        raise UserError(f"{facts.where}: states {heads} attention heads; {DAMAGED}")
    query = facts.tensors.get("blk.0.attn_q.weight")
    head_dim = facts.value("attention.key_length", int, query.shape[0] // heads if query else width // heads)
    config = {
        "num_hidden_layers": facts.need("block_count"),
        "hidden_size": width,
        "intermediate_size": facts.need("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.value("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": facts.need("context_length"),
        "rms_norm_eps": facts.need("attention.layer_norm_rms_epsilon", NUMBER),
        "rope_theta": facts.value("rope.freq_base", NUMBER, 10_000.0),
        **_linear_or_yarn(facts, notes),
    }
    if facts.value("attention.value_length", int, head_dim) != head_dim:
        raise UserError(f"{facts.where}: has heads of other sizes for keys and values, which is not read; {CONVERT}")
    return config | OWN_PART[facts.architecture](facts, head_dim, notes)


def _llama_part(facts: ModelFacts, head_dim: int, notes: list[str]) -> dict[str, Any]:
    names = [facts.metadata.get(f"general.{key}") for key in ("name", "basename")]
    if any(isinstance(name, str) and "mistral" in name.lower() for name in names):
        window = facts.value("attention.sliding_window", int)
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    scaling = _llama3_scaling(facts, head_dim, notes) if "rope_freqs.weight" in facts.tensors else {}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": "blk.0.attn_q.bias" in facts.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in facts.tensors,
        **scaling,
    }


def _qwen2_part(facts: ModelFacts, head_dim: int, notes: list[str]) -> dict[str, Any]:
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def _qwen3_part(facts: ModelFacts, head_dim: int, notes: list[str]) -> dict[str, Any]:
    biased = "blk.0.attn_q.bias" in facts.tensors
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": biased}


def _gemma_part(facts: ModelFacts, head_dim: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share. llama.cpp scales the attention by the head's size, except for the 27B models."""
    scalar = head_dim
    if facts.need("block_count") == LAYERS_OF_27B[facts.architecture]:
        scalar = facts.need("embedding_length") // facts.need("attention.head_count")
    window = facts.value("attention.sliding_window", int, 4096)
    return {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": scalar, "sliding_window": window}


def _gemma2_part(facts: ModelFacts, head_dim: int, notes: list[str]) -> dict[str, Any]:
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": facts.value("attn_logit_softcapping", NUMBER, 50.0),
        "final_logit_softcapping": facts.value("final_logit_softcapping", NUMBER, 30.0),
        **_gemma_part(facts, head_dim),
    }


def _gemma3_part(facts: ModelFacts, head_dim: int, notes: list[str]) -> dict[str, Any]:
    pattern = facts.metadata.get("gemma3.attention.sliding_window_pattern")
    if isinstance(pattern, list):
        windows = facts.value("attention.sliding_window_pattern", [bool])
        layers: dict[str, Any] = {
            "layer_types": ["sliding_attention" if window else "full_attention" for window in windows]
        }
    else:
        layers = {"sliding_window_pattern": facts.value("attention.sliding_window_pattern", int, 6)}
        if layers["sliding_window_pattern"] < 1:
            raise UserError(f"{facts.where}: gemma3.attention.sliding_window_pattern is {pattern}; {DAMAGED}")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "rope_local_base_freq": facts.value("rope.freq_base_swa", NUMBER, 10_000.0),
        "final_logit_softcapping": facts.value("final_logit_softcapping", NUMBER),
        **layers,
        **_gemma_part(facts, head_dim),
    }


def _phi3_part(facts: ModelFacts, head_dim: int, notes: list[str]) -> dict[str, Any]:
    rotary = facts.value("rope.dimension_count", int, head_dim)
    original = facts.value("rope.scaling.original_context_length", int)
    part = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "sliding_window": facts.value("attention.sliding_window", int) or None,
        **({"original_max_position_embeddings": original} if original else {}),
        **({"partial_rotary_factor": rotary / head_dim} if 0 < rotary < head_dim else {}),
    }
    names = {f"{kind}_factor": f"rope_factors_{kind}.weight" for kind in ("short", "long")}
    if all(name in facts.tensors for name in names.values()):
        factors = {key: [_shortest(factor) for factor in facts.read(name)] for key, name in names.items()}
        part["rope_scaling"] = {"rope_type": "longrope", **factors}
    return part


OWN_PART: dict[str, Callable[[ModelFacts, int, list[str]], dict[str, Any]]] = {
    "llama": _llama_part,
    "qwen2": _qwen2_part,
    "qwen3": _qwen3_part,
    "gemma2": _gemma2_part,
    "gemma3": _gemma3_part,
    "phi3": _phi3_part,
}


def _linear_or_yarn(facts: ModelFacts, notes: list[str]) -> dict[str, Any]:
    """The scaling of the rotary embedding, where the metadata names one of the two kinds that both sides have."""
    kind = facts.value("rope.scaling.type", str, "none")
    if kind in ("none", "longrope"):  # longrope: its factors are tensors
        return {}
    factor = facts.value("rope.scaling.factor", NUMBER)
    if kind == "linear" and factor:
        return {"rope_scaling": {"rope_type": "linear", "factor": float(factor)}}
    original = facts.value("rope.scaling.original_context_length", int)
    if kind == "yarn" and factor and original:
        scaling = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": original}
        return {"rope_scaling": scaling}
    notes.append(f"its scaling of the rotary embedding ({kind}) is not in its config")
    return {}


def _llama3_scaling(facts: ModelFacts, head_dim: int, notes: list[str]) -> dict[str, Any]:
    """Llama 3's scaling of the rotary embedding, of which a GGUF file has only the factor of each frequency."""
    found = facts.read("rope_freqs.weight")
    base, factor = facts.value("rope.freq_base", NUMBER, 10_000.0), round(max(found), 4)
    expected = [_llama3_factor(base ** (-2 * i / head_dim), factor) for i in range(head_dim // 2)]
    pairs = zip(found, expected, strict=False)
    if len(found) == len(expected) and all(math.isclose(a, b, rel_tol=1e-4) for a, b in pairs):
        return {"rope_scaling": {"rope_type": "llama3", "factor": factor, **LLAMA3}}
    notes.append("its scaling of the rotary embedding (rope_freqs.weight) is not in its config")
    return {}


def _llama3_factor(frequency: float, factor: float) -> float:
    """By how much Llama 3 divides a frequency of the rotary embedding."""
    turns = LLAMA3["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    share = min(1.0, max(0.0, (turns - low) / (high - low)))
    return 1 / ((1 - share) / factor + share)


def _shortest(value: float) -> float:
    """The shortest decimal number that is the same float32: 1e-06 for 9.999999974752427e-07."""
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if abs(short) < 3.4e38 and struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value
