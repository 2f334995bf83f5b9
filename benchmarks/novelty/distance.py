"""Distance of a model to every donor, in coordinates that do not depend on how their weights are stored.

Two models that compute the same function can have unrelated weights; 2506.07998 measures distances after such
symmetries are removed. So the model is put into canonical form, and its residual stream is rotated onto the
donor's by the token strings that both have (`zoo.units.canonical`). Each unit is then compared with the donor's units
of the same kind, because heads and neurons have no order and other shapes have other numbers of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.donors.donor import Donor
from zoo.errors import UserError
from zoo.units.aligned import read_donor_decoder, token_strings
from zoo.units.canonical import canonicalise
from zoo.units.decoder import Decoder
from zoo.units.residual_basis import Anchor, make_anchor
from zoo.units.resizing import to_width
from zoo.units.units import decoder_to_units

# Residual vectors of a unit whose sign can change together without changing the function: the last two of a neuron
# (up, down), both of a value-output component. Tokens and rotary planes have none.
FREE_SIGNS = {"neuron": slice(1, 3), "vo": slice(0, 2)}
UNITS_AT_ONCE = 1024  # units compared at a time


@dataclass(frozen=True)
class Frame:
    """A donor in its own canonical coordinates; units are float32 [N, P, d] by kind, tokens those of its rows."""

    name: str
    anchor: Anchor
    units: Mapping[str, Tensor]


@dataclass(frozen=True)
class Distance:
    """Relative distance of a model to one donor.

    kinds: by kind of unit, the root of sum |u - nearest|^2 / sum |u|^2, where `nearest` is the donor's unit nearest to
           u. It is computed with the units as they are and with the units brought to the size of the donor's. The
           smaller value counts, so a copy with scaled units is near.
    total: root mean square over the kinds. 0 is a copy. A unit unrelated to the donor's has distance sqrt(2) from each
           of them, and less from the nearest of many.
    sizes: by kind, the root mean square of the units divided by that of the donor's units.
    """

    donor: str
    total: float
    kinds: Mapping[str, float]
    sizes: Mapping[str, float]


def donor_frame(donor: Donor) -> Frame:
    """A donor in its canonical coordinates. UserError if its units do not hold its whole function."""
    canonical = canonicalise(read_donor_decoder(donor)).decoder
    tokens = token_strings(donor)
    return Frame(donor.name, make_anchor(canonical, tokens), _unit_vectors(canonical))


def distance(decoder: Decoder, tokens: tuple[str, ...], to: Frame) -> Distance:
    """Relative distance of a decoder of any shape to a donor.

    decoder: as `read_donor_decoder` returns it (float64); tokens: the strings of its vocabulary's rows. UserError if
    the two share no token string, because their residual streams cannot be aligned then.
    """
    return _to_distance(to, *_unit_shares(decoder, tokens, to))


def distance_to_all_donors(decoder: Decoder, tokens: tuple[str, ...], frames: Iterable[Frame]) -> float:
    """Relative distance to the units of all donors together.

    Every unit is compared with the nearest unit of any donor, so a model assembled from units of several donors is
    near. Vocabulary rows whose token no donor has are left out."""
    return nearest_and_combined_distance(decoder, tokens, frames)[1]


def nearest_donor_distance(decoder: Decoder, tokens: tuple[str, ...], frames: Iterable[Frame]) -> Distance:
    """The distance to the donor that is nearest in total."""
    return nearest_and_combined_distance(decoder, tokens, frames)[0]


def nearest_and_combined_distance(
    decoder: Decoder, tokens: tuple[str, ...], frames: Iterable[Frame]
) -> tuple[Distance, float]:
    """(distance to the nearest donor, distance to all donors together), with one alignment to each donor."""
    found = [(to, *_unit_shares(decoder, tokens, to)) for to in frames]
    near = min((_to_distance(*one) for one in found), key=lambda d: (d.total, d.donor))
    kinds = found[0][1]
    together = {kind: _root_of_sum(torch.cat([shares[kind] for _, shares, _ in found]).amin(0)) for kind in kinds}
    return near, _mean_over_kinds(together)


def _to_distance(to: Frame, shares: Mapping[str, Tensor], sizes: Mapping[str, float]) -> Distance:
    kinds = {kind: min(_root_of_sum(share) for share in both) for kind, both in shares.items()}
    return Distance(to.name, _mean_over_kinds(kinds), kinds, sizes)


def _root_of_sum(shares: Tensor) -> float:
    return math.sqrt(shares[shares.isfinite()].sum().item())


def _mean_over_kinds(kinds: Mapping[str, float]) -> float:
    return math.sqrt(sum(d * d for d in kinds.values()) / len(kinds))


def _unit_shares(decoder: Decoder, tokens: tuple[str, ...], to: Frame) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(shares, sizes), each by kind of unit. `sizes` is that of `Distance`.

    shares: [2, N], each unit's part of sum |u - nearest|^2 / sum |u|^2: in the first row with the units as they are, in
    the second with the units brought to the size of the donor's. Infinite for tokens that the donor lacks."""
    if set(tokens).isdisjoint(to.anchor.tokens):
        raise UserError(f"{to.name}: shares no token string with the model, so their coordinates cannot be compared")
    own = _unit_vectors(canonicalise(decoder, tokens, to.anchor).decoder)
    row_of = {token: i for i, token in enumerate(to.anchor.tokens)}
    shared = [(i, row_of[token]) for i, token in enumerate(tokens) if token in row_of]
    mine, theirs = (torch.tensor(rows) for rows in zip(*shared, strict=True))
    pairs = {kind: (own[kind], to.units[kind]) for kind in ("neuron", "qk", "vo")}
    pairs["vocab"] = (own["vocab"][mine], to.units["vocab"][theirs])
    sizes = {kind: _unit_size(a) / max(_unit_size(b), 1e-30) for kind, (a, b) in pairs.items()}
    shares = {}
    for kind, (a, b) in pairs.items():
        matched = None if kind == "vocab" else kind
        shares[kind] = torch.stack([_relative_squares(u, b, matched) for u in (a, a / max(sizes[kind], 1e-30))])
    shares["vocab"] = torch.full((2, len(tokens)), math.inf).index_copy(1, mine, shares["vocab"])
    return shares, sizes


def leave_one_out(donors: Sequence[Donor], frames: Sequence[Frame]) -> dict[str, tuple[Distance, float]]:
    """For every donor, its distance to the nearest other donor and to all others together.

    They are the distances between independent training runs."""
    found = {}
    for donor in donors:
        others = [f for f in frames if f.name != donor.name]
        if others:
            found[donor.name] = nearest_and_combined_distance(read_donor_decoder(donor), token_strings(donor), others)
    return found


@torch.no_grad()
def predictions(model: nn.Module, tokens: Tensor, sequence: int, limit: int) -> tuple[Tensor, Tensor]:
    """The most likely next token and the true one, int64 [n] each, over at most `limit` windows of int64 [N]."""
    cut = tokens.unfold(0, sequence + 1, sequence)
    cut = cut[torch.linspace(0, len(cut) - 1, min(limit, len(cut))).long()]
    guessed = [model(input_ids=w[:, :-1], use_cache=False).logits.argmax(-1).flatten().cpu() for w in cut.split(16)]
    return torch.cat(guessed), cut[:, 1:].flatten()


def error_overlap(one: Tensor, other: Tensor, truth: Tensor) -> dict[str, float]:
    """Predictions int64 [n] of two models, and the truth -> {iou: of the sets of mispredicted tokens; expected: what
    independent errors of the same rates would give; same: among tokens that both get wrong, the share with the same
    wrong answer}."""
    a, b = one != truth, other != truth
    both, either = (a & b).sum().item(), (a | b).sum().item()
    p, q = a.double().mean().item(), b.double().mean().item()
    independent = p * q / (p + q - p * q) if p + q > 0 else 1.0
    same = ((one == other) & a & b).sum().item()
    return {"iou": both / either if either else 1.0, "expected": independent, "same": same / both if both else 0.0}


def _unit_vectors(decoder: Decoder) -> dict[str, Tensor]:
    return {kind: units.vectors.float() for kind, units in decoder_to_units(decoder).items()}


def _unit_size(units: Tensor) -> float:
    """[N, P, d] -> root mean square norm of a unit."""
    return math.sqrt(units.square().sum().item() / len(units))


def _relative_squares(units: Tensor, others: Tensor, kind: str | None) -> Tensor:
    """units [N, P, d], others [M, P, e] -> [N]: |u - u'|^2 / sum |u|^2, where u' is the other unit at the same index
    (if kind is None; then N = M) or the nearest one. Signs in FREE_SIGNS may differ."""
    width = max(units.shape[-1], others.shape[-1])
    units, others = to_width(units, width), to_width(others, width)
    size, other_size = units.square().sum((1, 2)), others.square().sum((1, 2))
    if kind is None:
        squares = (units - others).square().sum((1, 2))
    else:
        squares = torch.cat([_nearest_squares(u, others, other_size, kind) for u in units.split(UNITS_AT_ONCE)])
    return squares.clamp(min=0) / max(size.sum().item(), 1e-30)


def _nearest_squares(units: Tensor, others: Tensor, other_size: Tensor, kind: str) -> Tensor:
    """units [n, P, d], others [M, P, d] -> [n]: squared distance to the nearest."""
    signed = FREE_SIGNS.get(kind, slice(0, 0))
    fixed = [p for p in range(units.shape[1]) if p not in range(units.shape[1])[signed]]
    inner = units[:, fixed].flatten(1) @ others[:, fixed].flatten(1).T
    inner = inner + (units[:, signed].flatten(1) @ others[:, signed].flatten(1).T).abs()
    return (units.square().sum((1, 2))[:, None] - 2 * inner + other_size).amin(1)
