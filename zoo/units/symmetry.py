"""Symmetries of a decoder as data, and how they are applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zoo.units.decoder import Decoder, Layer
from zoo.units.lazy import map_items


@dataclass(frozen=True)
class LayerSymmetry:
    """The symmetry of one block. Orders are applied first; the matrices are indexed in the new order."""

    heads: Tensor  # [H] int64: new query head -> old; groups stay whole
    groups: Tensor  # [K] int64: new KV head -> old
    qk: Tensor  # [K, h, h]: k' = qk @ k; q' = qk^-T @ q
    vo: Tensor  # [K, h, h]: v' = vo @ v; o' = vo^-T @ o
    neurons: Tensor  # [F] int64
    scale: Tensor  # [F]: up' = scale * up; down' = down / scale


@dataclass(frozen=True)
class Symmetry:
    """The symmetry of a decoder whose gains are folded: residual vector x -> x @ basis, and one symmetry per block."""

    basis: Tensor  # [d, d], orthogonal
    layers: Sequence[LayerSymmetry]

    def inverse(self) -> Symmetry:
        """The symmetry that undoes this one."""
        return Symmetry(self.basis.mT, map_items(_inverse, self.layers))


def _inverse(s: LayerSymmetry) -> LayerSymmetry:
    groups, heads, neurons = s.groups.argsort(), s.heads.argsort(), s.neurons.argsort()
    qk, vo = torch.linalg.inv(s.qk), torch.linalg.inv(s.vo)
    return LayerSymmetry(heads, groups, qk[groups], vo[groups], neurons, 1 / s.scale[neurons])


def rotate_residual(decoder: Decoder, basis: Tensor) -> Decoder:
    """Maps every residual vector x to x @ basis [d, d]. The architecture must allow this basis (see canonical.py)."""
    permutation = basis.abs()  # for gains that are not 1

    def rotate_layer(layer: Layer) -> Layer:
        weights: dict[str, Any] = {
            r: getattr(layer, r) @ basis
            for r in ("q", "k", "v", "o", "gate", "up", "down")
            if getattr(layer, r) is not None
        }
        bias = {r: b @ basis if r in ("o", "down") else b for r, b in layer.bias.items()}
        # A gain is 1 if it is folded. After a writer it commutes only with signed permutations, which move its entries.
        gain = {s: g if s in ("q", "k") or bool((g == 1).all()) else g @ permutation for s, g in layer.gain.items()}
        shift = {s: t if s in ("q", "k") else t @ basis for s, t in layer.shift.items()}
        return replace(layer, **weights, bias=bias, gain=gain, shift=shift)

    return replace(
        decoder,
        embed=decoder.embed @ basis,
        head=decoder.head @ basis,
        positions=None if decoder.positions is None else decoder.positions @ basis,
        layers=map_items(rotate_layer, decoder.layers),
        gain={s: g if bool((g == 1).all()) else g @ permutation for s, g in decoder.gain.items()},
        shift={s: t @ basis for s, t in decoder.shift.items()},
    )


def apply_symmetry(decoder: Decoder, symmetry: Symmetry) -> Decoder:
    """Applies a symmetry to a decoder whose gains are folded."""
    turned = rotate_residual(decoder, symmetry.basis)
    return replace(turned, layers=map_items(transform_layer, turned.layers, symmetry.layers))


def transform_layer(layer: Layer, s: LayerSymmetry) -> Layer:
    """Applies the symmetry of a block: the order of heads and neurons, and the maps within them."""
    kv, head_dim = s.groups.numel(), layer.q.shape[1]
    share = layer.q.shape[0] // kv
    per_head = torch.arange(kv).repeat_interleave(share)  # new query head -> new KV head
    k_map, v_map = s.qk, s.vo
    q_map, o_map = torch.linalg.inv(s.qk).mT[per_head], torch.linalg.inv(s.vo).mT[per_head]
    bias, gain = dict(layer.bias), dict(layer.gain)
    for r, m, order in (("q", q_map, s.heads), ("k", k_map, s.groups), ("v", v_map, s.groups)):
        if r in bias:
            bias[r] = (m @ bias[r][order].unsqueeze(-1)).squeeze(-1)
    for r in ("gate", "up"):
        if r in bias:
            bias[r] = bias[r][s.neurons] * (s.scale if r == "up" else 1)
    for r, order in (("q", s.heads), ("k", s.groups)):
        if r in gain and gain[r].numel() == order.numel() * head_dim and order.numel() > 1:
            gain[r] = gain[r].unflatten(0, (order.numel(), head_dim))[order].flatten()
    return replace(
        layer,
        q=q_map @ layer.q[s.heads],
        k=k_map @ layer.k[s.groups],
        v=v_map @ layer.v[s.groups],
        o=o_map @ layer.o[s.heads],
        gate=None if layer.gate is None else layer.gate[s.neurons],
        up=layer.up[s.neurons] * s.scale[:, None],
        down=layer.down[s.neurons] / s.scale[:, None],
        bias=bias,
        gain=gain,
    )
