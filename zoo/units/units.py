"""Units: the residual vectors that belong to one hidden coordinate. A canonical decoder becomes units, and back.

| kind | residual vectors of a unit | one unit per |
|---|---|---|
| vocab | embed_t, head_t | token |
| neuron | gate_i, up_i, down_i (no gate: up_i, down_i) | layer, neuron |
| qk | q_j, q_j', k_j, k_j' of one frequency plane (j, j' = j + head_dim/2) | layer, query head, plane |
| vo | v_j, o_j | layer, query head, component |

Under GQA the query heads of a group hold the same k and v: `units_to_decoder` takes those of the group's first head.

RMSNorm divides by sqrt(width), so the scale of a reader depends on the width. Units hold *width-free* readers, reader x
sqrt(d). Cropping or padding their last axis then needs no further factor. Padding with zeros grows the residual stream
without changing the function, except that the norm's eps has slightly more weight.

Letters: N units, P residual vectors per unit, d width, L layers, H query heads, K KV heads, h head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat
from torch import Tensor

from zoo.errors import UserError
from zoo.targets.architectures import ARCHITECTURES
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.units.decoder import Decoder, Layer, read_decoder
from zoo.units.lazy import outline_of

ROLES: dict[str, tuple[str, ...]] = {
    "vocab": ("embed", "head"),
    "neuron": ("gate", "up", "down"),
    "qk": ("q", "q", "k", "k"),
    "vo": ("v", "o"),
}
READER_ROLES = {"head", "q", "k", "v", "gate", "up"}


@dataclass(frozen=True)
class Units:
    """Units of one kind. Their address is layer, head and slot: int64 [N] each, -1 if it does not apply."""

    kind: str
    vectors: Tensor  # [N, P, d], readers width-free
    layer: Tensor
    head: Tensor  # query head, in the order of groups
    slot: Tensor  # neuron or component in order of importance; frequency plane; token id


def unit_addresses(metadata: Metadata) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The addresses of all units of a decoder of this shape: kind -> (layer, head, slot), int64 [N] each.

    They are in the order of `decoder_to_units`."""
    layers, heads = torch.arange(metadata.layers), torch.arange(metadata.heads)
    none = torch.tensor([-1])

    def grid(*axes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, c = (t.flatten() for t in torch.meshgrid(*axes, indexing="ij"))
        return a, b, c

    return {
        "vocab": grid(none, none, torch.arange(metadata.vocab)),
        "neuron": grid(layers, none, torch.arange(metadata.ffn)),
        "qk": grid(layers, heads, torch.arange(metadata.head_dim // 2)),
        "vo": grid(layers, heads, torch.arange(metadata.head_dim)),
    }


def require_units(decoder: Decoder, where: str) -> None:
    """Raises UserError if units do not describe the whole function of a decoder: it has biases, norms that do not fold,
    or Q/K without full rotary embedding, for example."""
    meta, layers = decoder.metadata, outline_of(decoder.layers)
    sites = {s for layer in layers for s in layer.gain} - {"attn", "mlp"}
    activation, scale = meta.extra.get("activation"), meta.extra.get("embed_scale", 1.0)
    reason = (
        f"the symmetries of {meta.architecture!r} are unknown" if meta.architecture not in ARCHITECTURES
        else "it uses LayerNorm" if meta.norm != "rms"
        else f"its norms at {', '.join(sorted(sites))} do not fold into readers" if sites
        else "its queries and keys are not fully rotary" if meta.rotary.size != meta.head_dim
        else "it has biases" if any(layer.bias for layer in layers)
        else "its MLP has no gate" if any(layer.gate is None for layer in layers)
        else f"its activation is {activation}, not silu" if activation not in ("silu", "swish")
        else "it scales its embedding" if scale != 1.0
        else None
    )  # fmt: skip
    if reason:
        raise UserError(
            f"{where}: {reason}, so units do not describe its whole function; "
            "use a Llama-like decoder (RMSNorm, rotary attention, SwiGLU), or a method without units"
        )


def require_unit_target(blueprint: Blueprint, where: str) -> Metadata:
    """The metadata of a blueprint that units can fill. Raises UserError with the reason if they cannot."""
    decoder = read_decoder(blueprint, lambda name: torch.empty(blueprint[name].shape, device="meta"), where=where)
    require_units(decoder, where)
    return decoder.metadata


def layer_to_units(layer: Layer, metadata: Metadata) -> dict[str, Tensor]:
    """The vectors [n, P, d] of one canonical layer by kind, in its dtype and in the order of `decoder_to_units`."""
    root = metadata.width**0.5
    q, k, v, o = layer.q * root, layer.k * root, layer.v * root, layer.o
    k, v = (repeat(x, "k h d -> (k g) h d", g=metadata.heads // metadata.kv_heads) for x in (k, v))
    assert layer.gate is not None
    return {
        "neuron": torch.stack([layer.gate * root, layer.up * root, layer.down], dim=1),
        "qk": torch.cat([rearrange(x, "n (two p) d -> (n p) two d", two=2) for x in (q, k)], dim=1),
        "vo": torch.stack([v.flatten(0, 1), o.flatten(0, 1)], dim=1),
    }


def vocabulary_to_units(decoder: Decoder, dtype: torch.dtype | None = None) -> Tensor:
    """The vocabulary pairs [V, 2, d] of a canonical decoder, in `dtype` or in its own."""
    pairs = (decoder.embed, decoder.head * decoder.metadata.width**0.5)
    return torch.stack([x.to(dtype or x.dtype) for x in pairs], dim=1)


def decoder_to_units(decoder: Decoder, dtype: torch.dtype | None = None) -> dict[str, Units]:
    """The units of a canonical decoder by kind, in `dtype` or in its own. Each layer is read once."""
    meta = decoder.metadata
    vectors = {"vocab": vocabulary_to_units(decoder, dtype)}
    for index, layer in enumerate(decoder.layers):
        for kind, part in layer_to_units(layer, meta).items():
            if kind not in vectors:
                vectors[kind] = part.new_empty((meta.layers * len(part), *part.shape[1:]), dtype=dtype or part.dtype)
            vectors[kind][index * len(part) : (index + 1) * len(part)] = part
        del layer, part  # before the next layer is computed
    return {kind: Units(kind, vectors[kind], *where) for kind, where in unit_addresses(meta).items()}


def vocabulary_decoder(pairs: Tensor, metadata: Metadata, layers: Sequence[Layer]) -> Decoder:
    """A canonical decoder with unit gains of vocabulary pairs [V, 2, d] and layers."""
    return Decoder(
        metadata=replace(metadata, tied=False),
        embed=pairs[:, 0],
        head=pairs[:, 1] * metadata.width**-0.5,
        layers=layers,
        gain={"final": torch.ones(metadata.width, dtype=pairs.dtype, device=pairs.device)},
    )


def units_to_decoder(units: dict[str, Tensor], metadata: Metadata) -> Decoder:
    """Builds a canonical decoder with unit gains from vectors [N, P, d] by kind.

    They are in the order of `unit_addresses(metadata)`, and d is the metadata's width."""
    root = metadata.width**-0.5
    layers, heads, kv = metadata.layers, metadata.heads, metadata.kv_heads
    per_group = heads // kv
    planes = rearrange(units["qk"], "(l n p) (role two) d -> role l n (two p) d", l=layers, n=heads, role=2)
    v, o = rearrange(units["vo"], "(l n h) role d -> role l n h d", l=layers, n=heads)
    gate, up, down = rearrange(units["neuron"], "(l f) role d -> role l f d", l=layers)
    ones = torch.ones(metadata.width, dtype=v.dtype, device=v.device)
    blocks = tuple(
        Layer(
            q=planes[0, i] * root,
            k=planes[1, i, ::per_group] * root,
            v=v[i, ::per_group] * root,
            o=o[i],
            gate=gate[i] * root,
            up=up[i] * root,
            down=down[i],
            gain={"attn": ones, "mlp": ones},
        )
        for i in range(layers)
    )
    return vocabulary_decoder(units["vocab"], metadata, blocks)
