"""Training data of the diffusion: donors as tokens, at many shapes.

Every donor yields endless valid sub-networks and growths (its most important neurons and groups, some of its layers,
copies that share what they write): a *view* is a donor addressed as if it had another shape. The width of a view only
shows in its metadata: tokens are whole units, narrowed when they are written.

Letters: N units, P residual vectors per unit, R latent size, T = R + P token size, X context size, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autoencoder.model import UnitAutoencoder
from diffusion.conditions import model_condition, unit_features
from diffusion.memory import TokenScale
from zoo.streams import stream
from zoo.tensors import Metadata
from zoo.units.aligned import AlignedDonor, recorded_loss
from zoo.units.units import ROLES, unit_addresses, unit_map


@dataclass(frozen=True)
class View:
    """A donor at one shape, ready to learn from: everything by kind."""

    donor: int
    rows: dict[str, Tensor]  # int64 [N]: which of the donor's units each one is
    tokens: dict[str, Tensor]  # [N, T]
    features: dict[str, Tensor]  # [N, FEATURES]
    partners: dict[str, Tensor]  # [N, T], zeros where there is none
    model: Tensor  # [FEATURES]: what the context is generated for


@torch.no_grad()
def fit_scale(autoencoder: UnitAutoencoder, donors: list[AlignedDonor], kind: str) -> TokenScale:
    """The scale of a kind over all donors."""
    encoded = [autoencoder.encode(kind, donor.units[kind]) for donor in donors]
    latents, norms = torch.cat([z for z, _ in encoded]), torch.cat([n for _, n in encoded])
    return TokenScale(
        latent=float(latents.square().mean().sqrt()),
        mean=tuple(norms.mean(0).tolist()),
        std=tuple(norms.std(0).clamp_min(1e-3).tolist()),
    )


@torch.no_grad()
def donor_tokens(donor: AlignedDonor, autoencoder: UnitAutoencoder, scales: dict[str, TokenScale]) -> dict[str, Tensor]:
    """kind -> [N, T], every unit of a donor."""
    return {kind: scales[kind].to_token(*autoencoder.encode(kind, donor.units[kind])) for kind in ROLES}


def view_shape(metadata: Metadata, seed: int, name: str) -> Metadata:
    """A shape near the donor's, drawn from stream (seed, name): half the time the donor's own, else each size between
    half and twice it (layers: no more than it has)."""
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
    """int64 [N]: for a unit of a query head that shares its key and value, the same unit of the group's first head;
    -1 for first heads and other kinds."""
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
    """The donor (number `index`) addressed as `shape`. others [V, T]: the mean vocabulary tokens of the other donors,
    zeros for a token that none of them has."""
    maps = unit_map(donor.metadata, shape)
    loss = recorded_loss(donor.facts)
    out, told, partners = {}, {}, {}
    for kind, (rows, copies) in maps.items():
        out[kind] = tokens[kind][rows].clone()
        out[kind][:, -1] -= copies.log() / scales[kind].std[-1]  # the last vector of these kinds is what is written
        told[kind] = unit_features(kind, unit_addresses(shape)[kind], shape, loss)
        first = first_head_unit(shape, kind)
        partners[kind] = out[kind][first] * (first >= 0)[:, None]
    partners["vocab"] = others
    return View(index, {k: rows for k, (rows, _) in maps.items()}, out, told, partners, model_condition(shape, loss))


def mean_tokens(tables: list[dict[str, Tensor]], names: tuple[str, ...], size: int) -> Tensor:
    """[V, T]: mean over the tables of the token of each name; zeros where no table has it."""
    rows = []
    for name in names:
        found = [table[name] for table in tables if name in table]
        rows.append(torch.stack(found).mean(0) if found else torch.zeros(size))
    return torch.stack(rows)


def donor_contexts(tables: list[dict[str, Tensor]], size: int) -> Tensor:
    """[donors, X]: what the donors' vocabularies say of their lineage: the principal components of their vocabulary
    tokens over the strings that all share, brought to unit RMS. A function of the weights alone."""
    shared = sorted(set.intersection(*(set(t) for t in tables)))[:1024]
    if len(tables) < 2 or not shared:
        return torch.zeros(len(tables), size)
    flat = torch.stack([torch.cat([table[name] for name in shared]) for table in tables]).double()
    u, s, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    components = (u * s)[:, :size]
    components = components * torch.where(components.pow(3).sum(0) < 0, -1.0, 1.0)
    scaled = components / components[:, : len(tables) - 1].square().mean().sqrt()
    return torch.nn.functional.pad(scaled, (0, size - scaled.shape[1])).float()
