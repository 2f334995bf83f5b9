"""Views: a donor as if it had another shape.

A view takes the donor's most important neurons and KV groups and some of its layers. Where it needs more than the donor
has, it repeats units, and the copies share their output. The width of a view shows only in its metadata: tokens are
whole units, and narrower targets are cut when they are written.

Letters: N units, P residual vectors per unit, R latent size, T = R + P token size, X context size, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autoencoder.model import UnitAutoencoder
from diffusion.conditions import model_condition, unit_features
from diffusion.memory import TokenScale
from zoo.linear_algebra import ROUNDING, closest_basis, near_equal_groups, skew_signs
from zoo.streams import stream
from zoo.tensors import Metadata
from zoo.units.aligned import AlignedDonor, recorded_loss
from zoo.units.resizing import unit_map
from zoo.units.units import ROLES, unit_addresses


@dataclass(frozen=True)
class View:
    """A donor at one shape; each mapping is by kind."""

    donor: int  # its number
    rows: dict[str, Tensor]  # int64 [N]: the number of the donor's unit
    tokens: dict[str, Tensor]  # [N, T]
    features: dict[str, Tensor]  # [N, FEATURES]
    partners: dict[str, Tensor]  # [N, T], zeros where there is none
    model: Tensor  # [FEATURES]: the condition of the context


@torch.no_grad()
def fit_scale(autoencoder: UnitAutoencoder, donors: list[AlignedDonor], kind: str) -> TokenScale:
    """The scale of the tokens of a kind over all donors."""
    encoded = [autoencoder.encode(kind, donor.units[kind]) for donor in donors]
    latents, norms = torch.cat([z for z, _ in encoded]), torch.cat([n for _, n in encoded])
    return TokenScale(
        latent=float(latents.square().mean().sqrt()),
        mean=tuple(norms.mean(0).tolist()),
        std=tuple(norms.std(0).clamp_min(1e-3).tolist()),
    )


@torch.no_grad()
def donor_tokens(donor: AlignedDonor, autoencoder: UnitAutoencoder, scales: dict[str, TokenScale]) -> dict[str, Tensor]:
    """All units of a donor as tokens: kind -> [N, T]."""
    return {kind: scales[kind].to_token(*autoencoder.encode(kind, donor.units[kind])) for kind in ROLES}


def view_shape(metadata: Metadata, seed: int, name: str) -> Metadata:
    """A shape near the donor's, drawn from the random stream (seed, name).

    Half the time it is the donor's own. Else each size lies between half and twice the donor's, the number of layers
    between half and all. Deeper views were tried: they helped deeper targets and harmed shallower ones."""
    rng = stream(seed, name)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=rng))

    if draw(0, 1):
        return metadata
    share = metadata.heads // metadata.kv_heads
    groups = draw((metadata.kv_heads + 1) // 2, 2 * metadata.kv_heads)
    return replace(
        metadata,
        width=draw(metadata.width // 2, 2 * metadata.width),
        layers=draw((metadata.layers + 1) // 2, metadata.layers),
        heads=groups * share,
        kv_heads=groups,
        ffn=draw(metadata.ffn // 2, 2 * metadata.ffn),
    )


def first_head_unit(metadata: Metadata, kind: str) -> Tensor:
    """For each unit of a query head, the number of the same unit in the first head of its group: int64 [N].

    -1 for units of first heads, and for kinds without heads."""
    layer, head, slot = unit_addresses(metadata)[kind]
    share = metadata.heads // metadata.kv_heads
    if kind not in ("qk", "vo") or share == 1:
        return torch.full_like(slot, -1)
    per_head = metadata.head_dim // 2 if kind == "qk" else metadata.head_dim
    first = (layer * metadata.heads + head // share * share) * per_head + slot
    return torch.where(head % share == 0, -1, first)


def make_view(
    index: int,
    donor: AlignedDonor,
    shape: Metadata,
    tokens: dict[str, Tensor],
    scales: dict[str, TokenScale],
    others: Tensor,
) -> View:
    """The view of donor number `index` at a shape.

    others [V, T]: the mean vocabulary tokens of the other donors, zeros for a token that none of them has."""
    maps = unit_map(donor.metadata, shape)
    loss = recorded_loss(donor.facts)
    view_tokens, view_features, partners = {}, {}, {}
    for kind, (rows, copies) in maps.items():
        view_tokens[kind] = tokens[kind][rows].clone()
        view_tokens[kind][:, -1] -= copies.log() / scales[kind].std[-1]  # a unit's last vector is its output
        view_features[kind] = unit_features(kind, unit_addresses(shape)[kind], shape, loss)
        first = first_head_unit(shape, kind)
        partners[kind] = view_tokens[kind][first] * (first >= 0)[:, None]
    partners["vocab"] = others
    rows_by_kind = {kind: rows for kind, (rows, _) in maps.items()}
    return View(index, rows_by_kind, view_tokens, view_features, partners, model_condition(shape, loss))


def mean_tokens(tables: list[dict[str, Tensor]], names: tuple[str, ...], size: int) -> Tensor:
    """The mean over tables (string -> [T]) of the token of each name, [V, T]; zeros for a name that no table has."""
    rows = []
    for name in names:
        found = [table[name] for table in tables if name in table]
        rows.append(torch.stack(found).mean(0) if found else torch.zeros(size))
    return torch.stack(rows)


def donor_contexts(tables: list[dict[str, Tensor]], size: int) -> Tensor:
    """The context of each donor, [donors, X], a function of its weights.

    tables: per donor, string -> vocabulary token [T]. A context is the principal components of the donor's tokens over
    the strings that all donors share, scaled to unit RMS; size: X."""
    shared = sorted(set.intersection(*(set(t) for t in tables)))[:1024]
    if len(tables) < 2 or not shared:
        return torch.zeros(len(tables), size)
    flat = torch.stack([torch.cat([table[name] for name in shared]) for table in tables]).double()
    u, s, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    components = (u * s)[:, :size]
    for group in near_equal_groups(s[:size]):
        if group.stop - group.start > 1:
            components[:, group] = closest_basis(components[:, group])
    components = components * skew_signs(components, dim=0, noise=ROUNDING * components.abs().max())
    scaled = components / components[:, : len(tables) - 1].square().mean().sqrt()
    return torch.nn.functional.pad(scaled, (0, size - scaled.shape[1])).float()
