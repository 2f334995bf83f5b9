"""Tiny configs of every architecture that has a table of roles, and of some that have none."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32,
}  # fmt: skip
GQA = {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "n_inner": 48}
OPT = {k: v for k, v in SIZES.items() if k != "intermediate_size"} | {"ffn_dim": 48, "word_embed_proj_dim": 32}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip

LISTED: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "model_type": "llama"},
    "llama-gqa-tied": {**SIZES, **GQA, "model_type": "llama", "tie_word_embeddings": True},
    "llama-mqa-biased": {
        **SIZES, "model_type": "llama", "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True,
    },
    "llama-head-dim": {**SIZES, **GQA, "model_type": "llama", "head_dim": 6},
    "llama-bfloat16": {**SIZES, "model_type": "llama", "dtype": "bfloat16"},
    "llama-float16-old-key": {**SIZES, "model_type": "llama", "torch_dtype": "float16"},
    "llama-bare": {**SIZES, "model_type": "llama", "architectures": ["LlamaModel"]},
    "mistral": {**SIZES, **GQA, "model_type": "mistral", "sliding_window": None},
    "qwen2-tied": {**SIZES, **GQA, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2": {**SIZES, **GQA, "model_type": "qwen2"},
    "qwen3": {**SIZES, **GQA, "model_type": "qwen3", "head_dim": 16},
    "smollm3": {**SIZES, **GQA, "model_type": "smollm3"},
    "gemma": {**SIZES, **GQA, "model_type": "gemma", "head_dim": 16},
    "gemma2": {**SIZES, **GQA, "model_type": "gemma2", "head_dim": 16},
    "gemma3_text": {**SIZES, **GQA, "model_type": "gemma3_text", "head_dim": 16},
    "gemma3_text-untied": {**SIZES, **GQA, "model_type": "gemma3_text", "head_dim": 16, "tie_word_embeddings": False},
    "gemma3": {
        "model_type": "gemma3", "mm_tokens_per_image": 4, "vision_config": VISION,
        "text_config": {**SIZES, **GQA, "model_type": "gemma3_text", "head_dim": 16},
    },
    "phi3": {**SIZES, **GQA, "model_type": "phi3"},
    "phi3-tied": {**SIZES, "model_type": "phi3", "tie_word_embeddings": True},
    "olmo2": {**SIZES, **GQA, "model_type": "olmo2"},
    "mixtral": {**SIZES, **GQA, "model_type": "mixtral", "num_local_experts": 3},
    "gpt2": {**GPT2, "model_type": "gpt2"},
    "gpt2-untied": {**GPT2, "model_type": "gpt2", "tie_word_embeddings": False},
    "gpt2-bare": {**GPT2, "model_type": "gpt2", "architectures": ["GPT2Model"]},
    "gpt_neox": {**SIZES, "model_type": "gpt_neox"},
    "gpt_neox-tied-unbiased": {
        **SIZES, "model_type": "gpt_neox", "tie_word_embeddings": True, "attention_bias": False,
    },
    "opt": {**OPT, "model_type": "opt"},
    "opt-unbiased-untied": {**OPT, "model_type": "opt", "enable_bias": False, "tie_word_embeddings": False},
    "opt-350m": {**OPT, "model_type": "opt", "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "bert": {**SIZES, "model_type": "bert"},
    "bert-bare": {**SIZES, "model_type": "bert", "architectures": ["BertModel"]},
}  # fmt: skip

UNLISTED: dict[str, dict[str, Any]] = {
    "stablelm": {**SIZES, **GQA, "model_type": "stablelm", "use_qkv_bias": True},
    "cohere": {**SIZES, **GQA, "model_type": "cohere"},
    "starcoder2": {**SIZES, **GQA, "model_type": "starcoder2"},
    "granite": {**SIZES, **GQA, "model_type": "granite"},
    "falcon": {
        "model_type": "falcon", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    },
    "qwen3_moe": {
        **SIZES, **GQA, "model_type": "qwen3_moe", "moe_intermediate_size": 16, "num_experts": 3,
        "num_experts_per_tok": 2, "head_dim": 8,
    },
    "roberta": {**SIZES, "model_type": "roberta"},
    "mamba": {"model_type": "mamba", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2},
    "t5": {"model_type": "t5", "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
}  # fmt: skip
