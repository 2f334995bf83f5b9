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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.targets.roles import ARCHITECTURES
from zoo.tensors import Metadata
from zoo.units.decoder import Decoder, Layer, site_readers

# A donor's V/O product whose condition number is above this is only rotated: the SVD's factors would be inexact.
MAX_CONDITION = 1e8


@dataclass(frozen=True)
class LayerSymmetry:
    """One block's group element. Orders are applied first; matrices are indexed in the new order."""

    heads: Tensor  # [H] int64: new query head -> old; groups stay whole
    groups: Tensor  # [K] int64: new KV head -> old
    qk: Tensor  # [K, h, h]: k' = qk @ k; q' = qk^-T @ q
    vo: Tensor  # [K, h, h]: v' = vo @ v; o' = vo^-T @ o
    neurons: Tensor  # [F] int64
    scale: Tensor  # [F]: up' = scale * up; down' = down / scale


@dataclass(frozen=True)
class Symmetry:
    """A group element for a whole decoder whose gains are folded: residual vector x -> x @ basis, and one element per
    block."""

    basis: Tensor  # [d, d], orthogonal
    layers: tuple[LayerSymmetry, ...]

    def inverse(self) -> Symmetry:
        inverted = []
        for s in self.layers:
            groups, heads, neurons = s.groups.argsort(), s.heads.argsort(), s.neurons.argsort()
            qk, vo = torch.linalg.inv(s.qk), torch.linalg.inv(s.vo)
            inverted.append(LayerSymmetry(heads, groups, qk[groups], vo[groups], neurons, 1 / s.scale[neurons]))
        return Symmetry(self.basis.mT, tuple(inverted))


@dataclass(frozen=True)
class Canonical:
    """`decoder` is in principal coordinates with unit gains; `symmetry` took the folded original there; `folded`
    holds the gains and shifts that were folded away, so that `undo_canonical` can undo everything."""

    decoder: Decoder
    symmetry: Symmetry
    folded: tuple[Mapping[str, Tensor], ...]  # per layer, then the outer ones last


# --- gains ------------------------------------------------------------------------------------------------------


def _scaled_readers(layer: Layer, factor: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {r: getattr(layer, r) * g for r, g in factor.items() if getattr(layer, r) is not None}


def fold_gains(decoder: Decoder) -> tuple[Decoder, tuple[Mapping[str, Tensor], ...]]:
    """Folds the gain of every norm that stands before readers into those readers, and its shift into their biases
    (or, where a reader has no bias, into the shift of a gain-free norm). Unties the head. Exact.

    Raises UserError for a gain with exact zeros under a shift that has no bias to go to."""
    layers, folded = [], []
    for layer in decoder.layers:
        gain, shift, bias = dict(layer.gain), dict(layer.shift), dict(layer.bias)
        factor: dict[str, Tensor] = {}
        for site in ("attn", "mlp"):
            readers = [r for r in site_readers(decoder.metadata, site) if getattr(layer, r) is not None]
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
        folded.append({f"gain.{s}": layer.gain[s] for s in ("attn", "mlp") if s in layer.gain}
                      | {f"shift.{s}": layer.shift[s] for s in ("attn", "mlp") if s in layer.shift})  # fmt: skip
        layers.append(replace(layer, gain=gain, shift=shift, bias=bias, **_scaled_readers(layer, factor)))
    gain, shift, head = dict(decoder.gain), dict(decoder.shift), decoder.head
    if "final" in gain:
        if "final" in shift:
            shift["final"] = _divide_by_gain(shift["final"], gain["final"])
        head = head * gain["final"]
        gain["final"] = torch.ones_like(gain["final"])
    folded.append(
        {f"gain.{s}": t for s, t in decoder.gain.items()} | {f"shift.{s}": t for s, t in decoder.shift.items()}
    )
    metadata = replace(decoder.metadata, tied=False)
    return replace(decoder, metadata=metadata, layers=tuple(layers), gain=gain, shift=shift, head=head), tuple(folded)


def _divide_by_gain(shift: Tensor, gain: Tensor) -> Tensor:
    if bool((gain == 0).any()) and bool((shift[gain == 0] != 0).any()):
        raise UserError("canonical form: a norm has gain 0 and a shift at one coordinate, and its readers have no bias")
    return torch.where(gain == 0, torch.zeros_like(shift), shift / torch.where(gain == 0, torch.ones_like(gain), gain))


def unfold_gains(decoder: Decoder, folded: tuple[Mapping[str, Tensor], ...], tied: bool) -> Decoder:
    """The inverse of `fold_gains`. Where a gain is exactly zero the readers' columns are gone, which changes nothing that
    the model computes."""

    def safe(gain: Tensor) -> Tensor:
        return torch.where(gain == 0, torch.ones_like(gain), gain)

    layers = []
    for layer, old in zip(decoder.layers, folded[:-1], strict=True):
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
    gain = {name.removeprefix("gain."): t for name, t in folded[-1].items() if name.startswith("gain.")}
    shift = {name.removeprefix("shift."): t for name, t in folded[-1].items() if name.startswith("shift.")}
    head = decoder.head / safe(gain["final"]) if "final" in gain else decoder.head
    metadata = replace(decoder.metadata, tied=tied)
    # The head kept what LayerNorm hides of the embedding.
    embed = head if tied else decoder.embed
    return replace(decoder, metadata=metadata, layers=tuple(layers), gain=gain, shift=shift, head=head, embed=embed)


def tie_head(decoder: Decoder) -> Decoder:
    """A canonical decoder for an architecture that ties head and embedding: the embedding serves as both, and the
    final gain is the least-squares fit of `head ~ embed * gain`, coordinate by coordinate. Not exact: a rotated
    gain is no longer diagonal."""
    energy = decoder.embed.square().sum(0)
    fitted = (decoder.head * decoder.embed).sum(0) / energy.clamp_min(1e-12 * energy.max())
    metadata = replace(decoder.metadata, tied=True)
    return replace(decoder, metadata=metadata, head=decoder.embed, gain={**decoder.gain, "final": fitted})


# --- applying a symmetry ----------------------------------------------------------------------------------------


def rotate_residual(decoder: Decoder, basis: Tensor) -> Decoder:
    """Every residual vector x -> x @ basis [d, d]. Exact where the module's table allows `basis`."""
    size = basis.abs()
    layers = []
    for layer in decoder.layers:
        weights: dict[str, Any] = {
            r: getattr(layer, r) @ basis
            for r in ("q", "k", "v", "o", "gate", "up", "down")
            if getattr(layer, r) is not None
        }
        bias = {r: b @ basis if r in ("o", "down") else b for r, b in layer.bias.items()}
        # A gain is 1 (folded) or, after a writer, commutes with a signed permutation only: its entries move along.
        gain = {s: g if s in ("q", "k") or bool((g == 1).all()) else g @ size for s, g in layer.gain.items()}
        shift = {s: t if s in ("q", "k") else t @ basis for s, t in layer.shift.items()}
        layers.append(replace(layer, **weights, bias=bias, gain=gain, shift=shift))
    return replace(
        decoder,
        embed=decoder.embed @ basis,
        head=decoder.head @ basis,
        positions=None if decoder.positions is None else decoder.positions @ basis,
        layers=tuple(layers),
        gain={s: g if bool((g == 1).all()) else g @ size for s, g in decoder.gain.items()},
        shift={s: t @ basis for s, t in decoder.shift.items()},
    )


def _transform_layer(layer: Layer, s: LayerSymmetry) -> Layer:
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


def apply_symmetry(decoder: Decoder, symmetry: Symmetry) -> Decoder:
    """Applies a symmetry to a decoder whose gains are folded."""
    turned = rotate_residual(decoder, symmetry.basis)
    layers = tuple(_transform_layer(layer, s) for layer, s in zip(turned.layers, symmetry.layers, strict=True))
    return replace(turned, layers=layers)


# --- the residual basis -----------------------------------------------------------------------------------------


def mean_last_basis(width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """An orthonormal basis [width, width] (columns) whose last vector is the all-ones direction (Helmert's)."""
    i = torch.arange(1, width, dtype=dtype)
    helmert = torch.triu(torch.ones(width, width - 1, dtype=dtype))
    helmert[torch.arange(1, width), torch.arange(width - 1)] = -i
    helmert = helmert / (i * (i + 1)).sqrt()
    return torch.cat([helmert, torch.full((width, 1), width**-0.5, dtype=dtype)], dim=1)


def to_principal(decoder: Decoder) -> Decoder:
    """Disk coordinates -> principal coordinates: nothing for RMSNorm; `mean_last_basis` for LayerNorm, where what the
    writers put along the mean is dropped, because every reader's norm subtracts it."""
    if decoder.metadata.norm != "layer":
        return decoder
    turned = rotate_residual(decoder, mean_last_basis(decoder.metadata.width, decoder.embed.dtype))

    def drop(x: Tensor) -> Tensor:
        return torch.cat([x[..., :-1], torch.zeros_like(x[..., -1:])], dim=-1)

    layers = tuple(
        replace(
            layer,
            o=drop(layer.o),
            down=drop(layer.down),
            bias={r: drop(b) if r in ("o", "down") else b for r, b in layer.bias.items()},
        )
        for layer in turned.layers
    )
    positions = None if turned.positions is None else drop(turned.positions)
    return replace(turned, embed=drop(turned.embed), positions=positions, layers=layers)


def to_disk_basis(decoder: Decoder) -> Decoder:
    """Principal coordinates -> coordinates in which the architecture's own norm is right."""
    if decoder.metadata.norm != "layer":
        return decoder
    return rotate_residual(decoder, mean_last_basis(decoder.metadata.width, decoder.embed.dtype).mT)


def residual_vectors(decoder: Decoder) -> Tensor:
    """All residual vectors of a decoder stacked, [N, d]."""
    rows = [decoder.embed, decoder.head]
    for layer in decoder.layers:
        rows += [getattr(layer, r).flatten(0, -2) for r in ("q", "k", "v", "o", "up", "down")]
        if layer.gate is not None:
            rows.append(layer.gate)
    return torch.cat(rows)


def _fix_sign(axes: Tensor, along: Tensor) -> Tensor:
    """Signs of the columns of `axes` such that the third moment of the data along each is positive."""
    skew = (along @ axes).pow(3).sum(0)
    return axes * torch.where(skew < 0, -1.0, 1.0)


def _has_post_norms(decoder: Decoder) -> bool:
    return any(s in layer.gain for layer in decoder.layers for s in ("attn.out", "mlp.out")) or "embed" in decoder.gain


def _free_width(metadata: Metadata) -> int:
    return metadata.width - 1 if metadata.norm == "layer" else metadata.width


def _extend_basis(inner: Tensor, width: int) -> Tensor:
    basis = torch.eye(width, dtype=inner.dtype)
    basis[: inner.shape[0], : inner.shape[1]] = inner
    return basis


def principal_basis(decoder: Decoder) -> Tensor:
    """[d, d]: the principal axes of all residual vectors by falling energy, or, after post-norms, the coordinates
    sorted by energy with signs. `decoder` is folded and in principal coordinates."""
    free = _free_width(decoder.metadata)
    rows = residual_vectors(decoder)[:, :free]
    if _has_post_norms(decoder):
        order = rows.square().sum(0).argsort(descending=True, stable=True)
        inner = torch.eye(free, dtype=rows.dtype)[:, order]
    else:
        inner = torch.linalg.eigh(rows.mT @ rows).eigenvectors.flip(-1)
    return _extend_basis(_fix_sign(inner, decoder.embed[:, :free]), decoder.metadata.width)


@dataclass(frozen=True)
class Anchor:
    """What donors are aligned to: the vocabulary pairs of a reference in its canonical coordinates."""

    tokens: tuple[str, ...]
    pairs: Tensor  # [V, 2, D]: embed_t and head_t, each block scaled to unit RMS


def make_anchor(canonical: Decoder, tokens: tuple[str, ...]) -> Anchor:
    """The anchor that a canonical decoder with these token strings gives."""
    pairs = torch.stack([canonical.embed, canonical.head], dim=1)
    return Anchor(tokens, pairs / pairs.square().mean((0, 2), keepdim=True).sqrt())


def aligned_basis(decoder: Decoder, tokens: tuple[str, ...], to: Anchor) -> Tensor:
    """[d, d]: the orthogonal matrix that brings the vocabulary pairs of shared token strings closest to the anchor's
    first d coordinates (orthogonal Procrustes); a donor wider than the anchor orders the coordinates that the anchor
    lacks by energy. Raises UserError where no token string is shared."""
    free = _free_width(decoder.metadata)
    here = {token: i for i, token in enumerate(tokens)}
    shared = [(here[token], j) for j, token in enumerate(to.tokens) if token in here]
    if not shared:
        raise UserError("alignment: the donor shares no token string with the anchor; align it by its principal axes")
    mine = make_anchor(decoder, tokens).pairs[[i for i, _ in shared], :, :free].flatten(0, 1)
    theirs = to.pairs[[j for _, j in shared], :, :].flatten(0, 1).to(mine.dtype)
    common = min(free, theirs.shape[1])
    u, _, vt = torch.linalg.svd(mine.mT @ theirs[:, :common], full_matrices=True)
    inner = torch.empty_like(u)
    inner[:, :common] = u[:, :common] @ vt
    if free > common:
        rest = u[:, common:]
        rows = residual_vectors(decoder)[:, :free] @ rest
        inner[:, common:] = _fix_sign(
            rest @ torch.linalg.eigh(rows.mT @ rows).eigenvectors.flip(-1), decoder.embed[:, :free]
        )
    return _extend_basis(inner, decoder.metadata.width)


# --- heads and neurons ------------------------------------------------------------------------------------------


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


# --- the canonical form -----------------------------------------------------------------------------------------


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
    if decoder.metadata.norm == "layer" and _has_post_norms(decoder):
        raise UserError(f"canonical form: {architecture!r} has LayerNorms after its writers, which leave no basis free")
    folded, gains = fold_gains(decoder)
    principal = to_principal(folded)
    # The axes are those of balanced heads and neurons, or they would depend on scales that mean nothing; the signs of
    # heads and neurons depend on the axes. So the blocks are brought into form twice.
    unturned = torch.eye(decoder.metadata.width, dtype=decoder.embed.dtype)
    balanced = apply_symmetry(principal, Symmetry(unturned, _layer_symmetries(principal)))
    if basis is not None:
        chosen = basis
    elif to is not None and tokens is not None and not _has_post_norms(principal):
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
