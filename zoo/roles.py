"""Which tensor does what: one table per architecture from disk names to roles, and inference for the rest.

A name is trusted only where the sizes agree with the config: a tensor whose shape is not what its axes promise has
the role `other` and is left to the architecture's default initialisation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from zoo.tensors import Metadata, Part, TensorSpec


@dataclass(frozen=True)
class Rule:
    """What the tensors of one module are. `parts` are (role, axes as [out, in]) in the order in which they lie on
    disk; `layout` says how: rows | columns (GPT-2's Conv1D, [in, out]) | heads (NeoX, fused head by head)."""

    parts: tuple[tuple[str, tuple[str, ...]], ...]
    site: str | None = None
    layout: str = "rows"


def _rule(text: str, layout: str = "rows") -> Rule:
    """'attn.q[heads,residual] + attn.k[kv_heads,residual]' -> Rule. A norm is written 'norm@attn[residual]'."""
    parts, site = [], None
    for piece in text.split(" + "):
        head, axes = piece.rstrip("]").split("[")
        role, _, at = head.partition("@")
        site = at or site
        parts.append((role, tuple(axes.split(","))))
    return Rule(tuple(parts), site, layout)


EMBED, HEAD = _rule("embed[vocab,residual]"), _rule("head[vocab,residual]")
POSITION = _rule("embed[position,residual]")
Q, K, V = _rule("attn.q[heads,residual]"), _rule("attn.k[kv_heads,residual]"), _rule("attn.v[kv_heads,residual]")
O = _rule("attn.o[residual,heads]")
GATE, UP, DOWN = _rule("mlp.gate[ffn,residual]"), _rule("mlp.up[ffn,residual]"), _rule("mlp.down[residual,ffn]")
QKV_TEXT = "attn.q[heads,residual] + attn.k[kv_heads,residual] + attn.v[kv_heads,residual]"
OTHER = _rule("other[other]")


def _norm(site: str, axis: str = "residual") -> Rule:
    return _rule(f"norm@{site}[{axis}]")


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
    "model.layers.{L}.input_layernorm": _norm("attn"),
    "model.layers.{L}.post_attention_layernorm": _norm("mlp"),
    "model.norm": _norm("final"),
    "lm_head": HEAD,
}
_QK_NORM = {  # per head: one gain vector shared by all heads of a layer
    "model.layers.{L}.self_attn.q_norm": _norm("q", "head_dim"),
    "model.layers.{L}.self_attn.k_norm": _norm("k", "head_dim"),
}
_SANDWICH = {  # a norm before and after each block
    "model.layers.{L}.post_attention_layernorm": _norm("attn.out"),
    "model.layers.{L}.pre_feedforward_layernorm": _norm("mlp"),
    "model.layers.{L}.post_feedforward_layernorm": _norm("mlp.out"),
}
_PHI3 = {
    "model.layers.{L}.self_attn.qkv_proj": _rule(QKV_TEXT),
    "model.layers.{L}.mlp.gate_up_proj": _rule("mlp.gate[ffn,residual] + mlp.up[ffn,residual]"),
}
_OLMO2 = {
    "model.layers.{L}.self_attn.q_norm": _norm("q", "heads"),
    "model.layers.{L}.self_attn.k_norm": _norm("k", "kv_heads"),
    "model.layers.{L}.post_attention_layernorm": _norm("attn.out"),
    "model.layers.{L}.post_feedforward_layernorm": _norm("mlp.out"),
}
_MIXTRAL = {
    "model.layers.{L}.block_sparse_moe.gate": OTHER,  # the router
    "model.layers.{L}.block_sparse_moe.experts.{E}.w1": GATE,
    "model.layers.{L}.block_sparse_moe.experts.{E}.w3": UP,
    "model.layers.{L}.block_sparse_moe.experts.{E}.w2": DOWN,
}
_GPT2 = {
    "transformer.wte": EMBED,
    "transformer.wpe": POSITION,
    "transformer.h.{L}.ln_1": _norm("attn"),
    "transformer.h.{L}.attn.c_attn": _rule(QKV_TEXT, "columns"),
    "transformer.h.{L}.attn.c_proj": _rule("attn.o[residual,heads]", "columns"),
    "transformer.h.{L}.ln_2": _norm("mlp"),
    "transformer.h.{L}.mlp.c_fc": _rule("mlp.up[ffn,residual]", "columns"),
    "transformer.h.{L}.mlp.c_proj": _rule("mlp.down[residual,ffn]", "columns"),
    "transformer.ln_f": _norm("final"),
    "lm_head": HEAD,
}
_NEOX = {
    "gpt_neox.embed_in": EMBED,
    "gpt_neox.layers.{L}.input_layernorm": _norm("attn"),
    "gpt_neox.layers.{L}.attention.query_key_value": _rule(QKV_TEXT, "heads"),
    "gpt_neox.layers.{L}.attention.dense": O,
    "gpt_neox.layers.{L}.post_attention_layernorm": _norm("mlp"),
    "gpt_neox.layers.{L}.mlp.dense_h_to_4h": UP,
    "gpt_neox.layers.{L}.mlp.dense_4h_to_h": DOWN,
    "gpt_neox.final_layer_norm": _norm("final"),
    "embed_out": HEAD,
}
_OPT = {
    "model.decoder.embed_tokens": EMBED,
    "model.decoder.embed_positions": POSITION,
    "model.decoder.layers.{L}.self_attn.q_proj": Q,
    "model.decoder.layers.{L}.self_attn.k_proj": K,
    "model.decoder.layers.{L}.self_attn.v_proj": V,
    "model.decoder.layers.{L}.self_attn.out_proj": O,
    "model.decoder.layers.{L}.self_attn_layer_norm": _norm("attn"),
    "model.decoder.layers.{L}.fc1": UP,
    "model.decoder.layers.{L}.fc2": DOWN,
    "model.decoder.layers.{L}.final_layer_norm": _norm("mlp"),
    "model.decoder.final_layer_norm": _norm("final"),
    "lm_head": HEAD,
}
_BERT = {
    "bert.embeddings.word_embeddings": EMBED,
    "bert.embeddings.position_embeddings": POSITION,
    "bert.embeddings.token_type_embeddings": OTHER,
    "bert.embeddings.LayerNorm": _norm("embed"),
    "bert.encoder.layer.{L}.attention.self.query": Q,
    "bert.encoder.layer.{L}.attention.self.key": K,
    "bert.encoder.layer.{L}.attention.self.value": V,
    "bert.encoder.layer.{L}.attention.output.dense": O,
    "bert.encoder.layer.{L}.attention.output.LayerNorm": _norm("attn.out"),
    "bert.encoder.layer.{L}.intermediate.dense": UP,
    "bert.encoder.layer.{L}.output.dense": DOWN,
    "bert.encoder.layer.{L}.output.LayerNorm": _norm("mlp.out"),
    "cls.predictions": OTHER,  # the masked-language-model transform and its bias
    "cls.predictions.transform.dense": OTHER,
    "cls.predictions.transform.LayerNorm": OTHER,
    "cls.predictions.decoder": HEAD,
}

# model_type -> table. SmolLM, TinyLlama, Yi and the like are of type llama; Pythia is gpt_neox.
ARCHITECTURES: dict[str, Mapping[str, Rule]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | _QK_NORM,
    "smollm3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA | _SANDWICH,
    "gemma3_text": _LLAMA | _SANDWICH | _QK_NORM,
    "phi3": _LLAMA | _PHI3,
    "olmo2": _LLAMA | _OLMO2,
    "mixtral": _LLAMA | _MIXTRAL,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "opt": _OPT,
    "bert": _BERT,
}


def sizes(metadata: Metadata) -> dict[str, int]:
    """Axis -> length, for the axes whose length the config fixes."""
    return {
        "residual": metadata.width,
        "heads": metadata.heads * metadata.head_dim,
        "kv_heads": metadata.kv_heads * metadata.head_dim,
        "head_dim": metadata.head_dim,
        "ffn": metadata.ffn,
        "vocab": metadata.vocab,
        "experts": metadata.experts,
    }


def _other(name: str, shape: tuple[int, ...], dtype: torch.dtype, layer: int | None, expert: int | None) -> TensorSpec:
    part = Part("other", ("other",) * len(shape), shape)
    kind = "bias" if name.endswith("bias") else "weight"
    return TensorSpec(name, shape, dtype, (part,), layer, kind, expert=expert)


def apply(
    rule: Rule,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    metadata: Metadata,
    layer: int | None = None,
    expert: int | None = None,
) -> TensorSpec:
    """The spec of the tensor `name` under `rule`; role `other` where its shape is not what the axes promise."""
    kind = "bias" if name.endswith("bias") else "weight"
    is_matrix = kind == "weight" and len(rule.parts[0][1]) == 2
    transposed = rule.layout == "columns" and is_matrix
    logical = tuple(reversed(shape)) if transposed else shape
    length = sizes(metadata)
    parts = []
    for role, axes in rule.parts:
        kept = axes if kind == "weight" else axes[:1]
        if len(rule.parts) == 1:
            parts.append(Part(role, kept, logical))
        else:
            parts.append(Part(role, kept, tuple(length[a] for a in kept)))
    fits = (
        rule is not OTHER
        and all(len(p.shape) == len(p.axes) == len(logical) for p in parts)
        and all(length.get(a, n) == n for p in parts for a, n in zip(p.axes, p.shape, strict=True))
        and sum(p.shape[0] for p in parts) == logical[0]
        and (len(parts) == 1 or all(p.shape[1:] == logical[1:] for p in parts))
        and (rule.layout != "heads" or metadata.heads == metadata.kv_heads)
    )
    if not fits:
        return _other(name, shape, dtype, layer, expert)
    interleave = metadata.heads if rule.layout == "heads" else 0
    return TensorSpec(name, shape, dtype, tuple(parts), layer, kind, rule.site, expert, transposed, interleave)


def _regex(path: str) -> re.Pattern[str]:
    escaped = re.escape(path).replace(r"\{L\}", r"(?P<layer>\d+)").replace(r"\{E\}", r"(?P<expert>\d+)")
    return re.compile(rf"(?:{escaped})\.(?:weight|bias)")


def assign(tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]], metadata: Metadata) -> tuple[TensorSpec, ...]:
    """Disk names, shapes and dtypes of a model -> specs, by the table of its architecture."""
    table = ARCHITECTURES.get(metadata.architecture, {})
    rules = [(_regex(path), rule) for path, rule in table.items()]
    specs = []
    for name, shape, dtype in tensors:
        for pattern, rule in rules:
            if found := pattern.fullmatch(name):
                number = {k: int(v) for k, v in found.groupdict().items()}
                specs.append(apply(rule, name, shape, dtype, metadata, number.get("layer"), number.get("expert")))
                break
        else:
            specs.append(_other(name, shape, dtype, None, None))
    return tuple(specs)
