"""The table of each architecture: path of a module -> what its tensors are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LAYOUTS = (
    "rows",  # one part after the other
    "columns",  # likewise, stored as [in, out] (GPT-2's Conv1D)
    "kv groups",  # for each KV head: its query heads, its key, its value (NeoX, Bloom, Falcon, StarCoder, Persimmon)
    "quarters",  # four times a quarter of every part (CodeGen)
)


@dataclass(frozen=True)
class Rule:
    """What the tensors of one module are."""

    parts: tuple[tuple[str, tuple[str, ...]], ...]  # (role, axes as [out, in]), in the order on disk
    site: str | None = None  # of NORM_SITES, for norms only
    layout: str = "rows"  # how fused parts lie on disk, one of LAYOUTS


def parse_rule(text: str, layout: str = "rows") -> Rule:
    """The rule written as 'attn.q[heads,residual] + attn.k[kv_heads,residual]'; a norm as 'norm@attn[residual]'."""
    parts, site = [], None
    for piece in text.split(" + "):
        head, axes = piece.rstrip("]").split("[")
        role, _, at = head.partition("@")
        site = at or site
        parts.append((role, tuple(axes.split(","))))
    return Rule(tuple(parts), site, layout)


def norm_rule(site: str | None, axis: str = "residual") -> Rule:
    return Rule((("norm", (axis,)),), site)


EMBED, HEAD = parse_rule("embed[vocab,residual]"), parse_rule("head[vocab,residual]")
POSITION = parse_rule("embed[position,residual]")
Q, K, V = (
    parse_rule("attn.q[heads,residual]"),
    parse_rule("attn.k[kv_heads,residual]"),
    parse_rule("attn.v[kv_heads,residual]"),
)
O = parse_rule("attn.o[residual,heads]")
GATE, UP, DOWN = (
    parse_rule("mlp.gate[ffn,residual]"),
    parse_rule("mlp.up[ffn,residual]"),
    parse_rule("mlp.down[residual,ffn]"),
)
QKV = "attn.q[heads,residual] + attn.k[kv_heads,residual] + attn.v[kv_heads,residual]"
ROUTER = parse_rule("other[experts,residual]")  # one row per expert: the logits that choose among them
GATE_UP = parse_rule("mlp.gate[ffn,residual] + mlp.up[ffn,residual]")
OTHER = Rule(())

# Tables: module path -> rule. {L} is the number of the layer, {E} that of the expert.
_LLAMA = {
    "model.embed_tokens": EMBED,
    "model.layers.{L}.self_attn.q_proj": Q,
    "model.layers.{L}.self_attn.k_proj": K,
    "model.layers.{L}.self_attn.v_proj": V,
    "model.layers.{L}.self_attn.o_proj": O,
    "model.layers.{L}.mlp.gate_proj": GATE,
    "model.layers.{L}.mlp.up_proj": UP,
    "model.layers.{L}.mlp.down_proj": DOWN,
    "model.layers.{L}.input_layernorm": norm_rule("attn"),
    "model.layers.{L}.post_attention_layernorm": norm_rule("mlp"),
    "model.norm": norm_rule("final"),
    "lm_head": HEAD,
}
_QK_NORM = {  # one gain vector, shared by the heads of a layer
    "model.layers.{L}.self_attn.q_norm": norm_rule("q", "head_dim"),
    "model.layers.{L}.self_attn.k_norm": norm_rule("k", "head_dim"),
}
_SANDWICH = {  # a norm before and after each block
    "model.layers.{L}.post_attention_layernorm": norm_rule("attn.out"),
    "model.layers.{L}.pre_feedforward_layernorm": norm_rule("mlp"),
    "model.layers.{L}.post_feedforward_layernorm": norm_rule("mlp.out"),
}
_PHI3 = {
    "model.layers.{L}.self_attn.qkv_proj": parse_rule(QKV),
    "model.layers.{L}.mlp.gate_up_proj": GATE_UP,
}
_OLMO2 = {
    "model.layers.{L}.self_attn.q_norm": norm_rule("q", "heads"),
    "model.layers.{L}.self_attn.k_norm": norm_rule("k", "kv_heads"),
    "model.layers.{L}.post_attention_layernorm": norm_rule("attn.out"),
    "model.layers.{L}.post_feedforward_layernorm": norm_rule("mlp.out"),
}
_MIXTRAL = {
    "model.layers.{L}.block_sparse_moe.gate": ROUTER,
    "model.layers.{L}.block_sparse_moe.experts.{E}.w1": GATE,
    "model.layers.{L}.block_sparse_moe.experts.{E}.w3": UP,
    "model.layers.{L}.block_sparse_moe.experts.{E}.w2": DOWN,
}
_GPT2 = {
    "transformer.wte": EMBED,
    "transformer.wpe": POSITION,
    "transformer.h.{L}.ln_1": norm_rule("attn"),
    "transformer.h.{L}.attn.c_attn": parse_rule(QKV, "columns"),
    "transformer.h.{L}.attn.c_proj": parse_rule("attn.o[residual,heads]", "columns"),
    "transformer.h.{L}.ln_2": norm_rule("mlp"),
    "transformer.h.{L}.mlp.c_fc": parse_rule("mlp.up[ffn,residual]", "columns"),
    "transformer.h.{L}.mlp.c_proj": parse_rule("mlp.down[residual,ffn]", "columns"),
    "transformer.ln_f": norm_rule("final"),
    "lm_head": HEAD,
}
_NEOX = {
    "gpt_neox.embed_in": EMBED,
    "gpt_neox.layers.{L}.input_layernorm": norm_rule("attn"),
    "gpt_neox.layers.{L}.attention.query_key_value": parse_rule(QKV, "kv groups"),
    "gpt_neox.layers.{L}.attention.dense": O,
    "gpt_neox.layers.{L}.post_attention_layernorm": norm_rule("mlp"),
    "gpt_neox.layers.{L}.mlp.dense_h_to_4h": UP,
    "gpt_neox.layers.{L}.mlp.dense_4h_to_h": DOWN,
    "gpt_neox.final_layer_norm": norm_rule("final"),
    "embed_out": HEAD,
}
_OPT = {
    "model.decoder.embed_tokens": EMBED,
    "model.decoder.embed_positions": POSITION,
    "model.decoder.layers.{L}.self_attn.q_proj": Q,
    "model.decoder.layers.{L}.self_attn.k_proj": K,
    "model.decoder.layers.{L}.self_attn.v_proj": V,
    "model.decoder.layers.{L}.self_attn.out_proj": O,
    "model.decoder.layers.{L}.self_attn_layer_norm": norm_rule("attn"),
    "model.decoder.layers.{L}.fc1": UP,
    "model.decoder.layers.{L}.fc2": DOWN,
    "model.decoder.layers.{L}.final_layer_norm": norm_rule("mlp"),
    "model.decoder.final_layer_norm": norm_rule("final"),
    "lm_head": HEAD,
}
_BERT = {
    "bert.embeddings.word_embeddings": EMBED,
    "bert.embeddings.position_embeddings": POSITION,
    "bert.embeddings.token_type_embeddings": OTHER,
    "bert.embeddings.LayerNorm": norm_rule("embed"),
    "bert.encoder.layer.{L}.attention.self.query": Q,
    "bert.encoder.layer.{L}.attention.self.key": K,
    "bert.encoder.layer.{L}.attention.self.value": V,
    "bert.encoder.layer.{L}.attention.output.dense": O,
    "bert.encoder.layer.{L}.attention.output.LayerNorm": norm_rule("attn.out"),
    "bert.encoder.layer.{L}.intermediate.dense": UP,
    "bert.encoder.layer.{L}.output.dense": DOWN,
    "bert.encoder.layer.{L}.output.LayerNorm": norm_rule("mlp.out"),
    "cls.predictions.decoder": HEAD,  # the transform before it and its bias are `other`
}
_GEMMA3 = _LLAMA | _SANDWICH | _QK_NORM

# model_type -> table. SmolLM, TinyLlama and Yi are of type llama, Pythia is gpt_neox. A path on disk may lack its first
# component (a bare LlamaModel has `layers.0...`). A module that a table does not list has the role `other`.
ARCHITECTURES: dict[str, Mapping[str, Rule]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | _QK_NORM,
    "smollm3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA | _SANDWICH,
    "gemma3_text": _GEMMA3,
    "gemma3": {f"language_model.{path}": rule for path, rule in _GEMMA3.items()},  # multimodal, with a vision tower
    "phi3": _LLAMA | _PHI3,
    "olmo2": _LLAMA | _OLMO2,
    "mixtral": _LLAMA | _MIXTRAL,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "opt": _OPT,
    "bert": _BERT,
}

# model_type -> the modules that inference cannot name, for architectures without a whole table. Their other modules are
# inferred. A whole table says more: that the symmetries of the architecture are known (zoo/units/canonical.py).
PARTIAL: dict[str, Mapping[str, Rule]] = {
    "bloom": {"transformer.h.{L}.self_attention.query_key_value": parse_rule(QKV, "kv groups")},
    "falcon": {
        "transformer.h.{L}.self_attention.query_key_value": parse_rule(QKV, "kv groups"),
        "transformer.h.{L}.ln_attn": norm_rule("attn"),
        "transformer.h.{L}.ln_mlp": norm_rule("mlp"),
    },
    "mpt": {
        "transformer.blocks.{L}.attn.Wqkv": parse_rule(QKV),
        "transformer.blocks.{L}.norm_1": norm_rule("attn"),
        "transformer.blocks.{L}.norm_2": norm_rule("mlp"),
    },
    "gpt_bigcode": {"transformer.h.{L}.attn.c_attn": parse_rule(QKV, "kv groups")},
    "persimmon": {"model.layers.{L}.self_attn.query_key_value": parse_rule(QKV, "kv groups")},
    "gpt_neox_japanese": {
        "gpt_neox_japanese.layers.{L}.attention.query_key_value": parse_rule(QKV, "kv groups"),
        "gpt_neox_japanese.layers.{L}.attention.dense_bias": O,  # of the last layer only
    },
    "codegen": {
        "transformer.h.{L}.attn.qkv_proj": parse_rule(
            "attn.q[heads,residual] + attn.v[kv_heads,residual] + attn.k[kv_heads,residual]", "quarters"
        )
    },
    "openai-gpt": {
        "transformer.tokens_embed": EMBED,
        "transformer.positions_embed": POSITION,
        "transformer.h.{L}.attn.c_attn": parse_rule(QKV, "columns"),
        "transformer.h.{L}.ln_1": norm_rule("attn.out"),
        "transformer.h.{L}.ln_2": norm_rule("mlp.out"),
    },
    "glm": {"model.layers.{L}.mlp.gate_up_proj": GATE_UP},
    "glm4": {"model.layers.{L}.mlp.gate_up_proj": GATE_UP},
}
