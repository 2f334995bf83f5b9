"""Canonical form: exact, function-preserving symmetries that put independently trained decoders in comparable
coordinates (design page; the rotation is SliceGPT's, 2401.15024).

What is free depends on the architecture, and only what is exact is used:

residual basis:
- RMSNorm before the readers: any orthogonal matrix, once gains are folded into the readers.
- LayerNorm before the readers: orthogonal matrices that keep the all-ones vector. The mean that LayerNorm subtracts
  lies along it, so the sign of a single coordinate is not free.
- a norm after the writers (Gemma 2/3, OLMo 2): signed permutations. A gain after the norm cannot be folded, and only
  they commute with it.
heads and neurons:
- rotary Q/K: one rotation and scale per frequency plane of a KV head; under QK-norm only the sign of a plane, because
  the norm's gain commutes with nothing more.
- Q/K without rotary embedding: any invertible matrix per KV head, nothing under QK-norm.
- V/O: any invertible matrix per KV head; query heads of a group, and groups, may be permuted.
- MLP: the order of neurons; sign and scale of (up, down) if gated, nothing more if not.

LayerNorm models are written in *principal coordinates* (`to_principal`): an orthonormal basis whose last vector is the
all-ones direction, in which LayerNorm is an RMSNorm that never sees the last coordinate. There a prefix makes sense.

Letters: V vocabulary, d width, H query heads, K KV heads, G = H / K, h head dimension, F neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.targets.roles import ARCHITECTURES
from zoo.tensors import Metadata
from zoo.units.decoder import Decoder, Layer
from zoo.units.gains import fold_gains, unfold_gains
from zoo.units.residual_basis import Anchor, aligned_basis, has_post_norms, principal_basis, to_disk_basis, to_principal
from zoo.units.symmetry import LayerSymmetry, Symmetry, apply_symmetry, rotate_residual

# A donor's V/O product whose condition number is above this is only rotated: the SVD's factors would be inexact.
MAX_CONDITION = 1e8


@dataclass(frozen=True)
class Canonical:
    """`decoder` is in principal coordinates with unit gains; `symmetry` took the folded original there; `folded`
    holds the gains and shifts that were folded away, so that `undo_canonical` can undo everything."""

    decoder: Decoder
    symmetry: Symmetry
    folded: tuple[Mapping[str, Tensor], ...]  # per layer, then the outer ones last


def canonicalise(
    decoder: Decoder, tokens: tuple[str, ...] | None = None, to: Anchor | None = None, basis: Tensor | None = None
) -> Canonical:
    """Folds, rotates (onto the principal axes, or, given token strings and an anchor, onto the anchor's vocabulary
    pairs, or onto the columns of a `basis` [d, d] that the architecture allows) and orders a decoder. The function is
    preserved exactly: use float64 decoders.

    Raises UserError where nothing is shared with the anchor, and for an architecture whose symmetries are not known. A
    post-normed decoder is never aligned, because its residual basis is not free."""
    architecture = decoder.metadata.architecture
    if architecture not in ARCHITECTURES:
        # How an unlisted one pairs its rotary coordinates, say, is not in its config (Cohere and GLM pair neighbours).
        raise UserError(
            f"canonical form: the symmetries of {architecture!r} are not known; known: {', '.join(ARCHITECTURES)}"
        )
    if not any(layer.gain for layer in decoder.layers) or "final" not in decoder.gain:
        # An OPT without norm parameters, or without a final norm, normalises in ways that no tensor shows.
        raise UserError(f"canonical form: this {architecture!r} lacks gains of its norms, so what is free is not known")
    if decoder.metadata.norm == "layer" and has_post_norms(decoder):
        raise UserError(f"canonical form: {architecture!r} has LayerNorms after its writers, which leave no basis free")
    folded, gains = fold_gains(decoder)
    principal = to_principal(folded)
    # The axes are those of balanced heads and neurons, or they would depend on scales that mean nothing; the signs of
    # heads and neurons depend on the axes. So the blocks are brought into form twice.
    unturned = torch.eye(decoder.metadata.width, dtype=decoder.embed.dtype)
    balanced = apply_symmetry(principal, Symmetry(unturned, _layer_symmetries(principal)))
    if basis is not None:
        chosen = basis
    elif to is not None and tokens is not None and not has_post_norms(principal):
        chosen = aligned_basis(balanced, tokens, to)
    else:
        chosen = principal_basis(balanced)
    symmetry = Symmetry(chosen, _layer_symmetries(rotate_residual(principal, chosen)))
    return Canonical(apply_symmetry(principal, symmetry), symmetry, gains)


def undo_canonical(canonical: Canonical, tied: bool = False) -> Decoder:
    """The inverse of `canonicalise`: the original coordinates, order and gains (for LayerNorm, up to what its mean
    subtraction hides)."""
    unturned = apply_symmetry(canonical.decoder, canonical.symmetry.inverse())
    return unfold_gains(to_disk_basis(unturned), canonical.folded, tied)


def layer_symmetry(layer: Layer, metadata: Metadata) -> LayerSymmetry:
    """The element that puts one block (in principal coordinates, folded) in canonical form."""
    kv, head_dim = layer.k.shape[:2]
    normed = "q" in layer.gain or "k" in layer.gain
    grouped_q, grouped_o = (t.unflatten(0, (kv, -1)) for t in (layer.q, layer.o))  # [K, G, h, d]
    if metadata.rope_theta is not None:
        qk = _qk_planes(layer, int(str(metadata.extra.get("rotary_dim", head_dim))), normed)
    elif normed:
        qk = torch.eye(head_dim, dtype=layer.k.dtype).repeat(kv, 1, 1)
    else:
        qk = _balanced_factors(layer.k, grouped_q)
    vo = _balanced_factors(layer.v, grouped_o)
    # A head's energy is that of its balanced factors: before, it depends on scales that mean nothing.
    values, writes = vo @ layer.v, torch.linalg.inv(vo).mT[:, None] @ grouped_o
    energy = writes.square().sum((2, 3)).sqrt() * values.square().sum((1, 2)).sqrt()[:, None]  # [K, G]
    groups = energy.sum(1).argsort(descending=True, stable=True)
    within = energy.argsort(dim=1, descending=True, stable=True)
    share = energy.shape[1]
    heads = (groups[:, None] * share + within[groups]).flatten()

    up, down = layer.up.norm(dim=1), layer.down.norm(dim=1)
    importance = up * down * (layer.gate.norm(dim=1) if layer.gate is not None else 1.0)
    neurons = importance.argsort(descending=True, stable=True)
    scale = torch.ones_like(up)
    if layer.gate is not None:  # the value path is linear in `up`
        scale = torch.where((up > 0) & (down > 0), (down / up).sqrt(), scale)
        scale = torch.where(layer.down.pow(3).sum(1) < 0, -scale, scale)
    return LayerSymmetry(heads, groups, qk[groups], vo[groups], neurons, scale[neurons])


def _layer_symmetries(decoder: Decoder) -> tuple[LayerSymmetry, ...]:
    return tuple(layer_symmetry(layer, decoder.metadata) for layer in decoder.layers)


def _qk_planes(layer: Layer, rotary: int, normed: bool) -> Tensor:
    """[K, h, h]: per frequency plane (i, i + rotary/2), the rotation to the principal axes of the plane's vectors, a
    sign, and the scale that balances queries and keys; under QK-norm the sign alone."""
    kv, head_dim, _ = layer.k.shape
    half = rotary // 2
    grouped = layer.q.unflatten(0, (kv, -1)).transpose(1, 2)  # [K, h, G, d]
    keys, queries = layer.k[:, :rotary].unflatten(1, (2, half)), grouped[:, :rotary].unflatten(1, (2, half))
    both = torch.cat([keys.unsqueeze(3), queries], dim=3).flatten(3)  # [K, 2, half, (1+G) d]
    a, b = both[:, 0], both[:, 1]  # [K, half, (1+G) d]
    angle = 0.5 * torch.atan2(2 * (a * b).sum(-1), a.square().sum(-1) - b.square().sum(-1))
    scale = torch.ones_like(angle)
    if normed:
        angle = torch.zeros_like(angle)
    else:
        q_norm = queries.square().mean(3).sum((1, 3)).sqrt()  # RMS over the group's query heads
        k_norm = keys.square().sum((1, 3)).sqrt()
        scale = torch.where((q_norm > 0) & (k_norm > 0), (q_norm / k_norm).sqrt(), scale)
    cos, sin = angle.cos(), angle.sin()
    skew = (cos[..., None] * keys[:, 0] + sin[..., None] * keys[:, 1]).pow(3).sum(-1)
    scale = torch.where(skew < 0, -scale, scale)
    out = torch.eye(head_dim, dtype=layer.k.dtype).repeat(kv, 1, 1)
    i = torch.arange(half)
    out[:, i, i], out[:, i, i + half] = scale * cos, scale * sin
    out[:, i + half, i], out[:, i + half, i + half] = -scale * sin, scale * cos
    return out


def _balanced_factors(read: Tensor, write: Tensor) -> Tensor:
    """[K, h, h]: M such that M @ read and M^-T @ write are the balanced SVD factors of writeᵀ read, by falling energy.

    read [K, h, d], write [K, G, h, d]. Where the product is ill conditioned, M is only the rotation that orders
    `read` by energy."""
    stacked = write.permute(0, 1, 3, 2).flatten(1, 2)  # [K, G d, h]
    r_write = torch.linalg.qr(stacked).R  # [K, h, h]
    r_read = torch.linalg.qr(read.mT).R
    chosen = torch.linalg.svd(r_read).Vh  # the rotation
    if read.shape[1] <= read.shape[2]:
        u, s, _ = torch.linalg.svd(r_write @ r_read.mT)
        share = write.shape[1] ** -0.25  # each of G writers then has the norm of the reader
        # M @ read = share sqrt(S) Vt Qᵀ with read = r_readᵀ Qᵀ; from the write side M = share / sqrt(S) Uᵀ r_write,
        # which needs no inverse of a factor.
        exact = share / s.clamp_min(torch.finfo(s.dtype).tiny).sqrt().unsqueeze(-1) * (u.mT @ r_write)
        good = s[:, -1] > s[:, 0] / MAX_CONDITION
        chosen = torch.where(good[:, None, None], exact, chosen)
    skew = (chosen @ read).pow(3).sum(-1, keepdim=True)
    return torch.where(skew < 0, -chosen, chosen)
