"""The basis of the residual stream: principal coordinates, principal axes, and alignment to an anchor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.linear_algebra import (
    ROUNDING,
    closest_basis,
    closest_rotation,
    descending_order,
    skew_signs,
    symmetric_eigenvectors,
)
from zoo.tensors import Metadata
from zoo.units.decoder import Decoder
from zoo.units.symmetry import rotate_residual


@dataclass(frozen=True)
class Anchor:
    """What donors are aligned to: the vocabulary pairs of one donor in its canonical coordinates."""

    tokens: tuple[str, ...]
    pairs: Tensor  # [V, 2, D]: embed_t and head_t, each block scaled to unit RMS


def make_anchor(canonical: Decoder, tokens: tuple[str, ...]) -> Anchor:
    """The anchor that a canonical decoder with these token strings defines."""
    pairs = torch.stack([canonical.embed, canonical.head], dim=1)
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
        rows = residual_vectors(decoder)[:, :free] @ rest
        axes = rest @ symmetric_eigenvectors(rows.mT @ rows)[1]
        inner = torch.cat([inner, _fix_sign(axes, decoder.embed[:, :free])], dim=1)
    return _extend_basis(inner, decoder.metadata.width)


def principal_basis(decoder: Decoder) -> Tensor:
    """The principal axes of all residual vectors in descending order of energy, [d, d].

    With norms after the writers: the coordinates sorted by energy, with signs. The decoder is folded and in principal
    coordinates."""
    free = _free_width(decoder.metadata)
    rows = residual_vectors(decoder)[:, :free]
    if has_post_norms(decoder):
        order = descending_order(rows.square().sum(0))
        inner = torch.eye(free, dtype=rows.dtype)[:, order]
    else:
        inner = symmetric_eigenvectors(rows.mT @ rows)[1]
    return _extend_basis(_fix_sign(inner, decoder.embed[:, :free]), decoder.metadata.width)


def mean_last_basis(width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Helmert's orthonormal basis [width, width], in columns; the last one is the all-ones direction."""
    i = torch.arange(1, width, dtype=dtype)
    helmert = torch.triu(torch.ones(width, width - 1, dtype=dtype))
    helmert[torch.arange(1, width), torch.arange(width - 1)] = -i
    helmert = helmert / (i * (i + 1)).sqrt()
    return torch.cat([helmert, torch.full((width, 1), width**-0.5, dtype=dtype)], dim=1)


def to_principal(decoder: Decoder) -> Decoder:
    """Maps coordinates on disk to principal coordinates.

    They are the same for RMSNorm. For LayerNorm, it rotates by `mean_last_basis` and sets what the writers add to the
    mean to zero, because every reader's norm subtracts it."""
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
    """Maps principal coordinates back to coordinates in which the architecture's own norm is correct."""
    if decoder.metadata.norm != "layer":
        return decoder
    return rotate_residual(decoder, mean_last_basis(decoder.metadata.width, decoder.embed.dtype).mT)


def residual_vectors(decoder: Decoder) -> Tensor:
    """All residual vectors of a decoder, [N, d]."""
    rows = [decoder.embed, decoder.head]
    for layer in decoder.layers:
        rows += [getattr(layer, r).flatten(0, -2) for r in ("q", "k", "v", "o", "up", "down")]
        if layer.gate is not None:
            rows.append(layer.gate)
    return torch.cat(rows)


def has_post_norms(decoder: Decoder) -> bool:
    """Whether norms with gains follow the writers or the embedding, so that the basis is not free."""
    return any(s in layer.gain for layer in decoder.layers for s in ("attn.out", "mlp.out")) or "embed" in decoder.gain


def _fix_sign(axes: Tensor, data: Tensor) -> Tensor:
    """Flips columns of `axes` so that the third moment of the data along each is positive."""
    along = data @ axes
    return axes * skew_signs(along, dim=0, noise=ROUNDING * along.square().mean(0).max().sqrt())


def _free_width(metadata: Metadata) -> int:
    """Coordinates that may be rotated: LayerNorm fixes the last one, the mean."""
    return metadata.width - 1 if metadata.norm == "layer" else metadata.width


def _extend_basis(inner: Tensor, width: int) -> Tensor:
    basis = torch.eye(width, dtype=inner.dtype)
    basis[: inner.shape[0], : inner.shape[1]] = inner
    return basis
