"""The unit autoencoder: unit <-> (latent, exact scales).

A unit's P residual vectors are divided by their norms; the norms are kept in float32 beside the latent. The rest goes
through a linear map, which starts as PCA under the error's own weights, plus a small network that starts at zero:
training starts from PCA at the same rate.

Letters: N units, P residual vectors per unit, d their width, W the width of the autoencoder, R latent size.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from zoo.units.units import ROLES, to_width

KINDS = tuple(ROLES)


class UnitAutoencoder(ModelMixin, ConfigMixin):
    """width: the widest residual stream that it knows, W; latent: {kind: R}; hidden: size of the correcting network,
    0 for none (plain PCA, or a linear autoencoder once trained); donors: records of what it was trained on."""

    @register_to_config
    def __init__(
        self, width: int, latent: dict[str, int], hidden: int = 128, donors: list[dict[str, Any]] | None = None
    ) -> None:
        super().__init__()
        self.width = width
        for kind in latent:
            flat = len(ROLES[kind]) * width
            self.register_buffer(f"weight_{kind}", torch.ones(flat))  # square root of the error's weight
            self.register_buffer(f"mean_{kind}", torch.zeros(flat))
        self.encoders = nn.ModuleDict({k: nn.Linear(len(ROLES[k]) * width, r, bias=False) for k, r in latent.items()})
        self.decoders = nn.ModuleDict({k: nn.Linear(r, len(ROLES[k]) * width, bias=False) for k, r in latent.items()})
        self.corrections = nn.ModuleDict()
        if hidden:
            for kind, size in latent.items():
                out = nn.Linear(hidden, len(ROLES[kind]) * width)
                nn.init.zeros_(out.weight)
                nn.init.zeros_(out.bias)
                self.corrections[kind] = nn.Sequential(nn.Linear(size, hidden), nn.SiLU(), out)

    def latent_size(self, kind: str) -> int:
        return int(self.config["latent"][kind])

    def _weighted(self, kind: str, directions: Tensor) -> Tensor:
        """[N, P, W] -> [N, P W], centred, times the square root of the error's weight."""
        centred = directions.flatten(1) - self.get_buffer(f"mean_{kind}")
        return centred * self.get_buffer(f"weight_{kind}")

    def encode(self, kind: str, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """[N, P, d] -> latents [N, R] and log-norms [N, P], float32. Coordinates beyond W are dropped."""
        vectors = to_width(vectors.float(), self.width)
        norms = vectors.norm(dim=-1).clamp_min(1e-12)
        return self.encoders[kind](self._weighted(kind, vectors / norms.unsqueeze(-1))), norms.log()

    def decode_directions(self, kind: str, latents: Tensor, width: int) -> Tensor:
        """[N, R] -> [N, P, width], before the norms are put back; `width` is at most W."""
        flat = self.decoders[kind](latents)
        if kind in self.corrections:
            flat = flat + self.corrections[kind](latents)
        flat = flat / self.get_buffer(f"weight_{kind}") + self.get_buffer(f"mean_{kind}")
        return flat.unflatten(1, (len(ROLES[kind]), self.width))[..., :width]

    def decode(self, kind: str, latents: Tensor, log_norms: Tensor, width: int) -> Tensor:
        """Latents [N, R] and log-norms [N, P] -> vectors [N, P, width] of exactly those norms. Coordinates beyond W
        are zero."""
        directions = self.decode_directions(kind, latents, min(width, self.width))
        vectors = nn.functional.normalize(directions, dim=-1) * log_norms.exp().unsqueeze(-1)
        return to_width(vectors, width)

    def loss(self, kind: str, vectors: Tensor, noise: Tensor | None = None) -> Tensor:
        """Relative squared error of the directions of [N, P, d] under the error's weights: a scalar. noise [N, R] is
        added to the latents, in units of their RMS. Where a narrower donor has no coordinate, zero is right."""
        vectors = to_width(vectors.float(), self.width)
        directions = nn.functional.normalize(vectors, dim=-1)
        latents = self.encoders[kind](self._weighted(kind, directions))
        if noise is not None:
            latents = latents + noise * latents.detach().square().mean().sqrt()
        error = self.decode_directions(kind, latents, self.width).flatten(1) - directions.flatten(1)
        weight = self.get_buffer(f"weight_{kind}").square()
        return (weight * error.square()).sum() / (weight * directions.flatten(1).square()).sum()


@torch.no_grad()
def fit_pca(model: UnitAutoencoder, kind: str, vectors: Tensor, weight: Tensor) -> None:
    """Sets the linear part to PCA of the directions of [N, P, d] under the weights [P, W] of the squared error."""
    directions = to_width(nn.functional.normalize(vectors.double(), dim=-1), model.width).flatten(1)
    root = weight.double().flatten().sqrt()
    mean = directions.mean(0)
    scaled = (directions - mean) * root
    axes = torch.linalg.eigh(scaled.mT @ scaled).eigenvectors.flip(-1)[:, : model.latent_size(kind)]
    model.get_buffer(f"mean_{kind}").copy_(mean)
    model.get_buffer(f"weight_{kind}").copy_(root)
    model.encoders[kind].get_parameter("weight").copy_(axes.mT)
    model.decoders[kind].get_parameter("weight").copy_(axes)


def error_weights(units: list[dict[str, Tensor]], width: int) -> dict[str, Tensor]:
    """kind -> [P, W]: how much an error in each coordinate does, mean 1. A reader multiplies what the stream holds
    there, so it is weighed by the energy of the writers; a writer by the energy of the readers."""
    energy = {"reads": torch.zeros(width, dtype=torch.float64), "writes": torch.zeros(width, dtype=torch.float64)}
    for donor in units:
        for kind, vectors in donor.items():
            for part, role in enumerate(ROLES[kind]):
                side = "writes" if role in ("embed", "o", "down") else "reads"
                energy[side] += to_width(vectors[:, part].double().square().mean(0), width)
    out = {}
    for kind, roles in ROLES.items():
        rows = [energy["reads" if role in ("embed", "o", "down") else "writes"] for role in roles]
        weight = torch.stack(rows)
        weight = weight / weight.mean(1, keepdim=True)
        out[kind] = weight.clamp_min(1e-3)
    return out
