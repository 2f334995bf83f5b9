"""The basis of the residual stream: principal coordinates, principal axes, and alignment to an anchor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.linear_algebra import (
    ROUNDING,
    add_gram,
    closest_basis,
    closest_rotation,
    descending_order,
    skew_signs,
    symmetric_eigenvectors,
)
from zoo.tensors import Metadata
from zoo.units.decoder import Decoder, Layer
from zoo.units.lazy import map_items, outline_of
from zoo.units.symmetry import rotate_residual


@dataclass(frozen=True)
class Anchor:
    """What donors are aligned to: the vocabulary pairs of one donor in its canonical coordinates."""

    tokens: tuple[str, ...]
    pairs: Tensor  # [V, 2, D]: embed_t and head_t, each block scaled to unit RMS


def make_anchor(canonical: Decoder, tokens: tuple[str, ...]) -> Anchor:
    """The anchor that a canonical decoder with these token strings defines."""
    free = _free_width(canonical.metadata)
    pairs = torch.stack([canonical.embed[:, :free], canonical.head[:, :free]], dim=1)
    return Anchor(tokens, pairs / pairs.square().mean((0, 2), keepdim=True).sqrt())


def aligned_basis(decoder: Decoder, tokens: tuple[str, ...], anchor: Anchor) -> Tensor:
    """The orthogonal matrix [d, d] that maps the vocabulary pairs of shared token strings closest to the anchor's
    (orthogonal Procrustes). In a donor wider than the anchor, the further coordinates are sorted by energy.

    Raises UserError if no token string is shared."""
    free = _free_width(decoder.metadata)
    row = {token: i for i, token in enumerate(tokens)}
    shared = [(row[token], j) for j, token in enumerate(anchor.tokens) if token in row]
    if not shared:
        raise UserError("alignment: the donor shares no token string with the anchor; use its principal axes instead")
    own = make_anchor(decoder, tokens).pairs[[i for i, _ in shared], :, :free].flatten(0, 1)
    theirs = anchor.pairs[[j for _, j in shared], :, :].flatten(0, 1).to(own.dtype)
    common = min(free, theirs.shape[1])
    inner = closest_rotation(own.mT @ theirs[:, :common])
    if free > common:
        rest = closest_basis(torch.linalg.svd(inner, full_matrices=True).U[:, common:])
        energy = decoder_energy(decoder)[:free, :free]
        axes = rest @ symmetric_eigenvectors(rest.mT @ energy @ rest)[1]
        inner = torch.cat([inner, _fix_sign(axes, decoder.embed[:, :free])], dim=1)
    return _extend_basis(inner, decoder.metadata.width)


def principal_basis(decoder: Decoder, rotates: bool = True) -> Tensor:
    """The principal axes of all residual vectors in descending order of energy, [d, d].

    With norms after the writers, or without `rotates`: the coordinates sorted by energy, with signs. The decoder is
    folded and in principal coordinates."""
    free = _free_width(decoder.metadata)
    if has_post_norms(decoder) or not rotates:
        energies = torch.stack([rows.square().sum(0) for rows in _each_residual_matrix(decoder)]).sum(0)
        inner = torch.eye(free).to(energies)[:, descending_order(energies[:free])]
    else:
        inner = symmetric_eigenvectors(decoder_energy(decoder)[:free, :free])[1]
    return _extend_basis(_fix_sign(inner, decoder.embed[:, :free]), decoder.metadata.width)


def mean_last_basis(width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Helmert's orthonormal basis [width, width], in columns, on the CPU; the last one is the all-ones direction."""
    i = torch.arange(1, width, dtype=dtype, device="cpu")
    helmert = torch.triu(torch.ones(width, width - 1, dtype=dtype, device="cpu"))
    helmert[torch.arange(1, width, device="cpu"), torch.arange(width - 1, device="cpu")] = -i
    helmert = helmert / (i * (i + 1)).sqrt()
    return torch.cat([helmert, torch.full((width, 1), width**-0.5, dtype=dtype, device="cpu")], dim=1)


def to_principal(decoder: Decoder) -> Decoder:
    """Maps coordinates on disk to principal coordinates.

    They are the same for RMSNorm. For LayerNorm, it rotates by `mean_last_basis` and sets what the writers add to the
    mean to zero, because every reader's norm subtracts it."""
    if decoder.metadata.norm != "layer":
        return decoder
    turned = rotate_residual(decoder, mean_last_basis(decoder.metadata.width).to(decoder.embed))

    def drop(x: Tensor) -> Tensor:
        return torch.cat([x[..., :-1], torch.zeros_like(x[..., -1:])], dim=-1)

    def drop_written(layer: Layer) -> Layer:
        bias = {r: drop(b) if r in ("o", "down") else b for r, b in layer.bias.items()}
        return replace(layer, o=drop(layer.o), down=drop(layer.down), bias=bias)

    layers = map_items(drop_written, turned.layers)
    positions = None if turned.positions is None else drop(turned.positions)
    return replace(turned, embed=drop(turned.embed), positions=positions, layers=layers)


def to_disk_basis(decoder: Decoder) -> Decoder:
    """Maps principal coordinates back to coordinates in which the architecture's own norm is correct."""
    if decoder.metadata.norm != "layer":
        return decoder
    return rotate_residual(decoder, mean_last_basis(decoder.metadata.width).to(decoder.embed).mT)


def residual_vectors(decoder: Decoder) -> Tensor:
    """All residual vectors of a decoder, [N, d]."""
    return torch.cat(list(_each_residual_matrix(decoder)))


def decoder_energy(decoder: Decoder) -> Tensor:
    """The sum of outer products of all residual vectors of a decoder, [d, d]; one matrix at a time is read."""
    width = decoder.metadata.width
    total = torch.zeros(width, width, dtype=decoder.embed.dtype, device=decoder.embed.device)
    for rows in _each_residual_matrix(decoder):
        add_gram(total, rows)
        del rows
    return total.triu() + total.triu(1).mT


def _each_residual_matrix(decoder: Decoder) -> Iterator[Tensor]:
    yield decoder.embed
    yield decoder.head
    for layer in decoder.layers:
        yield from (getattr(layer, r).flatten(0, -2) for r in ("q", "k", "v", "o", "up", "down"))
        if layer.gate is not None:
            yield layer.gate
        del layer  # before the next one is computed


def has_post_norms(decoder: Decoder) -> bool:
    """Whether norms with gains follow the writers or the embedding, so that the basis is not free."""
    return (
        any(s in layer.gain for layer in outline_of(decoder.layers) for s in ("attn.out", "mlp.out"))
        or "embed" in decoder.gain
    )


def _fix_sign(axes: Tensor, data: Tensor) -> Tensor:
    """Flips columns of `axes` so that the third moment of the data along each is positive."""
    along = data @ axes
    return axes * skew_signs(along, dim=0, noise=ROUNDING * along.square().mean(0).max().sqrt())


def _free_width(metadata: Metadata) -> int:
    """Coordinates that may be rotated: LayerNorm fixes the last one, the mean."""
    return metadata.width - 1 if metadata.norm == "layer" else metadata.width


def _extend_basis(inner: Tensor, width: int) -> Tensor:
    basis = torch.eye(width, dtype=inner.dtype, device=inner.device)
    basis[: inner.shape[0], : inner.shape[1]] = inner
    return basis
