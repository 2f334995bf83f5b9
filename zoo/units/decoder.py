"""A decoder as sets of residual vectors: every weight matrix with the residual stream as its last axis.

Letters in shape comments: V vocabulary, P positions, d width, L layers, H query heads, K KV heads, G = H / K query
heads per KV head, h head dimension, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata, join_parts, split_parts


@dataclass(frozen=True)
class Layer:
    """One block. `o` and `down` hold the columns of the matrices on disk: the output of one hidden coordinate."""

    q: Tensor  # [H, h, d]
    k: Tensor  # [K, h, d]
    v: Tensor  # [K, h, d]
    o: Tensor  # [H, h, d]
    up: Tensor  # [F, d]
    down: Tensor  # [F, d]
    gate: Tensor | None = None  # [F, d]; None where the MLP has no gate
    bias: dict[str, Tensor] = field(default_factory=dict)  # q [H, h], k, v [K, h], gate, up [F], o, down [d]
    gain: dict[str, Tensor] = field(default_factory=dict)  # norm site -> the actual multiplier
    shift: dict[str, Tensor] = field(default_factory=dict)  # norm site -> bias of a LayerNorm


@dataclass(frozen=True)
class Decoder:
    """A model as residual vectors. If head and embedding are tied (`metadata.tied`), `head` is a copy of `embed`."""

    metadata: Metadata
    embed: Tensor  # [V, d]
    head: Tensor  # [V, d]
    layers: tuple[Layer, ...]
    positions: Tensor | None = None  # [P, d]
    gain: dict[str, Tensor] = field(default_factory=dict)  # sites `final`, `embed`
    shift: dict[str, Tensor] = field(default_factory=dict)
    head_bias: Tensor | None = None  # [V]


READERS = ("q", "k", "v", "gate", "up")
WRITERS = ("o", "down")
_DISK_ROLES = {
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "o": "attn.o",
    "gate": "mlp.gate",
    "up": "mlp.up",
    "down": "mlp.down",
}
_SITE_READERS = {"attn": ("q", "k", "v"), "mlp": ("gate", "up")}


def site_readers(metadata: Metadata, site: str) -> tuple[str, ...]:
    """The readers that follow a norm. In a parallel block with one shared norm, all follow `attn`."""
    if site == "attn" and metadata.extra.get("shared_norm"):
        return (*_SITE_READERS["attn"], *_SITE_READERS["mlp"])
    return _SITE_READERS.get(site, ())


def require_decoder(blueprint: Blueprint, where: str) -> Metadata:
    """The metadata of a blueprint, if it is a dense decoder with q, k, v, o, up and down in every block.

    Raises UserError that names what is missing."""
    metadata = blueprint.metadata
    if metadata is None:
        raise UserError(f"{where}: no metadata, because it has no config; residual vectors need a decoder's config")
    if metadata.experts:
        raise UserError(f"{where}: {metadata.architecture} has experts; residual units are defined for dense decoders")
    for layer in range(metadata.layers):
        for role in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"):
            found = [spec.name for spec, _ in blueprint.find(role, layer=layer)]
            if not found:
                raise UserError(f"{where}: layer {layer} has no {role}; residual units need a transformer decoder")
            if len(found) > 1:
                names = f"{found[0]}, {found[1]}"
                raise UserError(f"{where}: layer {layer} has {len(found)} {role} ({names}); residual units need one")
    if not any(part.axes[0] == "vocab" for _, part in blueprint.find("embed")):
        raise UserError(
            f"{where}: no embedding [vocabulary, width] found; residual units need one (OPT-350M's is narrower)"
        )
    return metadata


def read_decoder(
    blueprint: Blueprint,
    read: Callable[[str], Tensor],
    dtype: torch.dtype = torch.float64,
    where: str = "checkpoint",
    copy_head: bool = False,
) -> Decoder:
    """Reads a decoder in `dtype`. read: returns a tensor by its name on disk. where: for messages. copy_head: whether a
    base model or a classifier gets a copy of its embedding as head.

    Raises UserError if the blueprint is not a dense decoder, or has no head."""
    meta = require_decoder(blueprint, where)
    offset = meta.gain_offset

    def get(role: str, layer: int | None, kind: str = "weight", site: str | None = None) -> Tensor | None:
        found = blueprint.find(role, layer=layer, kind=kind, site=site)
        if not found:
            return None
        spec, part = found[0]
        return split_parts(spec, read(spec.name).to(dtype))[part.role]

    def norms(layer: int | None, sites: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        gains = {site: get("norm", layer, "weight", site) for site in sites}
        shifts = {site: get("norm", layer, "bias", site) for site in sites}
        return (
            {site: gain + offset for site, gain in gains.items() if gain is not None},
            {site: shift for site, shift in shifts.items() if shift is not None},
        )

    heads = {"q": meta.heads, "k": meta.kv_heads, "v": meta.kv_heads, "o": meta.heads}
    layers = []
    for index in range(meta.layers):
        weights: dict[str, Tensor] = {}
        bias: dict[str, Tensor] = {}
        for short, role in _DISK_ROLES.items():
            w, b = get(role, index), get(role, index, "bias")
            if w is not None:
                w = w.mT if short in WRITERS else w
                weights[short] = w.unflatten(0, (heads[short], -1)) if short in heads else w
            if b is not None:
                bias[short] = b.unflatten(0, (heads[short], -1)) if short in ("q", "k", "v") else b
        gain, shift = norms(index, ("attn", "mlp", "attn.out", "mlp.out", "q", "k"))
        layers.append(Layer(**weights, bias=bias, gain=gain, shift=shift))
    outer_gain, outer_shift = norms(None, ("final", "embed"))
    tables = {
        part.axes[0]: split_parts(spec, read(spec.name).to(dtype))[part.role] for spec, part in blueprint.find("embed")
    }
    head = get("head", None)
    if not (blueprint.has_head or copy_head):
        raise UserError(f"{where}: has no head (a base model or a classifier); give the whole language model")
    return Decoder(
        metadata=meta,
        embed=tables["vocab"],
        head=tables["vocab"].clone() if head is None else head,
        positions=tables.get("position"),
        layers=tuple(layers),
        gain=outer_gain,
        shift=outer_shift,
        head_bias=get("head", None, "bias"),
    )


def write_decoder(decoder: Decoder, blueprint: Blueprint) -> Iterator[tuple[str, Tensor]]:
    """Yields (name on disk, tensor) in the blueprint's order, for each tensor that the decoder holds.

    The shapes must agree, else torch raises ValueError. If the blueprint ties head and embedding, only the embedding is
    written; `gains.tie_head` prepares a decoder for that."""
    meta = blueprint.metadata
    assert meta is not None
    offset = meta.gain_offset
    short_of = {role: short for short, role in _DISK_ROLES.items()}

    def value(part_role: str, axes: tuple[str, ...], spec) -> Tensor | None:  # type: ignore[no-untyped-def]
        layer = decoder.layers[spec.layer] if spec.layer is not None else None
        if part_role == "norm":
            table = (layer or decoder).gain if spec.kind == "weight" else (layer or decoder).shift
            found = table.get(spec.site)
            return None if found is None else found - (offset if spec.kind == "weight" else 0.0)
        if part_role == "embed":
            return {"vocab": decoder.embed, "position": decoder.positions}.get(axes[0])
        if part_role == "head":
            return decoder.head if spec.kind == "weight" else decoder.head_bias
        if layer is None or part_role not in short_of:
            return None
        short = short_of[part_role]
        if spec.kind == "bias":
            b = layer.bias.get(short)
            return None if b is None else b.flatten()
        w = getattr(layer, short)
        w = w.flatten(0, 1) if w.ndim == 3 else w
        return w.mT if short in WRITERS else w

    for spec in blueprint.specs:
        parts = {part.role: value(part.role, part.axes, spec) for part in spec.parts}
        if all(p is not None for p in parts.values()):
            yield spec.name, join_parts(spec, {r: p for r, p in parts.items() if p is not None}).reshape(spec.shape)
