"""Finds each tensor's role: by the table in architectures.py, else by inference.

A name counts only where the sizes agree with the config. A tensor of another shape gets the role `other` and keeps the
architecture's default initialisation.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch

from zoo.targets.architectures import (
    ARCHITECTURES,
    DOWN,
    EMBED,
    GATE,
    HEAD,
    OTHER,
    PARTIAL,
    POSITION,
    ROUTER,
    UP,
    K,
    O,
    Q,
    Rule,
    V,
    norm_rule,
    parse_rule,
)
from zoo.tensors import Metadata, Part, TensorSpec

# For architectures without a table: end of a module path -> rule; the first match counts. Inside a block only. Fused
# projections are not inferred: neither name nor shape tells their order.
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
_INFERRED_EXPERTS = [  # of architectures with experts
    (r"\.(mlp|block_sparse_moe|moe|feed_forward)\.(gate|router|router\.gate|router\.layer|gate\.wg)$", ROUTER),
    (r"\.e_score_correction_bias$", ROUTER),
    (r"\.shared_expert_gate$", parse_rule("other[fixed,residual]")),
    (r"\.shared_(experts?|mlp)\.gate_proj$", parse_rule("mlp.gate[shared_ffn,residual]")),
    (r"\.shared_(experts?|mlp)\.up_proj$", parse_rule("mlp.up[shared_ffn,residual]")),
    (r"\.shared_(experts?|mlp)\.down_proj$", parse_rule("mlp.down[residual,shared_ffn]")),
]
_LATENT_ATTENTION = {
    "q_proj": parse_rule("other[fixed,residual]"),
    "q_a_proj": parse_rule("other[fixed,residual]"),
    "q_a_layernorm": parse_rule("other[fixed]"),
    "q_b_proj": parse_rule("other[fixed,fixed]"),
    "kv_a_proj_with_mqa": parse_rule("other[fixed,residual]"),
    "kv_a_layernorm": parse_rule("other[fixed]"),
    "kv_b_proj": parse_rule("other[fixed,fixed]"),
    "o_proj": parse_rule("other[residual,fixed]"),
}
_INFERRED_OUTSIDE = [
    (r"(embed_tokens|tok_embeddings|word_embeddings|embeddings|embed_in|embedding|wte|shared)", EMBED),
    (r"(embed_positions|position_embeddings|wpe)", POSITION),
    (r"(lm_head|embed_out|predictions\.decoder)", HEAD),
]
_INFERRED_NORM_SITES = [  # norms inside a block; `_norm_site` has the rules that depend on other modules
    (r"(input_layernorm|ln_1|ln1|attn_norm|attention_norm|pre_attention_layernorm)", "attn"),
    (r"(ln_2|ln2|ffn_norm|mlp_norm|pre_feedforward_layernorm)", "mlp"),
    (r"(post_self_attn_layernorm|attention\.output\.LayerNorm)", "attn.out"),
    (r"(post_feedforward_layernorm|post_mlp_layernorm|output\.LayerNorm)", "mlp.out"),
]
_AFTER_BLOCKS = {"attn": "attn.out", "mlp": "mlp.out"}  # the sites of norms in models that normalise after a block
_FOREIGN = re.compile(r"cross|encoder_attn|encdec|vision|visual|image|audio|rel_pos|relative", re.IGNORECASE)
_NORM_NAME = re.compile(r"norm|(^|[._])ln([._]|\d|$)", re.IGNORECASE)
_STACK = re.compile(r"(^|\.)(layers?|h|blocks?)\.(\d+)(?=\.|$)")
_EXPERT = re.compile(r"(^|\.)experts\.(\d+)(?=\.|$)")


def parse_name(name: str) -> tuple[str, int | None, int | None]:
    """The path, layer and expert of a name.

    'model.layers.3.mlp.up_proj.weight' -> ('model.layers.{L}.mlp.up_proj', 3, None).
    """
    path = name.removesuffix(".weight").removesuffix(".bias")
    layer, expert = _STACK.search(path), _EXPERT.search(path)
    path = _STACK.sub(r"\1\2.{L}", path, count=1)
    path = _EXPERT.sub(r"\1experts.{E}", path, count=1)
    return path, int(layer[3]) if layer else None, int(expert[2]) if expert else None


def axis_sizes(metadata: Metadata | None, expert: int | None = None, layer: int | None = None) -> dict[str, int]:
    """Axis -> size, for the axes whose size the config determines. layer: for sizes that differ between layers."""
    if metadata is None:
        return {}
    metadata = metadata.at_layer(layer)
    ffn = metadata.ffn if expert is None else int(str(metadata.extra.get("expert_ffn", metadata.ffn)))
    return {
        "residual": metadata.width,
        "heads": metadata.heads * metadata.head_dim,
        "kv_heads": metadata.kv_heads * metadata.head_dim,
        "head_dim": metadata.head_dim,
        "ffn": ffn,
        "vocab": metadata.vocab,
        "experts": metadata.experts,
    }


def weight_or_bias(name: str) -> str:
    return "bias" if name.endswith("bias") else "weight"


def apply_rule(
    rule: Rule, name: str, shape: tuple[int, ...], dtype: torch.dtype, metadata: Metadata | None
) -> TensorSpec:
    """The spec of a tensor by its rule. Its role is `other` where the shape does not agree with the axes."""
    _, layer, expert = parse_name(name)
    kind = weight_or_bias(name)
    length = axis_sizes(metadata, expert, layer)
    transposed = rule.layout == "columns" and kind == "weight"
    logical = shape[::-1] if transposed else shape
    parts = []
    for role, axes in rule.parts:
        part_axes = axes if kind == "weight" else axes[:1]  # a bias has only the out axis
        is_fused = len(rule.parts) > 1
        part_shape = tuple(length.get(a, -1) for a in part_axes) if is_fused else logical
        parts.append(Part(role, part_axes, part_shape))
    interleave = {"kv groups": metadata.kv_heads if metadata else 0, "quarters": 4}.get(rule.layout, 0)
    fits = bool(parts) and all(_agrees_with_config(part, logical, length) for part in parts)
    if interleave:
        fits = fits and not any(part.shape[0] % interleave for part in parts)
    if not fits or sum(part.shape[0] for part in parts) != logical[0]:
        return _spec_without_axes(name, shape, dtype)
    return TensorSpec(name, shape, dtype, tuple(parts), layer, kind, rule.site, expert, transposed, interleave)


def _agrees_with_config(part: Part, logical: tuple[int, ...], length: Mapping[str, int]) -> bool:
    """Whether a part has the columns of the whole tensor and the sizes that the config gives its axes."""
    if not len(part.axes) == len(part.shape) == len(logical) or part.shape[1:] != logical[1:]:
        return False
    return all(length.get(axis, n) == n for axis, n in zip(part.axes, part.shape, strict=True))


def _spec_without_axes(name: str, shape: tuple[int, ...], dtype: torch.dtype, role: str = "other") -> TensorSpec:
    _, layer, expert = parse_name(name)
    part = Part(role, ("other",) * len(shape), shape)
    return TensorSpec(name, shape, dtype, (part,), layer, weight_or_bias(name), expert=expert)


def infer_rule(
    path: str, shape: tuple[int, ...], metadata: Metadata | None, neighbours: Collection[str], layer: int | None = None
) -> Rule:
    """The rule of a module without a table, from the end of its path; `neighbours` are all paths of the model."""
    if _FOREIGN.search(path):
        return OTHER
    if (rule := _infer_latent(path, neighbours) or _infer_experts(path, metadata)) is not None:
        return rule
    inside = "{L}" in path
    attention = re.search(r"att", path.rpartition("{L}")[2], re.IGNORECASE)
    if _NORM_NAME.search(path.rpartition("{L}")[2]) and len(shape) == 1:
        return _infer_norm(path, shape[0], metadata.at_layer(layer) if metadata else None, neighbours)
    candidates = (_INFERRED_ATTENTION if attention else _INFERRED_MLP) if inside else _INFERRED_OUTSIDE
    for pattern, rule in candidates:
        if re.search(rf"(^|\.){pattern}$", path):
            # w1 is the gate beside a w3, and the only reader without one.
            is_only_reader = path.endswith("w1") and path[:-1] + "3" not in neighbours
            return UP if is_only_reader else rule
    return OTHER


def _infer_latent(path: str, neighbours: Collection[str]) -> Rule | None:
    """The rule of a module of latent attention (DeepSeek-V2), where keys and values are made from a latent vector.

    Its heads have no single dimension, so that they keep their number and order in a transfer.
    """
    parent, _, leaf = path.rpartition(".")
    return _LATENT_ATTENTION.get(leaf) if f"{parent}.kv_b_proj" in neighbours else None


def _infer_experts(path: str, metadata: Metadata | None) -> Rule | None:
    """The rule of a router, of what belongs to it, or of an MLP beside the experts."""
    if metadata is None or not metadata.experts:
        return None
    return next((rule for pattern, rule in _INFERRED_EXPERTS if re.search(pattern, path)), None)


def _infer_norm(path: str, size: int, metadata: Metadata | None, neighbours: Collection[str]) -> Rule:
    leaf = path.rpartition(".")[2]
    if found := re.fullmatch(r"(q|k)_(norm|layernorm|ln)", leaf):
        site = found[1]
        axis = "head_dim" if metadata and size == metadata.head_dim else "heads" if site == "q" else "kv_heads"
        return norm_rule(site, axis)
    axis = "residual" if metadata else "other"
    if "{L}" in path:
        return norm_rule(_norm_site(path, neighbours), axis)
    if re.search(r"embed", path, re.IGNORECASE):
        return norm_rule("embed", axis)
    is_final = "lm_head" not in path and re.fullmatch(r"norm|norm_f|ln_f|final_norm|(final_)?layer_?norm", leaf)
    return norm_rule("final" if is_final else None, axis)


def _norm_site(path: str, neighbours: Collection[str]) -> str | None:
    """The site of a norm in a block, None where its name does not tell (norm1, norm2)."""
    parent, _, leaf = path.rpartition(".")
    if leaf == "post_attention_layernorm":  # before the MLP (Llama), or after attention (Gemma, OLMo 2)
        has_own = f"{parent}.pre_feedforward_layernorm" in neighbours
        return "mlp" if f"{parent}.input_layernorm" in neighbours and not has_own else "attn.out"
    for pattern, site in _INFERRED_NORM_SITES:
        if re.search(rf"(^|\.){pattern}$", path):
            return site
    return None


def norm_sites(names: Collection[str], metadata: Metadata) -> tuple[str, ...]:
    """The sites of norms by the names of their modules, sorted."""
    paths = {parse_name(name)[0] for name in names}
    table = with_bare_paths(ARCHITECTURES.get(metadata.architecture)) or {}
    found = {(table.get(path) or _infer_norm(path, 0, None, paths)).site for path in paths}
    moved = _AFTER_BLOCKS if metadata.extra.get("post_norm") else {}
    return tuple(sorted({moved.get(site, site) for site in found if site}))


def with_bare_paths(table: Mapping[str, Rule] | None) -> dict[str, Rule] | None:
    """A table that also holds each path without its first component, as a model without a head has it on disk."""
    if table is None:
        return None
    prefix = next(iter(table)).split(".")[0]
    return {path.removeprefix(f"{prefix}."): rule for path, rule in table.items()} | dict(table)


def assign_roles(
    tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
    metadata: Metadata | None,
    convolutions: Collection[str] = (),
    transposed: Collection[str] = (),
) -> tuple[TensorSpec, ...]:
    """The specs of a model's tensors, by the table of its architecture or, without one, by inference.

    tensors: (name on disk, shape, dtype). convolutions and transposed: the names of the weights of nn.Conv* and of
    transformers' Conv1D.
    """
    tensors = list(tensors)
    table = with_bare_paths(ARCHITECTURES.get(metadata.architecture)) if metadata else None
    partial = with_bare_paths(PARTIAL.get(metadata.architecture)) or {} if metadata else {}
    if table is not None and metadata and metadata.extra.get("post_norm"):
        table = {path: replace(rule, site=_AFTER_BLOCKS.get(str(rule.site), rule.site)) for path, rule in table.items()}
    neighbours = {parse_name(name)[0] for name, _, _ in tensors}
    specs = []
    for name, shape, dtype in tensors:
        path, layer, _ = parse_name(name)
        if name in convolutions:
            specs.append(_spec_without_axes(name, shape, dtype, "conv"))
        elif table is not None:
            specs.append(apply_rule(table.get(path, OTHER), name, shape, dtype, metadata))
        else:
            rule = OTHER if path == name else partial.get(path) or infer_rule(path, shape, metadata, neighbours, layer)
            layout = "columns" if name in transposed else rule.layout
            specs.append(apply_rule(Rule(rule.parts, rule.site, layout), name, shape, dtype, metadata))
    return tuple(specs)
