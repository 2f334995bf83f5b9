"""Training data of the diffusion: donors as tokens, at many shapes.

Every donor yields endless valid sub-networks (a prefix of its coordinates, its most important neurons and groups,
some of its layers): a *view* is a donor resized, encoded and addressed as if it had that shape.

Letters: N units, P residual vectors per unit, R latent size, T = R + P token size, X context size, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autoencoder.model import UnitAutoencoder
from diffusion.conditions import features, model_condition
from zoo.aligned import Aligned
from zoo.streams import stream
from zoo.tensors import Metadata
from zoo.units import ROLES, addresses, resize


@dataclass(frozen=True)
class TokenScale:
    """How tokens of one kind are brought to unit scale: one scale for the whole latent (its spectrum is kept: it is
    the order of importance), mean and deviation for each log-norm."""

    latent: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_token(self, latents: Tensor, log_norms: Tensor) -> Tensor:
        """[N, R], [N, P] -> [N, T]"""
        centred = (log_norms - torch.tensor(self.mean)) / torch.tensor(self.std)
        return torch.cat([latents / self.latent, centred], dim=1)

    def from_token(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[N, T] -> [N, R], [N, P]"""
        size = tokens.shape[1] - len(self.mean)
        mean, std = (torch.tensor(t, device=tokens.device) for t in (self.mean, self.std))
        return tokens[:, :size] * self.latent, tokens[:, size:] * std + mean


@dataclass(frozen=True)
class View:
    """A donor at one shape, ready to learn from: everything by kind."""

    tokens: dict[str, Tensor]  # [N, T]
    features: dict[str, Tensor]  # [N, FEATURES]
    partners: dict[str, Tensor]  # [N, T], zeros where there is none
    model: Tensor  # [FEATURES]: what the context is generated for
    context: Tensor  # [X]
    family: str


def fit_scale(autoencoder: UnitAutoencoder, donors: list[Aligned], kind: str) -> TokenScale:
    """The scale of a kind over all donors."""
    encoded = [autoencoder.encode(kind, donor.units[kind]) for donor in donors]
    latents, norms = torch.cat([z for z, _ in encoded]), torch.cat([n for _, n in encoded])
    return TokenScale(
        latent=float(latents.square().mean().sqrt()),
        mean=tuple(norms.mean(0).tolist()),
        std=tuple(norms.std(0).clamp_min(1e-3).tolist()),
    )


def view_shape(metadata: Metadata, seed: int, name: str) -> Metadata:
    """A shape inside the donor's, drawn from stream (seed, name): half the time the donor's own."""
    rng = stream(seed, name)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=rng))

    if draw(0, 1):
        return metadata
    share = metadata.heads // metadata.kv_heads
    groups = draw((metadata.kv_heads + 1) // 2, metadata.kv_heads)
    return replace(
        metadata,
        width=draw(metadata.width // 2, metadata.width),
        layers=draw((metadata.layers + 1) // 2, metadata.layers),
        heads=groups * share,
        kv_heads=groups,
        ffn=draw(metadata.ffn // 2, metadata.ffn),
    )


def sibling(metadata: Metadata, kind: str) -> Tensor:
    """int64 [N]: for a unit of a query head that shares its key and value, the same unit of the group's first head;
    -1 for first heads and other kinds."""
    layer, head, slot = addresses(metadata)[kind]
    share = metadata.heads // metadata.kv_heads
    if kind not in ("qk", "vo") or share == 1:
        return torch.full_like(slot, -1)
    per_head = metadata.head_dim // 2 if kind == "qk" else metadata.head_dim
    first = (layer * metadata.heads + head // share * share) * per_head + slot
    return torch.where(head % share == 0, -1, first)


@torch.no_grad()
def make_view(
    donor: Aligned,
    shape: Metadata,
    autoencoder: UnitAutoencoder,
    scales: dict[str, TokenScale],
    context: Tensor,
    others: Tensor | None,
) -> View:
    """The donor resized to `shape`. `others` [V, T] are the mean vocabulary tokens of the other donors (zeros for a
    token that none of them has), or None."""
    units = resize(donor.units, donor.metadata, shape)
    tokens, told, partners = {}, {}, {}
    loss = donor.facts.get("loss")
    for kind in ROLES:
        tokens[kind] = scales[kind].to_token(*autoencoder.encode(kind, units[kind]))
        told[kind] = features(kind, addresses(shape)[kind], shape, loss)
        index = sibling(shape, kind)
        partners[kind] = tokens[kind][index] * (index >= 0)[:, None]
    if others is not None:
        partners["vocab"] = others
    return View(tokens, told, partners, model_condition(shape, loss), context, donor.metadata.architecture)


@torch.no_grad()
def vocabulary_tokens(
    donors: list[Aligned], autoencoder: UnitAutoencoder, scale: TokenScale
) -> list[dict[str, Tensor]]:
    """Per donor {token string: its vocabulary pair as a token [T]}."""
    out = []
    for donor in donors:
        tokens = scale.to_token(*autoencoder.encode("vocab", donor.units["vocab"]))
        out.append(dict(zip(donor.tokens, tokens, strict=True)))
    return out


def mean_tokens(tables: list[dict[str, Tensor]], names: tuple[str, ...], size: int) -> Tensor:
    """[V, T]: mean over the tables of the token of each name; zeros where no table has it."""
    rows = []
    for name in names:
        found = [table[name] for table in tables if name in table]
        rows.append(torch.stack(found).mean(0) if found else torch.zeros(size))
    return torch.stack(rows)


def contexts(tables: list[dict[str, Tensor]], size: int) -> Tensor:
    """[donors, X]: what the donors' vocabularies say of their lineage: the principal components of their vocabulary
    tokens over the strings that all share, brought to unit RMS. A function of the weights alone."""
    shared = sorted(set.intersection(*(set(t) for t in tables)))[:1024]
    if len(tables) < 2 or not shared:
        return torch.zeros(len(tables), size)
    flat = torch.stack([torch.cat([table[name] for name in shared]) for table in tables]).double()
    u, s, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    components = (u * s)[:, :size]
    components = components * torch.where(components.pow(3).sum(0) < 0, -1.0, 1.0)
    scaled = components / components.square().mean().sqrt()
    return torch.nn.functional.pad(scaled, (0, size - scaled.shape[1])).float()
