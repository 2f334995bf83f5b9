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

FALCON = {"model_type": "falcon", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FALCON_40B = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
BIGCODE = {"model_type": "gpt_bigcode", **GPT2}
MOE = {**SIZES, **GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    **SIZES, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "q_lora_rank": 16,
    "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip

# Architectures with fused projections that have a table for these alone.
FUSED: dict[str, dict[str, Any]] = {
    "bloom": {"model_type": "bloom", "vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": FALCON,
    "falcon-biased": {**FALCON, "bias": True, "parallel_attn": False},
    "falcon-mha": {**FALCON, "multi_query": False, "parallel_attn": False},
    "falcon-mha-alibi": {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True},
    "falcon-mqa-alibi": {**FALCON, "parallel_attn": False, "alibi": True},
    "falcon-40b": FALCON_40B,
    "falcon-11b": {**FALCON_40B, "num_ln_in_parallel_attn": 1},
    "mpt": {"model_type": "mpt", "vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32},
    "gpt_bigcode": BIGCODE,
    "gpt_bigcode-mha": {**BIGCODE, "multi_query": False},
    "persimmon": {**SIZES, "model_type": "persimmon"},
    "codegen": {**GPT2, "model_type": "codegen", "rotary_dim": 4, "n_positions": 32},
    "glm": {**SIZES, **GQA, "model_type": "glm", "head_dim": 8},
    "glm4": {**SIZES, **GQA, "model_type": "glm4", "head_dim": 8},
}  # fmt: skip

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {**SIZES, **GQA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**MOE, "model_type": "qwen3_moe", "head_dim": 8},
    "olmoe": {**SIZES, **GQA, "model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**DEEPSEEK, "model_type": "deepseek_v2"},
    "deepseek_v3": {**DEEPSEEK, "model_type": "deepseek_v3"},
}

UNLISTED: dict[str, dict[str, Any]] = {
    **FUSED,
    **{name: config for name, config in EXPERTS.items() if name not in ("mixtral", "qwen3_moe")},
    "stablelm": {**SIZES, **GQA, "model_type": "stablelm", "use_qkv_bias": True},
    "cohere": {**SIZES, **GQA, "model_type": "cohere"},
    "starcoder2": {**SIZES, **GQA, "model_type": "starcoder2"},
    "granite": {**SIZES, **GQA, "model_type": "granite"},
    "qwen3_moe": {
        **SIZES, **GQA, "model_type": "qwen3_moe", "moe_intermediate_size": 16, "num_experts": 3,
        "num_experts_per_tok": 2, "head_dim": 8,
    },
    "roberta": {**SIZES, "model_type": "roberta"},
    "olmo": {**SIZES, **GQA, "model_type": "olmo"},
    "apertus": {**SIZES, **GQA, "model_type": "apertus"},
    "gemma4_text": {
        **SIZES, **GQA, "model_type": "gemma4_text", "head_dim": 8, "global_head_dim": 16, "sliding_window": 8,
        "num_hidden_layers": 6, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
    },
    "bart": {
        "model_type": "bart", "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "max_position_embeddings": 32,
    },
    "mamba2": {
        "model_type": "mamba2", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8,
        "num_heads": 8, "head_dim": 8, "n_groups": 1,
    },
    "mamba": {"model_type": "mamba", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2},
    "t5": {"model_type": "t5", "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
}  # fmt: skip
