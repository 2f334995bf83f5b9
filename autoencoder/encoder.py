"""The encoder: the tables of a donor of any shape -> a few latents, one per block and one for the model.

Each entry of a table is projected, marked with its rank, and pooled by attention with learned queries, as in a set
transformer (1810.00825). Letters: n entries, P vectors of an entry, d width of the donor, W width of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.field import OUTER_TABLES, FieldSizes, Latents, in_field_roles
from zoo.units.family import PLAIN, Family
from zoo.units.resizing import to_width
from zoo.units.tables import numbers_of, split_constants

RANK_PERIODS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 512.0)
QUERIES = 4  # of the attention that pools a table
LAST_SLOT_AXIS = {"query": 3, "query_numbers": 3, "key": 2, "key_numbers": 2}  # of tables with several axes of slots


class WeightEncoder(nn.Module):
    """Tables -> `Latents`. Over the donors of the training, each number of a latent has mean 0 and deviation 1."""

    def __init__(self, sizes: FieldSizes, hidden: int = 96) -> None:
        super().__init__()
        self.sizes = sizes
        self.project, self.query = nn.ModuleDict(), nn.ParameterDict()
        for table in sizes.tables:
            roles, numbers = len(sizes.vector_roles(table)), len(sizes.number_roles(table))
            self.project[table] = nn.Linear(roles * sizes.width + numbers + 2 * len(RANK_PERIODS), hidden)
            self.query[table] = nn.Parameter(torch.randn(QUERIES, hidden) / hidden**0.5)
            self.register_buffer(f"scale_{table}", torch.ones(roles))
            if numbers:
                self.register_buffer(f"scale_{numbers_of(table)}", torch.ones(numbers))
        self.block_tables = tuple(t for t in sizes.tables if t not in OUTER_TABLES)
        self.to_block = nn.Linear(len(self.block_tables) * QUERIES * hidden, sizes.block_latent)
        self.register_buffer("block_norm", torch.tensor([[0.0], [1.0]]).repeat(1, sizes.block_latent))
        self.register_buffer("model_norm", torch.tensor([[0.0], [1.0]]).repeat(1, sizes.model_latent))
        outer = len(sizes.tables) - len(self.block_tables)
        self.to_model = nn.Linear(outer * QUERIES * hidden + sizes.block_latent, sizes.model_latent)

    def _pool(self, table: str, tables: Mapping[str, Tensor]) -> Tensor:
        """The entries [..., n, P, c] of a table, and their numbers [..., n, S] -> [..., QUERIES * hidden]."""
        entries = tables[table]
        vectors = to_width(entries / self.get_buffer(f"scale_{table}")[:, None], self.sizes.width).flatten(-2)
        if self.sizes.number_roles(table):
            numbers = tables[numbers_of(table)] / self.get_buffer(f"scale_{numbers_of(table)}")
            vectors = torch.cat([vectors, numbers], dim=-1)
        rank = torch.arange(vectors.shape[-2], device=vectors.device)
        angle = 6.2831853 * rank[:, None] / torch.tensor(RANK_PERIODS, device=vectors.device)
        place = torch.cat([angle.sin(), angle.cos()], dim=1).expand(*vectors.shape[:-1], -1)
        hidden = F.gelu(self.project[table](torch.cat([vectors, place], dim=-1)))
        attention = (hidden @ self.query[table].mT).softmax(dim=-2)  # [..., n, QUERIES]
        return (attention.mT @ hidden).flatten(-2)

    def _pool_all(self, names: Sequence[str], tables: Mapping[str, Tensor], *lead: int) -> list[Tensor]:
        """What `_pool` gives for some tables; zeros [lead, …] for a table that the family of the model lacks."""
        size = QUERIES * self.query["token"].shape[1]
        like = tables["token" if "token" in tables else "neuron"]
        return [self._pool(t, tables) if t in tables else like.new_zeros(*lead, size) for t in names]

    def forward(
        self, blocks: Mapping[str, Tensor], tokens: Tensor, family: Family = PLAIN, positions: Tensor | None = None
    ) -> Latents:
        """blocks: the tables of all blocks, each with a first axis of L; tokens [V, 2, d]; family: the model's;
        positions [P, 1, c], if the family has learned ones."""
        entries = {name: table.flatten(1, LAST_SLOT_AXIS.get(name, 1)) for name, table in blocks.items()}
        entries = in_field_roles(entries, family, self.sizes)
        outer = split_constants(tokens, family) | ({} if positions is None else {"position": positions})
        outer = in_field_roles(outer, family, self.sizes)
        pooled = torch.cat(self._pool_all(self.block_tables, entries, len(blocks["neuron"])), dim=-1)
        latents = _unit_rms(self.to_block(pooled))
        names = [t for t in self.sizes.tables if t in OUTER_TABLES]
        model = _unit_rms(self.to_model(torch.cat([*self._pool_all(names, outer), latents.mean(0)])))
        model_mean, model_deviation = self.get_buffer("model_norm")
        block_mean, block_deviation = self.get_buffer("block_norm")
        return Latents((model - model_mean) / model_deviation, (latents - block_mean) / block_deviation)


def _unit_rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
