"""A decoder as sets of residual vectors: every weight matrix with the residual stream as its last axis.

Letters in shape comments: V vocabulary, P positions, d width, L layers, H query heads, K KV heads, G = H / K query
heads per KV head, h head dimension, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata, join_parts, split_parts
from zoo.units.lazy import LazySequence


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
    """A model as residual vectors. If head and embedding are tied (`metadata.tied`), both are one tensor."""

    metadata: Metadata
    embed: Tensor  # [V, d]
    head: Tensor  # [V, d]
    layers: Sequence[Layer]
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


class _Reader:
    """Reads the tensors of a decoder by role, in one dtype."""

    def __init__(self, blueprint: Blueprint, read: Callable[[str], Tensor], dtype: torch.dtype) -> None:
        assert blueprint.metadata is not None
        self.blueprint, self.metadata, self._read, self.dtype = blueprint, blueprint.metadata, read, dtype
        self._parts: tuple[str, dict[str, Tensor]] = ("", {})  # of the tensor that was read last

    def parts(self, name: str) -> dict[str, Tensor]:
        """The parts of a tensor by role. Those of a fused one are often read one after the other."""
        if self._parts[0] != name:
            self._parts = (name, split_parts(self.blueprint[name], self._read(name).to(self.dtype)))
        return self._parts[1]

    def release(self) -> None:
        """Lets go of the tensor that was read last."""
        self._parts = ("", {})

    def get(self, role: str, layer: int | None, kind: str = "weight", site: str | None = None) -> Tensor | None:
        found = self.blueprint.find(role, layer=layer, kind=kind, site=site)
        return self.parts(found[0][0].name)[found[0][1].role] if found else None

    def norms(self, layer: int | None, sites: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The gains and the shifts of the norms at these sites."""
        gains = {site: self.get("norm", layer, "weight", site) for site in sites}
        shifts = {site: self.get("norm", layer, "bias", site) for site in sites}
        return (
            {site: gain + self.metadata.gain_offset for site, gain in gains.items() if gain is not None},
            {site: shift for site, shift in shifts.items() if shift is not None},
        )

    def layer(self, index: int) -> Layer:
        meta = self.metadata
        heads = {"q": meta.heads, "k": meta.kv_heads, "v": meta.kv_heads, "o": meta.heads}
        weights: dict[str, Tensor] = {}
        bias: dict[str, Tensor] = {}
        for short, role in _DISK_ROLES.items():
            w = self.get(role, index)
            if w is not None:
                w = w.mT if short in WRITERS else w
                weights[short] = w.unflatten(0, (heads[short], -1)) if short in heads else w
        for short, role in _DISK_ROLES.items():
            b = self.get(role, index, "bias")
            if b is not None:
                bias[short] = b.unflatten(0, (heads[short], -1)) if short in ("q", "k", "v") else b
        gain, shift = self.norms(index, ("attn", "mlp", "attn.out", "mlp.out", "q", "k"))
        self.release()
        return Layer(**weights, bias=bias, gain=gain, shift=shift)


def read_decoder(
    blueprint: Blueprint,
    read: Callable[[str], Tensor],
    dtype: torch.dtype = torch.float64,
    where: str = "checkpoint",
    copy_head: bool = False,
    lazy: bool = False,
) -> Decoder:
    """Reads a decoder in `dtype`. read: returns a tensor by its name on disk. where: for messages. copy_head: whether a
    base model or a classifier gets its embedding as head. lazy: a layer is read each time it is used, and does not
    stay in memory.

    Raises UserError if the blueprint is not a dense decoder, or has no head."""
    meta = require_decoder(blueprint, where)
    if not (blueprint.has_head or copy_head):
        raise UserError(f"{where}: has no head (a base model or a classifier); give the whole language model")
    reader = _Reader(blueprint, read, dtype)
    layers: Sequence[Layer]
    if lazy:
        outline = _Reader(blueprint, lambda name: torch.empty(blueprint[name].shape, device="meta"), dtype)
        layers = LazySequence(reader.layer, meta.layers, tuple(outline.layer(i) for i in range(meta.layers)))
    else:
        layers = tuple(reader.layer(i) for i in range(meta.layers))
    gain, shift = reader.norms(None, ("final", "embed"))
    tables = {part.axes[0]: reader.parts(spec.name)[part.role] for spec, part in blueprint.find("embed")}
    head, head_bias = reader.get("head", None), reader.get("head", None, "bias")
    reader.release()  # lazy layers keep the reader, which must not keep the vocabulary
    return Decoder(
        metadata=meta,
        embed=tables["vocab"],
        head=tables["vocab"] if head is None else head,
        positions=tables.get("position"),
        layers=layers,
        gain=gain,
        shift=shift,
        head_bias=head_bias,
    )


def write_decoder(decoder: Decoder, blueprint: Blueprint) -> Iterator[tuple[str, Tensor]]:
    """Yields (name on disk, tensor) in the blueprint's order, for each tensor that the decoder holds. Lazy layers are
    computed once each if the blueprint names the tensors of a layer one after the other.

    The shapes must agree, else torch raises ValueError. If the blueprint ties head and embedding, only the embedding is
    written; `gains.tie_head` prepares a decoder for that."""
    meta = blueprint.metadata
    assert meta is not None
    offset = meta.gain_offset
    short_of = {role: short for short, role in _DISK_ROLES.items()}
    index: int | None = None
    layer: Layer | None = None  # the layer `index`, the last one that was used

    def value(part_role: str, axes: tuple[str, ...], spec) -> Tensor | None:  # type: ignore[no-untyped-def]
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
        if spec.layer != index:
            index, layer = spec.layer, None  # frees the last layer before the next one is computed
            layer = None if index is None else decoder.layers[index]
        parts = {part.role: value(part.role, part.axes, spec) for part in spec.parts}
        if all(p is not None for p in parts.values()):
            yield spec.name, join_parts(spec, {r: p for r, p in parts.items() if p is not None}).reshape(spec.shape)
