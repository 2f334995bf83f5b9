"""The unit autoencoder: a unit becomes a latent and the exact norms of its vectors, and back.

Each of a unit's P residual vectors is divided by its norm. The norms are kept in float32 beside the latent. The
directions go through a linear map that starts as PCA, and a small network that starts at zero. So training starts from
PCA with latents of the same size.

Letters: N units, P residual vectors per unit, d their width, W width of the autoencoder, R latent size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from zoo.linear_algebra import symmetric_eigenvectors
from zoo.units.resizing import to_width
from zoo.units.units import ROLES

WRITER_ROLES = ("embed", "o", "down")


class UnitAutoencoder(ModelMixin, ConfigMixin):
    """Maps units to latents and back, for every kind of unit.

    width: W, the widest residual stream. latent: kind -> R. hidden: size of the correcting network, 0 for none, which
    leaves a linear autoencoder. donors: provenance of the donors it was trained on."""

    CONFIG_KINDS: ClassVar = {"width": int, "latent": {str: int}, "hidden": int, "donors": (None, [dict])}

    @register_to_config
    def __init__(
        self, width: int, latent: dict[str, int], hidden: int = 128, donors: list[dict[str, Any]] | None = None
    ) -> None:
        super().__init__()
        self.width = width
        for kind in latent:
            flat = len(ROLES[kind]) * width
            self.register_buffer(f"weight_{kind}", torch.ones(flat))  # square root of the weight of the error
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
        """R of a kind."""
        return int(self.config["latent"][kind])

    def _weighted(self, kind: str, directions: Tensor) -> Tensor:
        """Centres directions and scales them by the square root of the weight: [N, P, W] -> [N, P W]."""
        centred = directions.flatten(1) - self.get_buffer(f"mean_{kind}")
        return centred * self.get_buffer(f"weight_{kind}")

    def encode(self, kind: str, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [N, P, d] -> latents [N, R] and log-norms [N, P], float32. Coordinates beyond W are dropped."""
        vectors = to_width(vectors.float(), self.width)
        norms = vectors.norm(dim=-1).clamp_min(1e-12)
        return self.encoders[kind](self._weighted(kind, vectors / norms.unsqueeze(-1))), norms.log()

    def decode_directions(self, kind: str, latents: Tensor, width: int) -> Tensor:
        """Latents [N, R] -> directions [N, P, width] that are not normalised yet. `width` is at most W."""
        flat = self.decoders[kind](latents)
        if kind in self.corrections:
            flat = flat + self.corrections[kind](latents)
        flat = flat / self.get_buffer(f"weight_{kind}") + self.get_buffer(f"mean_{kind}")
        return flat.unflatten(1, (len(ROLES[kind]), self.width))[..., :width]

    def decode(self, kind: str, latents: Tensor, log_norms: Tensor, width: int) -> Tensor:
        """Latents [N, R] and log-norms [N, P] -> vectors [N, P, width] with exactly these norms.

        Coordinates beyond W are zero."""
        directions = self.decode_directions(kind, latents, min(width, self.width))
        vectors = nn.functional.normalize(directions, dim=-1) * log_norms.exp().unsqueeze(-1)
        return to_width(vectors, width)

    def loss(self, kind: str, vectors: Tensor, noise: Tensor | None = None) -> Tensor:
        """Weighted relative squared error of the decoded directions of vectors [N, P, d]: a scalar.

        noise [N, R] is added to the latents, in units of their RMS. A narrower donor is padded with zeros, and the
        decoder must reproduce them."""
        vectors = to_width(vectors.float(), self.width)
        directions = nn.functional.normalize(vectors, dim=-1)
        latents = self.encoders[kind](self._weighted(kind, directions))
        if noise is not None:
            latents = latents + noise * latents.detach().square().mean().sqrt()
        error = self.decode_directions(kind, latents, self.width).flatten(1) - directions.flatten(1)
        weight = self.get_buffer(f"weight_{kind}").square()
        return (weight * error.square()).sum() / (weight * directions.flatten(1).square()).sum()


@torch.no_grad()
def set_linear_part_to_pca(model: UnitAutoencoder, kind: str, vectors: Tensor, weight: Tensor) -> None:
    """Sets the linear part to the PCA of the directions of vectors [N, P, d]. weight: of the squared error, [P, W]."""
    directions = to_width(nn.functional.normalize(vectors.double(), dim=-1), model.width).flatten(1)
    root = weight.double().flatten().sqrt()
    mean = directions.mean(0)
    scaled = (directions - mean) * root
    axes = symmetric_eigenvectors(scaled.mT @ scaled)[1][:, : model.latent_size(kind)]
    model.get_buffer(f"mean_{kind}").copy_(mean)
    model.get_buffer(f"weight_{kind}").copy_(root)
    model.encoders[kind].get_parameter("weight").copy_(axes.mT)
    model.decoders[kind].get_parameter("weight").copy_(axes)


def error_weights(units: list[dict[str, Tensor]], width: int) -> dict[str, Tensor]:
    """Weights of the squared error: kind -> [P, W], mean 1 per vector.

    A reader is multiplied by the residual stream, so its error counts by the energy of the writers in that coordinate;
    a writer's error counts by the energy of the readers."""
    energy = {"reads": torch.zeros(width, dtype=torch.float64), "writes": torch.zeros(width, dtype=torch.float64)}
    for donor in units:
        for kind, vectors in donor.items():
            for part, role in enumerate(ROLES[kind]):
                side = "writes" if role in WRITER_ROLES else "reads"
                energy[side] += to_width(vectors[:, part].double().square().mean(0), width)
    weights = {}
    for kind, roles in ROLES.items():
        rows = [energy["reads" if role in WRITER_ROLES else "writes"] for role in roles]
        weight = torch.stack(rows)
        weight = weight / weight.mean(1, keepdim=True)
        weights[kind] = weight.clamp_min(1e-3)
    return weights
