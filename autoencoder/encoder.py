"""The encoder: the tables of a donor of any shape -> a few latents, one per block and one for the model.

Each entry of a table is projected, marked with its rank, and pooled by attention with learned queries, as in a set
transformer (1810.00825). Letters: n entries, P vectors of an entry, d width of the donor, W width of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.field import FieldSizes, Latents
from zoo.units.resizing import to_width
from zoo.units.tables import BLOCK_TABLES, TABLE_ROLES

RANK_PERIODS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 512.0)
QUERIES = 4  # of the attention that pools a table


class WeightEncoder(nn.Module):
    """Tables -> `Latents`. Over the donors of the training, each number of a latent has mean 0 and deviation 1."""

    def __init__(self, sizes: FieldSizes, hidden: int = 96) -> None:
        super().__init__()
        self.sizes = sizes
        self.project, self.query = nn.ModuleDict(), nn.ParameterDict()
        for table, roles in TABLE_ROLES.items():
            self.project[table] = nn.Linear(len(roles) * sizes.width + 2 * len(RANK_PERIODS), hidden)
            self.query[table] = nn.Parameter(torch.randn(QUERIES, hidden) / hidden**0.5)
            self.register_buffer(f"scale_{table}", torch.ones(len(roles)))
        self.to_block = nn.Linear(len(BLOCK_TABLES) * QUERIES * hidden, sizes.block_latent)
        self.register_buffer("block_norm", torch.tensor([[0.0], [1.0]]).repeat(1, sizes.block_latent))
        self.register_buffer("model_norm", torch.tensor([[0.0], [1.0]]).repeat(1, sizes.model_latent))
        self.to_model = nn.Linear(QUERIES * hidden + sizes.block_latent, sizes.model_latent)

    def _pool(self, table: str, entries: Tensor) -> Tensor:
        """Entries [..., n, P, d] -> [..., QUERIES * hidden]."""
        vectors = to_width(entries / self.get_buffer(f"scale_{table}")[:, None], self.sizes.width).flatten(-2)
        rank = torch.arange(vectors.shape[-2], device=vectors.device)
        angle = 6.2831853 * rank[:, None] / torch.tensor(RANK_PERIODS, device=vectors.device)
        place = torch.cat([angle.sin(), angle.cos()], dim=1).expand(*vectors.shape[:-1], -1)
        hidden = F.gelu(self.project[table](torch.cat([vectors, place], dim=-1)))
        attention = (hidden @ self.query[table].mT).softmax(dim=-2)  # [..., n, QUERIES]
        return (attention.mT @ hidden).flatten(-2)

    def forward(self, blocks: Mapping[str, Tensor], tokens: Tensor) -> Latents:
        """blocks: the tables of all blocks, each with a first axis of L; tokens [V, 2, d]."""
        entries = {
            "neuron": blocks["neuron"],
            "query": blocks["query"].flatten(1, 3),
            "key": blocks["key"].flatten(1, 2),
        }
        pooled = torch.cat([self._pool(table, entries[table]) for table in BLOCK_TABLES], dim=-1)
        latents = _unit_rms(self.to_block(pooled))
        model = _unit_rms(self.to_model(torch.cat([self._pool("token", tokens), latents.mean(0)])))
        model_mean, model_deviation = self.get_buffer("model_norm")
        block_mean, block_deviation = self.get_buffer("block_norm")
        return Latents((model - model_mean) / model_deviation, (latents - block_mean) / block_deviation)


def _unit_rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
