"""Which tensor does what: one table per architecture from disk names to roles, and inference for the rest.

A name is trusted only where the sizes agree with the config: a tensor whose shape is not what its axes promise has
the role `other` and is left to the architecture's default initialisation.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

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


def _norm(site: str | None, axis: str = "residual") -> Rule:
    return Rule((("norm", (axis,)),), site)


EMBED, HEAD = _rule("embed[vocab,residual]"), _rule("head[vocab,residual]")
POSITION = _rule("embed[position,residual]")
Q, K, V = _rule("attn.q[heads,residual]"), _rule("attn.k[kv_heads,residual]"), _rule("attn.v[kv_heads,residual]")
O = _rule("attn.o[residual,heads]")
GATE, UP, DOWN = _rule("mlp.gate[ffn,residual]"), _rule("mlp.up[ffn,residual]"), _rule("mlp.down[residual,ffn]")
QKV = "attn.q[heads,residual] + attn.k[kv_heads,residual] + attn.v[kv_heads,residual]"
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
    "model.layers.{L}.input_layernorm": _norm("attn"),
    "model.layers.{L}.post_attention_layernorm": _norm("mlp"),
    "model.norm": _norm("final"),
    "lm_head": HEAD,
}
_QK_NORM = {  # one gain vector, shared by the heads of a layer
    "model.layers.{L}.self_attn.q_norm": _norm("q", "head_dim"),
    "model.layers.{L}.self_attn.k_norm": _norm("k", "head_dim"),
}
_SANDWICH = {  # a norm before and after each block
    "model.layers.{L}.post_attention_layernorm": _norm("attn.out"),
    "model.layers.{L}.pre_feedforward_layernorm": _norm("mlp"),
    "model.layers.{L}.post_feedforward_layernorm": _norm("mlp.out"),
}
_PHI3 = {
    "model.layers.{L}.self_attn.qkv_proj": _rule(QKV),
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
    "transformer.h.{L}.attn.c_attn": _rule(QKV, "columns"),
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
    "gpt_neox.layers.{L}.attention.query_key_value": _rule(QKV, "heads"),
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
    "cls.predictions.decoder": HEAD,  # the transform before it and its bias are `other`
}
_GEMMA3 = _LLAMA | _SANDWICH | _QK_NORM

# model_type -> table. SmolLM, TinyLlama, Yi and the like are of type llama; Pythia is gpt_neox. A path may miss its
# first component on disk (a bare LlamaModel has `layers.0...`). What a table does not list is `other`.
ARCHITECTURES: dict[str, Mapping[str, Rule]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | _QK_NORM,
    "smollm3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA | _SANDWICH,
    "gemma3_text": _GEMMA3,
    "gemma3": {f"language_model.{path}": rule for path, rule in _GEMMA3.items()},  # with a vision tower beside it
    "phi3": _LLAMA | _PHI3,
    "olmo2": _LLAMA | _OLMO2,
    "mixtral": _LLAMA | _MIXTRAL,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "opt": _OPT,
    "bert": _BERT,
}

# For architectures without a table: the end of a module path -> rule, the first match counts. Inside a block only.
# Fused projections are not here: their order cannot be seen from a name or a shape.
_INFERRED_ATTENTION = [
    (r"(q_proj|q_lin|query|query_proj|wq|to_q|q)", Q),
    (r"(k_proj|k_lin|key|key_proj|wk|to_k|k)", K),
    (r"(v_proj|v_lin|value|value_proj|wv|to_v|v)", V),
    (r"(o_proj|out_proj|out_lin|c_proj|dense|output\.dense|wo|to_out|proj|o)", O),
]
_INFERRED_MLP = [
    (r"(gate_proj|w1|wi_0)", GATE),
    (r"(up_proj|fc1|fc_in|c_fc|fc|w3|wi_1|wi|lin1|linear1|linear_1|dense_h_to_4h|intermediate\.dense)", UP),
    (r"(down_proj|fc2|fc_out|c_proj|w2|wo|lin2|linear2|linear_2|dense_4h_to_h|output\.dense)", DOWN),
]
_INFERRED_OUTSIDE = [
    (r"(embed_tokens|tok_embeddings|word_embeddings|embeddings|embed_in|embedding|wte|shared)", EMBED),
    (r"(embed_positions|position_embeddings|wpe)", POSITION),
    (r"(lm_head|embed_out|predictions\.decoder)", HEAD),
]
_INFERRED_SITES = [  # norms inside a block; what only the neighbours can tell is in _site
    (r"(input_layernorm|ln_1|ln1|attn_norm|attention_norm|pre_attention_layernorm)", "attn"),
    (r"(ln_2|ln2|ffn_norm|mlp_norm|pre_feedforward_layernorm)", "mlp"),
    (r"(post_self_attn_layernorm|attention\.output\.LayerNorm)", "attn.out"),
    (r"(post_feedforward_layernorm|post_mlp_layernorm|output\.LayerNorm)", "mlp.out"),
]
_FOREIGN = re.compile(r"cross|encoder_attn|encdec|vision|visual|image|audio|rel_pos|relative", re.IGNORECASE)
_NORM_NAME = re.compile(r"norm|(^|[._])ln([._]|\d|$)", re.IGNORECASE)
_STACK = re.compile(r"(^|\.)(layers?|h|blocks?)\.(\d+)(?=\.|$)")
_EXPERT = re.compile(r"(^|\.)experts\.(\d+)(?=\.|$)")


def parse_name(name: str) -> tuple[str, int | None, int | None]:
    """'model.layers.3.mlp.up_proj.weight' -> ('model.layers.{L}.mlp.up_proj', 3, None): path, layer, expert."""
    path = name.removesuffix(".weight").removesuffix(".bias")
    layer, expert = _STACK.search(path), _EXPERT.search(path)
    path = _STACK.sub(r"\1\2.{L}", path, count=1)
    path = _EXPERT.sub(r"\1experts.{E}", path, count=1)
    return path, int(layer[3]) if layer else None, int(expert[2]) if expert else None


def axis_sizes(metadata: Metadata | None, expert: int | None = None) -> dict[str, int]:
    """Axis -> length, for the axes whose length the config fixes."""
    if metadata is None:
        return {}
    ffn = metadata.ffn if expert is None else int(str(metadata.extra.get("expert_ffn", metadata.ffn)))
    return {
        "residual": metadata.width,
        "heads": metadata.heads * metadata.head_dim,
        "kv_heads": metadata.kv_heads * metadata.head_dim,
        "head_dim": metadata.head_dim,
        "ffn": ffn,
        "vocab": metadata.vocab,
    }


def weight_or_bias(name: str) -> str:
    return "bias" if name.endswith("bias") else "weight"


def apply_rule(
    rule: Rule, name: str, shape: tuple[int, ...], dtype: torch.dtype, metadata: Metadata | None
) -> TensorSpec:
    """The spec of the tensor `name` under `rule`; role `other` where its shape is not what the axes promise."""
    _, layer, expert = parse_name(name)
    kind = weight_or_bias(name)
    length = axis_sizes(metadata, expert)
    transposed = rule.layout == "columns" and kind == "weight"
    logical = shape[::-1] if transposed else shape
    parts = []
    for role, axes in rule.parts:
        kept = axes if kind == "weight" else axes[:1]  # a bias has the out axis alone
        is_fused = len(rule.parts) > 1
        parts.append(Part(role, kept, tuple(length.get(a, -1) for a in kept) if is_fused else logical))
    interleave = 0
    fits = bool(parts) and all(_agrees(part, logical, length) for part in parts)
    if rule.layout == "heads":  # query_key_value of one head after the other: every head has all three
        interleave = metadata.heads if metadata else 0
        fits = fits and metadata is not None and metadata.heads == metadata.kv_heads
    if not fits or sum(part.shape[0] for part in parts) != logical[0]:
        return _other(name, shape, dtype)
    return TensorSpec(name, shape, dtype, tuple(parts), layer, kind, rule.site, expert, transposed, interleave)


def _agrees(part: Part, logical: tuple[int, ...], length: Mapping[str, int]) -> bool:
    """Whether a part has the rank and the columns of the tensor, and axes as long as the config says."""
    if not len(part.axes) == len(part.shape) == len(logical) or part.shape[1:] != logical[1:]:
        return False
    return all(length.get(axis, n) == n for axis, n in zip(part.axes, part.shape, strict=True))


def _other(name: str, shape: tuple[int, ...], dtype: torch.dtype, role: str = "other") -> TensorSpec:
    _, layer, expert = parse_name(name)
    part = Part(role, ("other",) * len(shape), shape)
    return TensorSpec(name, shape, dtype, (part,), layer, weight_or_bias(name), expert=expert)


def infer_rule(path: str, shape: tuple[int, ...], metadata: Metadata | None, neighbours: Collection[str]) -> Rule:
    """The rule of a module that no table lists, from the end of its path; `neighbours` are all paths of the model."""
    if _FOREIGN.search(path):
        return OTHER
    inside = "{L}" in path
    attention = re.search(r"att", path.rpartition("{L}")[2], re.IGNORECASE)
    if _NORM_NAME.search(path.rpartition("{L}")[2]) and len(shape) == 1:
        return _infer_norm(path, shape[0], metadata, neighbours)
    candidates = (_INFERRED_ATTENTION if attention else _INFERRED_MLP) if inside else _INFERRED_OUTSIDE
    for pattern, rule in candidates:
        if re.search(rf"(^|\.){pattern}$", path):
            # w1 is the gate where there is a w3, and the only reader where there is none.
            alone = path.endswith("w1") and path[:-1] + "3" not in neighbours
            return UP if alone else rule
    return OTHER


def _infer_norm(path: str, size: int, metadata: Metadata | None, neighbours: Collection[str]) -> Rule:
    leaf = path.rpartition(".")[2]
    if found := re.fullmatch(r"(q|k)_(norm|layernorm|ln)", leaf):
        site = found[1]
        axis = "head_dim" if metadata and size == metadata.head_dim else "heads" if site == "q" else "kv_heads"
        return _norm(site, axis)
    axis = "residual" if metadata else "other"
    if "{L}" in path:
        return _norm(_site(path, neighbours), axis)
    if re.search(r"embed", path, re.IGNORECASE):
        return _norm("embed", axis)
    is_final = re.fullmatch(r"norm|norm_f|ln_f|final_norm|final_layer_?norm", leaf)
    return _norm("final" if is_final else None, axis)


def _site(path: str, neighbours: Collection[str]) -> str | None:
    """Where a norm of a block stands, None where its name does not say (norm1, norm2)."""
    parent, _, leaf = path.rpartition(".")
    if leaf == "post_attention_layernorm":  # before the MLP (Llama), or after attention (Gemma, OLMo 2)
        has_own = f"{parent}.pre_feedforward_layernorm" in neighbours
        return "mlp" if f"{parent}.input_layernorm" in neighbours and not has_own else "attn.out"
    for pattern, site in _INFERRED_SITES:
        if re.search(rf"(^|\.){pattern}$", path):
            return site
    return None


def assign_roles(
    tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
    metadata: Metadata | None,
    convolutions: Collection[str] = (),
    transposed: Collection[str] = (),
) -> tuple[TensorSpec, ...]:
    """Disk names, shapes and dtypes of a model -> specs, by the table of its architecture or, without one, by
    inference. `convolutions` and `transposed` name the weights of nn.Conv* and of transformers' Conv1D."""
    listed = list(tensors)
    table = ARCHITECTURES.get(metadata.architecture) if metadata else None
    if table is not None:
        prefix = next(iter(table)).split(".")[0]
        table = {path.removeprefix(f"{prefix}."): rule for path, rule in table.items()} | dict(table)
        if metadata and metadata.extra.get("post_norm"):
            moved = {"attn": "attn.out", "mlp": "mlp.out"}
            table = {path: replace(rule, site=moved.get(str(rule.site), rule.site)) for path, rule in table.items()}
    neighbours = {parse_name(name)[0] for name, _, _ in listed}
    specs = []
    for name, shape, dtype in listed:
        path = parse_name(name)[0]
        if name in convolutions:
            specs.append(_other(name, shape, dtype, "conv"))
        elif table is not None:
            specs.append(apply_rule(table.get(path, OTHER), name, shape, dtype, metadata))
        else:
            rule = OTHER if path == name else infer_rule(path, shape, metadata, neighbours)
            layout = "columns" if name in transposed else rule.layout
            specs.append(apply_rule(Rule(rule.parts, rule.site, layout), name, shape, dtype, metadata))
    return tuple(specs)
