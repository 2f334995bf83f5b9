"""A tiny config of every architecture of transformers: the default config with smaller sizes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zoo.targets.configs import quiet_transformers


@dataclass(frozen=True)
class Shape:
    """The sizes of a tiny model."""

    width: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 48
    vocab: int = 96


OWN = Shape()
NARROW = Shape(width=16, layers=1, heads=2, kv_heads=1, ffn=24)
WIDE = Shape(width=64, heads=8, kv_heads=4, ffn=96)
DEEP = Shape(layers=4)

# Name of a setting -> its value. A setting that is smaller by default keeps its default, token ids excepted.
_LAYERS = (
    r"num_hidden_layers|(num_|n_)?(encoder_|decoder_)?layers?|num_(encoder|decoder)_layers|depth|max_window_layers"
)
_FFN = r"intermediate_size|hidden_dim|(encoder_|decoder_|shared_)?(ffn_dim|d_ff|dim_ff|inner_dim|d_inner|n_inner)"
SETTINGS: list[tuple[str, Callable[[Shape], int]]] = [
    (
        r"hidden_size|d_model|n_embd|emb_dim|word_embed_proj_dim|embedding_size|embed_dim|decoder_hidden_size"
        r"|d_embedding|dim|input_embedding_size",
        lambda shape: shape.width,
    ),
    (r"\w*vocab_size(_per_layer_input)?|entity_vocab_size", lambda shape: shape.vocab),
    (_LAYERS, lambda shape: shape.layers),
    (r"(num_|n_)?(attention_)?heads?|(encoder|decoder)_attention_heads", lambda shape: shape.heads),
    (r"num_(key_value|kv)_heads", lambda shape: shape.kv_heads),
    (r"head_dim|d_kv|attention_head_size|global_head_dim|index_head_dim|(linear_|mamba_)?head_dim", lambda shape: 8),
    (_FFN + r"|ffn_hidden_size|encoder_ffn_dim|decoder_ffn_dim", lambda shape: shape.ffn),
    (r"(\w*expert\w*_|moe_)(intermediate_size|ffn_hidden_size)", lambda shape: shape.ffn // 2),
    (r"(moe_)?num_(local_)?experts|n_routed_experts", lambda shape: 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts", lambda shape: 2),
    (r"n_group|topk_group|n_shared_experts", lambda shape: 1),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions"
        r"|max_(encoder|decoder)_position_embeddings",
        lambda shape: 64,
    ),
    (r"(q|kv|o)_lora_rank", lambda shape: 16),
    (r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim|qk_head_dim", lambda shape: 8),
    (r"hidden_size_per_layer_input|(audio|vision|text)_hidden_size|output_dim|projection_dim", lambda shape: 16),
    (r"pad_token_id", lambda shape: 0),
    (r"bos_token_id|decoder_start_token_id", lambda shape: 1),
    (r"eos_token_id", lambda shape: 2),
    (r"image_size", lambda shape: 28),
    (r"patch_size", lambda shape: 14),
]

Override = Callable[[Shape], dict[str, Any]]


def _mamba(shape: Shape) -> dict[str, Any]:
    return {"mamba_n_heads": shape.heads, "mamba_d_head": "auto", "mamba_d_state": 8, "mamba_chunk_size": 8}


def _head_dim(shape: Shape) -> dict[str, Any]:
    return {"head_dim": 8}


def _layer_types(*kinds: str) -> Override:
    return lambda shape: {"layer_types": [kinds[i % len(kinds)] for i in range(shape.layers)]}


def _gemma3n(shape: Shape) -> dict[str, Any]:
    return {
        "layer_types": ["sliding_attention", "full_attention"][-shape.layers :] * max(1, shape.layers // 2),
        "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * shape.layers, "laurel_rank": 8,
        "intermediate_size": shape.ffn, "sliding_window": 16,
    }  # fmt: skip


def _zamba(shape: Shape) -> dict[str, Any]:
    return {  # a hybrid layer shares its block with another, so that there must be two
        "num_hidden_layers": 2 * shape.layers + 2, "layer_types": ["linear_attention", "hybrid"] * (shape.layers + 1),
        "attention_hidden_size": 2 * shape.width, "attention_head_dim": 2 * shape.width // shape.heads,
        "num_key_value_heads": shape.heads, "n_mamba_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 4,
    }  # fmt: skip


def _equal_heads(shape: Shape) -> dict[str, Any]:
    return {"num_key_value_heads": shape.heads}


# Architectures whose settings depend on each other in ways of their own.
OVERRIDES: dict[str, Override] = {
    "bamba": _mamba,
    "granitemoehybrid": lambda shape: _mamba(shape) | _layer_types("mamba", "attention")(shape),
    "blt": lambda shape: {"encoder_hash_byte_group_vocab": 12},
    "cohere_compass_text": lambda shape: {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        },
    },
    "dots1": lambda shape: {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gpt_neo": lambda shape: {"attention_types": [[["global"], shape.layers]]},
    "hunyuan_v1_dense": _head_dim,
    "hunyuan_v1_moe": _head_dim,
    "ministral": _head_dim,
    "kimi_linear": lambda shape: {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": _layer_types("conv", "full_attention"),
    "olmo_hybrid": _layer_types("linear_attention", "full_attention"),
    "nemotron": lambda shape: {"head_dim": 8, "num_key_value_heads": shape.kv_heads},
    "gemma4_assistant": lambda shape: {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
        "backbone_hidden_size": 32, "num_centroids": 4, "centroid_intermediate_top_k": 2,
    },
    "dots3_note_text": lambda shape: {"num_key_value_heads": shape.heads, "per_layer_config": {}},
    "dbrx": lambda shape: {
        "attn_config": {"kv_n_heads": shape.kv_heads, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": shape.ffn, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": shape.width},
    },
    "diffllama": _equal_heads,
    "gemma3n_text": _gemma3n,
    "zamba": _zamba,
    "zamba2": lambda shape: _zamba(shape) | {
        "mamba_headdim": shape.width, "hybrid_layer_ids": list(range(1, 2 * shape.layers + 2, 2)),
    },
    "mamba2": lambda shape: {"num_heads": 2 * shape.heads, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "reformer": lambda shape: {
        "is_decoder": True, "axial_pos_embds_dim": [shape.width // 2] * 2, "axial_pos_shape": [8, 8],
        "attn_layers": ["local"] * shape.layers, "feed_forward_size": shape.ffn,
    },
    "roc_bert": lambda shape: {
        "shape_embed_dim": 8, "pronunciation_embed_dim": 8, "shape_vocab_size": 20, "pronunciation_vocab_size": 20,
    },
    "distilbert": lambda shape: {"dim": shape.width, "hidden_dim": shape.ffn},
    "esm": lambda shape: {"mask_token_id": 4, "vocab_size": shape.vocab},
    "esmc": _equal_heads,
    "fsmt": lambda shape: {"src_vocab_size": 96, "tgt_vocab_size": 96, "langs": ["en", "de"]},
    "neomme": lambda shape: {"head_dim": 16},
    "perceiver": lambda shape: {
        "d_latents": shape.width, "num_latents": 8, "qk_channels": shape.width, "v_channels": shape.width,
        "num_self_attends_per_block": shape.layers, "num_cross_attention_heads": shape.heads,
        "num_self_attention_heads": shape.heads,
    },
    "luke": lambda shape: {"entity_vocab_size": 20, "entity_emb_size": 8},
}  # fmt: skip


def tiny_config(model_type: str, shape: Shape = OWN, is_encoder: bool = False) -> Any:
    """The config of an architecture with these sizes. Raises whatever transformers raises where it refuses them.

    is_encoder: for the masked language model of an architecture that has both (Reformer).
    """
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    with quiet_transformers():
        config = cls(**small_settings(cls, shape))
    if is_encoder and getattr(config, "is_decoder", False):
        config.is_decoder = False
    return config


def small_settings(cls: Any, shape: Shape) -> dict[str, Any]:
    """The settings of a config class that are changed from its defaults, nested configs included."""
    settings: dict[str, Any] = {}
    override = OVERRIDES.get(getattr(cls, "model_type", ""))
    try:
        default = cls()
    except Exception:  # a class that needs arguments: the override has them all
        return override(shape) if override else {}
    for name, value in vars(default).items():
        size = next((size(shape) for pattern, size in SETTINGS if re.fullmatch(pattern, name)), None)
        if size is None or isinstance(value, bool | list | dict | float | str):
            continue
        if isinstance(value, int):
            settings[name] = size if name.endswith("token_id") else min(size, value)
        elif name.endswith("token_id"):
            settings[name] = size
    for name in getattr(cls, "sub_configs", None) or {}:
        if (nested := getattr(default, name, None)) is not None:
            settings[name] = small_settings(type(nested), shape)
            if model_type := getattr(nested, "model_type", ""):
                settings[name]["model_type"] = model_type
    for name, value in (override(shape) if override else {}).items():
        is_nested = isinstance(value, dict) and isinstance(settings.get(name), dict)
        settings[name] = settings[name] | value if is_nested else value
    return settings
