"""Canonical form: symmetries that put independently trained decoders in comparable coordinates.

They change no output. The rotation of the residual stream is SliceGPT's (2401.15024). Which symmetries exist depends on
the architecture:

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
all-ones direction. There LayerNorm is an RMSNorm that ignores the last coordinate, so the first coordinates are
a model on their own.

Letters: V vocabulary, d width, H query heads, K KV heads, G = H / K, h head dimension, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.linear_algebra import (
    NEAR_EQUAL,
    ROUNDING,
    descending_order,
    near_equal_groups,
    reference_vectors,
    rotation_to_reference,
    skew_signs,
)
from zoo.targets.architectures import ARCHITECTURES
from zoo.tensors import Metadata
from zoo.units.decoder import Decoder, Layer
from zoo.units.gains import FoldedGains, fold_gains, unfold_gains
from zoo.units.lazy import map_items, outline_of
from zoo.units.residual_basis import Anchor, aligned_basis, has_post_norms, principal_basis, to_disk_basis, to_principal
from zoo.units.symmetry import LayerSymmetry, Symmetry, apply_symmetry, rotate_residual, transform_layer

# Above this condition number, V/O is only rotated: the factors of the SVD would be inexact.
MAX_CONDITION = 1e8


@dataclass(frozen=True)
class Canonical:
    """A decoder in canonical form, with what `undo_canonical` needs."""

    decoder: Decoder  # in principal coordinates, with unit gains
    symmetry: Symmetry  # applied to the folded original
    folded: FoldedGains


def canonicalise(
    decoder: Decoder,
    tokens: tuple[str, ...] | None = None,
    anchor: Anchor | None = None,
    basis: Tensor | None = None,
    rotates: bool = True,
) -> Canonical:
    """Puts a decoder in canonical form: folds its gains, rotates it, sorts heads and neurons. The function does not
    change; use float64.

    It is rotated to its principal axes. Given token strings and an anchor, it is aligned to the anchor's vocabulary
    pairs, unless norms after the writers fix its basis. Given a `basis` [d, d] that the architecture allows, it is
    rotated to that. Without `rotates` it keeps its own coordinates, in descending order of energy.

    Lazy layers stay lazy: here each is read once, if the axes depend on it, and once more when it is used. Then no
    more is in memory than the vocabulary, before and after, and one layer three times over.

    Raises UserError if no token string is shared with the anchor, or if the architecture's symmetries are unknown."""
    require_symmetries(decoder)
    folded, gains = fold_gains(decoder)
    principal = to_principal(folded)
    meta = principal.metadata
    if basis is None:
        # The axes must not depend on arbitrary scales of heads and neurons, so these are balanced first. Their signs
        # depend on the axes, so they are computed afterwards.
        balanced = replace(principal, layers=map_items(lambda layer: balance_layer(layer, meta), principal.layers))
        if rotates and anchor is not None and tokens is not None and not has_post_norms(principal):
            basis = aligned_basis(balanced, tokens, anchor)
        else:
            basis = principal_basis(balanced, rotates)
    turned = rotate_residual(principal, basis)
    pairs = map_items(lambda layer: _to_canonical(layer, meta), turned.layers)
    layers, symmetries = (map_items(itemgetter(i), pairs) for i in range(2))
    return Canonical(replace(turned, layers=layers), Symmetry(basis, symmetries), gains)


def require_symmetries(decoder: Decoder, where: str = "canonical form") -> None:
    """Raises UserError where the symmetries of a decoder are unknown. where: the beginning of the message."""
    architecture, layers = decoder.metadata.architecture, outline_of(decoder.layers)
    if architecture not in ARCHITECTURES:
        # Rotations of rotary pairs are written for pairs of i and i + half, for example; Cohere and GLM have others.
        raise UserError(
            f"{where}: the symmetries of {architecture!r} are unknown; use one of {', '.join(ARCHITECTURES)}"
        )
    if not any(layer.gain for layer in layers) or "final" not in decoder.gain:
        # Some OPT models have norms without parameters, or no final norm; no tensor shows how they normalise.
        raise UserError(
            f"{where}: this {architecture!r} lacks gains of norms, so its symmetries are unknown; use another"
        )
    if decoder.metadata.norm == "layer" and has_post_norms(decoder):
        raise UserError(
            f"{where}: {architecture!r} has LayerNorms after its writers, so it cannot be rotated; use another"
        )


def undo_canonical(canonical: Canonical, tied: bool = False) -> Decoder:
    """The inverse of `canonicalise`. For LayerNorm, the part that its mean subtraction hides is lost."""
    original_order = apply_symmetry(canonical.decoder, canonical.symmetry.inverse())
    return unfold_gains(to_disk_basis(original_order), canonical.folded, tied)


def balance_layer(layer: Layer, metadata: Metadata) -> Layer:
    """A block whose heads and neurons have the scales of the canonical form, in their old order and with any signs.
    The block is folded and in principal coordinates."""
    qk, vo, scale = _qk_symmetry(layer, metadata), _balanced_factors(layer.v, _by_group(layer, "o")), _up_scale(layer)
    device = layer.k.device
    heads, groups = (torch.arange(len(t), device=device) for t in (layer.q, layer.k))
    return transform_layer(
        layer, LayerSymmetry(heads, groups, qk, vo, torch.arange(len(layer.up), device=device), scale)
    )


def layer_symmetry(layer: Layer, metadata: Metadata) -> LayerSymmetry:
    """The symmetry that puts one block in canonical form. The block is folded and in principal coordinates."""
    grouped_o = _by_group(layer, "o")
    qk, vo = _qk_symmetry(layer, metadata), _balanced_factors(layer.v, grouped_o)
    # Only the balanced factors define a head's energy: before, it depends on arbitrary scales.
    values, writes = vo @ layer.v, torch.linalg.inv(vo).mT[:, None] @ grouped_o
    energy = writes.square().sum((2, 3)).sqrt() * values.square().sum((1, 2)).sqrt()[:, None]  # [K, G]
    groups = descending_order(energy.sum(1))
    within = descending_order(energy)
    share = energy.shape[1]
    heads = (groups[:, None] * share + within[groups]).flatten()

    up, down = layer.up.norm(dim=1), layer.down.norm(dim=1)
    importance = up * down * (layer.gate.norm(dim=1) if layer.gate is not None else 1.0)
    neurons = descending_order(importance)
    scale = _up_scale(layer)
    if layer.gate is not None:
        scale = scale * skew_signs(layer.down, dim=1)
    return LayerSymmetry(heads, groups, qk[groups], vo[groups], neurons, scale[neurons])


def _to_canonical(layer: Layer, metadata: Metadata) -> tuple[Layer, LayerSymmetry]:
    symmetry = layer_symmetry(layer, metadata)
    return transform_layer(layer, symmetry), symmetry


def _by_group(layer: Layer, role: str) -> Tensor:
    """The query heads of q or o by KV head: [K, G, h, d]."""
    heads: Tensor = getattr(layer, role)
    return heads.unflatten(0, (len(layer.k), -1))


def _up_scale(layer: Layer) -> Tensor:
    """The factors [F] that balance up and down of each neuron: the value path of a gated MLP is linear in `up`."""
    up, down = layer.up.norm(dim=1), layer.down.norm(dim=1)
    ones = torch.ones_like(up)
    return ones if layer.gate is None else torch.where((up > 0) & (down > 0), (down / up).sqrt(), ones)


def _qk_symmetry(layer: Layer, metadata: Metadata) -> Tensor:
    kv, head_dim = layer.k.shape[:2]
    normed = "q" in layer.gain or "k" in layer.gain
    if metadata.rope_theta is not None:
        return _qk_planes(layer, metadata.rotary.size, normed)
    if normed:
        return torch.eye(head_dim, dtype=layer.k.dtype, device=layer.k.device).repeat(kv, 1, 1)
    return _balanced_factors(layer.k, _by_group(layer, "q"))


def _qk_planes(layer: Layer, rotary: int, normed: bool) -> Tensor:
    """The canonical symmetry of rotary Q/K, [K, h, h].

    Per frequency plane (i, i + rotary/2): the rotation to the principal axes of the plane's vectors, the scale that
    balances queries and keys, and a sign. Under QK-norm only the sign."""
    kv, head_dim, _ = layer.k.shape
    half = rotary // 2
    grouped = layer.q.unflatten(0, (kv, -1)).transpose(1, 2)  # [K, h, G, d]
    keys, queries = layer.k[:, :rotary].unflatten(1, (2, half)), grouped[:, :rotary].unflatten(1, (2, half))
    both = torch.cat([keys.unsqueeze(3), queries], dim=3).flatten(3)  # [K, 2, half, (1+G) d]
    a, b = both[:, 0], both[:, 1]  # [K, half, (1+G) d]
    across, along = 2 * (a * b).sum(-1), a.square().sum(-1) - b.square().sum(-1)
    angle = 0.5 * torch.atan2(across, along)
    # Where all directions of the plane have the same energy, the axis is the one closest to a fixed random vector.
    is_round = torch.hypot(across, along) <= NEAR_EQUAL * (a.square() + b.square()).sum(-1)
    reference = reference_vectors(a.shape[-1], 1)[:, 0].to(a)
    angle = torch.where(is_round, torch.atan2(b @ reference, a @ reference), angle)
    scale = torch.ones_like(angle)
    if normed:
        angle = torch.zeros_like(angle)
    else:
        q_norm = queries.square().mean(3).sum((1, 3)).sqrt()  # RMS over the group's query heads
        k_norm = keys.square().sum((1, 3)).sqrt()
        scale = torch.where((q_norm > 0) & (k_norm > 0), (q_norm / k_norm).sqrt(), scale)
    cos, sin = angle.cos(), angle.sin()
    noise = ROUNDING * keys.square().mean((1, 3)).sqrt()
    scale = scale * skew_signs(cos[..., None] * keys[:, 0] + sin[..., None] * keys[:, 1], dim=-1, noise=noise)
    out = torch.eye(head_dim, dtype=layer.k.dtype, device=layer.k.device).repeat(kv, 1, 1)
    i = torch.arange(half, device=out.device)
    out[:, i, i], out[:, i, i + half] = scale * cos, scale * sin
    out[:, i + half, i], out[:, i + half, i + half] = -scale * sin, scale * cos
    return out


def _balanced_factors(read: Tensor, write: Tensor) -> Tensor:
    """M [K, h, h] such that M @ read and M^-T @ write are the balanced SVD factors of writeᵀ read, largest first.

    read [K, h, d], write [K, G, h, d]. If the product is ill conditioned, M is only the rotation to the principal axes
    of `read`."""
    stacked = write.permute(0, 1, 3, 2).flatten(1, 2)  # [K, G d, h]
    r_write = torch.linalg.qr(stacked).R  # [K, h, h]
    r_read = torch.linalg.qr(read.mT).R
    _, values, chosen = torch.linalg.svd(r_read)  # the rotation
    if read.shape[1] <= read.shape[2]:
        u, s, _ = torch.linalg.svd(r_write @ r_read.mT)
        share = write.shape[1] ** -0.25  # each of G writers then has the norm of the reader
        # M @ read = share sqrt(S) Vt Qᵀ with read = r_readᵀ Qᵀ; from the write side M = share / sqrt(S) Uᵀ r_write,
        # which needs no inverse of a factor.
        exact = share / s.clamp_min(torch.finfo(s.dtype).tiny).sqrt().unsqueeze(-1) * (u.mT @ r_write)
        good = s[:, -1] > s[:, 0] / MAX_CONDITION
        chosen = torch.where(good[:, None, None], exact, chosen)
        values = torch.where(good[:, None], s, values)
    chosen = torch.stack([_turn_near_equal(*head) for head in zip(chosen, values, read, strict=True)])
    images = chosen @ read
    noise = ROUNDING * images.square().mean(-1).amax(-1, keepdim=True).sqrt()
    return chosen * skew_signs(images, dim=-1, noise=noise)[..., None]


def _turn_near_equal(rows: Tensor, values: Tensor, read: Tensor) -> Tensor:
    """Rotates the rows [h, h] of near-equal singular values, in which LAPACK's choice is arbitrary, by a fixed rule.

    The rule looks at what the rows read in the residual stream (read [h, d]), or at the rows if they read nothing."""
    values = torch.nn.functional.pad(values, (0, len(rows) - len(values)))
    images = rows @ read
    noise = ROUNDING * images.norm()
    turned = rows.clone()
    for group in near_equal_groups(values):
        reads_nothing = bool(images[group].norm() <= noise)
        if reads_nothing or group.stop - group.start > 1:
            columns = rows[group].mT if reads_nothing else images[group].mT
            turned[group] = rotation_to_reference(columns).mT @ rows[group]
    return turned
