"""Gains and shifts of norms: folded into the matrices that read after the norm, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.tensors import Metadata
from zoo.units.decoder import Decoder, Layer, site_readers
from zoo.units.lazy import map_items


@dataclass(frozen=True)
class FoldedGains:
    """Gains and shifts that were folded: those of each layer, and those outside, as `gain.SITE` and `shift.SITE`."""

    layers: Sequence[Mapping[str, Tensor]]
    outer: Mapping[str, Tensor]


def fold_gains(decoder: Decoder) -> tuple[Decoder, FoldedGains]:
    """Folds the gain of each norm into the matrices that read after it, and its shift into their biases; unties the
    head. The function does not change. Returns the decoder, and the gains and shifts that `unfold_gains` needs.

    If a reader has no bias, the shift stays in the norm, divided by the gain. Raises UserError if that gain is zero
    where the shift is not."""

    metadata = decoder.metadata  # lazy layers keep `fold`, which must not keep the vocabulary

    def fold(layer: Layer) -> Layer:
        return _fold_layer(layer, metadata)

    gain, shift, head = dict(decoder.gain), dict(decoder.shift), decoder.head
    if "final" in gain:
        if "final" in shift:
            shift["final"] = _divide_by_gain(shift["final"], gain["final"])
        head = head * gain["final"]
        gain["final"] = torch.ones_like(gain["final"])
    folded = replace(
        decoder,
        metadata=replace(decoder.metadata, tied=False),
        layers=map_items(fold, decoder.layers),
        gain=gain,
        shift=shift,
        head=head,
    )
    return folded, FoldedGains(map_items(_foldable, decoder.layers), _named(decoder.gain, decoder.shift))


def _foldable(layer: Layer) -> dict[str, Tensor]:
    return {name: t for name, t in _named(layer.gain, layer.shift).items() if name.endswith((".attn", ".mlp"))}


def _named(gain: Mapping[str, Tensor], shift: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"gain.{s}": t for s, t in gain.items()} | {f"shift.{s}": t for s, t in shift.items()}


def _fold_layer(layer: Layer, metadata: Metadata) -> Layer:
    gain, shift, bias = dict(layer.gain), dict(layer.shift), dict(layer.bias)
    factor: dict[str, Tensor] = {}
    for site in ("attn", "mlp"):
        readers = [r for r in site_readers(metadata, site) if getattr(layer, r) is not None]
        if site in shift:
            if all(r in bias for r in readers):
                for r in readers:
                    bias[r] = bias[r] + getattr(layer, r) @ shift[site]
                shift[site] = torch.zeros_like(shift[site])
            else:
                shift[site] = _divide_by_gain(shift[site], gain[site])
        if site in gain:
            factor |= dict.fromkeys(readers, gain[site])
            gain[site] = torch.ones_like(gain[site])
    return replace(layer, gain=gain, shift=shift, bias=bias, **_scaled_readers(layer, factor))


def unfold_gains(decoder: Decoder, folded: FoldedGains, tied: bool) -> Decoder:
    """The inverse of `fold_gains`. Where a gain is zero, the readers' columns stay zero, which does not change the
    function."""

    def safe(gain: Tensor) -> Tensor:
        return torch.where(gain == 0, torch.ones_like(gain), gain)

    layers = []
    for layer, old in zip(decoder.layers, folded.layers, strict=True):
        gain, shift, bias = dict(layer.gain), dict(layer.shift), dict(layer.bias)
        factor: dict[str, Tensor] = {}
        for site in ("attn", "mlp"):
            readers = [r for r in site_readers(decoder.metadata, site) if getattr(layer, r) is not None]
            if f"gain.{site}" in old:
                gain[site] = old[f"gain.{site}"]
                factor |= dict.fromkeys(readers, 1 / safe(gain[site]))
            if f"shift.{site}" in old:
                if all(r in bias for r in readers):
                    for r in readers:
                        bias[r] = bias[r] - (getattr(layer, r) * factor[r]) @ old[f"shift.{site}"]
                shift[site] = old[f"shift.{site}"]
        layers.append(replace(layer, gain=gain, shift=shift, bias=bias, **_scaled_readers(layer, factor)))
    gain = {name.removeprefix("gain."): t for name, t in folded.outer.items() if name.startswith("gain.")}
    shift = {name.removeprefix("shift."): t for name, t in folded.outer.items() if name.startswith("shift.")}
    head = decoder.head / safe(gain["final"]) if "final" in gain else decoder.head
    metadata = replace(decoder.metadata, tied=tied)
    # LayerNorm hides a part of the embedding; the head still holds it.
    embed = head if tied else decoder.embed
    return replace(decoder, metadata=metadata, layers=tuple(layers), gain=gain, shift=shift, head=head, embed=embed)


def tie_head(decoder: Decoder) -> Decoder:
    """Ties the head of a canonical decoder to its embedding, for an architecture that requires it.

    The final gain is the least-squares fit of `head ~ embed * gain` per coordinate. It is not exact: a rotated gain is
    not diagonal."""
    energy = decoder.embed.square().sum(0)
    fitted = (decoder.head * decoder.embed).sum(0) / energy.clamp_min(1e-12 * energy.max())
    metadata = replace(decoder.metadata, tied=True)
    return replace(decoder, metadata=metadata, head=decoder.embed, gain={**decoder.gain, "final": fitted})


def _scaled_readers(layer: Layer, factor: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {r: getattr(layer, r) * g for r, g in factor.items() if getattr(layer, r) is not None}


def _divide_by_gain(shift: Tensor, gain: Tensor) -> Tensor:
    if bool((gain == 0).any()) and bool((shift[gain == 0] != 0).any()):
        raise UserError(
            "canonical form: a norm has gain 0 and a shift at one coordinate, and its readers have no bias; use another"
        )
    return torch.where(gain == 0, torch.zeros_like(shift), shift / torch.where(gain == 0, torch.ones_like(gain), gain))
