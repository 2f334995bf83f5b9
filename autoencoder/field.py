"""The field: a network that writes the residual vectors of a block of any shape.

An entry of a table (`zoo/units/tables.py`) is the vector

    map · (gate ⊙ Σ_k weight_k · basis_k[slot])

`basis_k[slot]` are S numbers that belong to a neuron's rank, to a component of a head, or to a token. `map` turns them
into residual vectors over the widest stream. The weights and gates come from a small network that reads the depth, the
shape and the latents, so they are what differs between blocks, shapes and models. Bases and maps are shared by all.

A target that is narrower than the field uses the first coordinates, neurons and heads; the network learns what this
costs and corrects it. Letters: K bases, S rank, P vectors of an entry, W width of the field, L blocks, n slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.linear_algebra import symmetric_eigenvectors
from zoo.tensors import Metadata
from zoo.units.tables import TABLE_ROLES

DEPTH_FREQUENCIES = (1.0, 2.0, 4.0, 8.0)  # Fourier features of the relative depth, in half-turns
DEPTH_FEATURES = 2 + 2 * len(DEPTH_FREQUENCIES)
SHAPE_FEATURES = 7


@dataclass(frozen=True)
class FieldSizes:
    """The sizes of a field: its largest shape, and how many numbers it stores."""

    width: int
    neurons: int
    groups: int  # KV heads
    head_dim: int
    tokens: int
    bases: int
    token_bases: int
    rank: int
    model_latent: int = 16
    block_latent: int = 16
    hidden: int = 128

    def slots(self, table: str) -> int:
        """How many entries a table has in its largest shape, with one query head per KV head."""
        heads = self.groups * self.head_dim
        return {"neuron": self.neurons, "query": heads, "key": heads, "token": self.tokens}[table]

    def base_count(self, table: str) -> int:
        return self.token_bases if table == "token" else self.bases

    def table_rank(self, table: str) -> int:
        """S of a table: never more than its vectors have numbers."""
        return min(self.rank, len(TABLE_ROLES[table]) * self.width)


@dataclass(frozen=True)
class Latents:
    """What a model is, beside its shape: one vector for the model, [Zm], and one per block, [L, Zb]."""

    model: Tensor
    blocks: Tensor

    def at_depth(self, layers: int) -> Latents:
        """The latents for another number of blocks: each block takes those at the nearest relative depth."""
        n = len(self.blocks)
        if layers == n:
            return self
        places = torch.linspace(0, n - 1, layers, dtype=torch.float64) if layers > 1 else torch.zeros(1)
        return Latents(self.model, self.blocks[(places + 1e-9).round().long().to(self.blocks.device)])

    def to(self, device: torch.device) -> Latents:
        """The same latents on a device."""
        return Latents(self.model.to(device), self.blocks.to(device))

    def mixed(self, other: Latents, share: float) -> Latents:
        """share · self + (1 - share) · other, at the depth of self."""
        blocks = other.at_depth(len(self.blocks)).blocks
        return Latents(share * self.model + (1 - share) * other.model, share * self.blocks + (1 - share) * blocks)


def depth_features(index: Tensor, layers: int) -> Tensor:
    """The features of block numbers, [n] -> [n, DEPTH_FEATURES]."""
    place = index.double() / max(layers - 1, 1)
    waves = [f(math.pi * w * place) for w in DEPTH_FREQUENCIES for f in (torch.sin, torch.cos)]
    return torch.stack([2 * place - 1, torch.log2(1 + index.double()) / 2 - 1, *waves], dim=1).float()


def shape_features(shape: Metadata) -> Tensor:
    """The sizes of a model on a log scale, [SHAPE_FEATURES]."""
    return torch.tensor(
        [
            math.log2(shape.width) - 6.5,
            math.log2(shape.layers) - 2,
            math.log2(shape.heads * shape.head_dim / shape.width),
            math.log2(shape.kv_heads) - 2,
            math.log2(shape.heads / shape.kv_heads) - 0.5,
            math.log2(shape.ffn / shape.width) - 1.4,
            float(shape.tied),
        ]
    )


class WeightField(nn.Module):
    """Latents, depth and shape -> the tables of a model."""

    def __init__(self, sizes: FieldSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.bases, self.maps, self.mixers = nn.ParameterDict(), nn.ParameterDict(), nn.ModuleDict()
        for table, roles in TABLE_ROLES.items():
            count, rank = sizes.base_count(table), sizes.table_rank(table)
            self.bases[table] = nn.Parameter(torch.randn(count, sizes.slots(table), rank))
            self.maps[table] = nn.Parameter(torch.randn(rank, len(roles), sizes.width) / rank**0.5)
            self.mixers[table] = nn.Linear(sizes.hidden, count + rank)
            self.register_buffer(f"scale_{table}", torch.ones(len(roles)))  # RMS of the entries of each role
        n_features = DEPTH_FEATURES + SHAPE_FEATURES + 1 + sizes.model_latent + sizes.block_latent
        self.condition = nn.Sequential(
            nn.Linear(n_features, sizes.hidden), nn.SiLU(), nn.Linear(sizes.hidden, sizes.hidden), nn.SiLU()
        )
        for mixer in self.mixers.values():
            nn.init.zeros_(mixer.get_parameter("bias"))

    def _features(self, shape: Metadata, latents: Latents, index: Tensor, member: float = 0.0) -> Tensor:
        """The condition of blocks number `index` [n], for query heads number `member` of their groups: [n, hidden]."""
        n, device = len(index), latents.model.device
        parts = [
            depth_features(index, shape.layers).to(device),
            shape_features(shape).to(device).expand(n, -1),
            torch.full((n, 1), member / 2, device=device),
            latents.model.expand(n, -1),
            latents.blocks[index.to(device)],
        ]
        return self.condition(torch.cat(parts, dim=1))

    def _entries(self, table: str, condition: Tensor, slots: Tensor, width: int) -> Tensor:
        """The vectors of slots [n], one table per row of the condition [L, hidden]: [L, n, P, width]."""
        base, count = self.bases[table], self.sizes.base_count(table)
        weight, gate = self.mixers[table](condition).split([count, base.shape[2]], dim=1)
        codes = torch.einsum("lk,kns->lns", weight, base[:, slots]) * (1 + gate)[:, None]
        maps = self.maps[table][..., :width] * self.get_buffer(f"scale_{table}")[:, None]
        return torch.einsum("lns,spw->lnpw", codes, maps)

    def tokens(self, shape: Metadata, latents: Latents, rows: Tensor | None = None) -> Tensor:
        """The vocabulary pairs of the tokens in `rows` (all by default), [V, 2, d]."""
        mean = Latents(latents.model, latents.blocks.mean(0, keepdim=True))
        condition = self._features(shape, mean, torch.zeros(1, dtype=torch.long))
        rows = torch.arange(self.sizes.tokens) if rows is None else rows
        return self._entries("token", condition, rows, shape.width)[0]

    def blocks(self, shape: Metadata, latents: Latents, index: Tensor) -> dict[str, Tensor]:
        """The tables of blocks number `index` [n], each with a first axis of n. The latents have the shape's depth."""
        h, groups, share = shape.head_dim, shape.kv_heads, shape.heads // shape.kv_heads
        condition = self._features(shape, latents, index)
        members = [condition, *(self._features(shape, latents, index, i) for i in range(1, share))]
        heads = self._head_slots(groups, h)
        query = [self._entries("query", c, heads, shape.width).unflatten(1, (groups, h)) for c in members]
        return {
            "neuron": self._entries("neuron", condition, torch.arange(shape.ffn), shape.width),
            "query": torch.stack(query, dim=2),
            "key": self._entries("key", condition, heads, shape.width).unflatten(1, (groups, h)),
        }

    def _head_slots(self, groups: int, head_dim: int) -> Tensor:
        """The slots of the components of KV heads, int64 [groups * head_dim].

        A head of another size takes the components whose rotary frequencies are nearest."""
        own = self.sizes.head_dim
        half = torch.arange(head_dim // 2) * own // head_dim
        component = torch.cat([half, half + own // 2]) if head_dim != own else torch.arange(own)
        return (torch.arange(groups)[:, None] * own + component).flatten()


def all_blocks(field: WeightField, shape: Metadata, latents: Latents) -> dict[str, Tensor]:
    """The tables of all blocks, each with a first axis of L."""
    return field.blocks(shape, latents.at_depth(shape.layers), torch.arange(shape.layers))


@torch.no_grad()
def start_field(
    field: WeightField, blocks: list[dict[str, Tensor]], tokens: list[Tensor], rng: torch.Generator
) -> None:
    """Sets bases and maps to the principal components of a zoo's blocks, by table, and of its vocabularies.

    blocks: one per base, tables without an axis of layers; the slots of a group's further query heads are left out.
    Neurons, heads and coordinates that no block has start as weak copies and noise, because training cannot move exact
    zeros away from zero."""
    for table in TABLE_ROLES:
        found = tokens if table == "token" else [_slot_table(block, table) for block in blocks]
        if found:
            _start_table(field, table, found[: field.sizes.base_count(table)], rng)


def _slot_table(block: Mapping[str, Tensor], table: str) -> Tensor:
    """A table as [slots, P, d], with the first query head of each group."""
    entries = block[table]
    if table == "neuron":
        return entries
    return (entries[:, 0] if table == "query" else entries).flatten(0, 1)


def _start_table(field: WeightField, table: str, found: list[Tensor], rng: torch.Generator) -> None:
    sizes = field.sizes
    base, maps, rank = field.bases[table], field.maps[table], sizes.table_rank(table)
    energy = torch.stack([t.square().mean((0, 2)) for t in found]).mean(0)  # a donor counts by its own RMS
    scale = energy.sqrt()
    flat = [torch.nn.functional.pad(t / scale[:, None], (0, sizes.width - t.shape[-1])).flatten(1) for t in found]
    rows = torch.cat(flat).double()
    axes = symmetric_eigenvectors(rows.mT @ rows)[1].mT[:rank].float()
    kept = len(axes)
    field.get_buffer(f"scale_{table}").copy_(scale)
    base.zero_()
    maps.zero_()
    maps[:kept] = axes.unflatten(1, (-1, sizes.width))
    for k, t in enumerate(flat):
        n = min(len(t), base.shape[1])
        base[k, :n, :kept] = t[:n] @ axes.mT
        missing = base.shape[1] - n
        if missing and table != "token":
            rms = base[k, :n].square().mean().sqrt()
            copies = base[k, torch.arange(missing) % n]
            base[k, n:] = 0.4 * (copies + rms * torch.randn(copies.shape, generator=rng))
    for k in range(len(flat), len(base)):  # a zoo of fewer blocks than bases
        base[k] = base[k % len(flat)]
    known = max(t.shape[-1] for t in found)
    maps[:, :, known:] = 0.05 / rank**0.5 * torch.randn(maps[:, :, known:].shape, generator=rng)
    rms = base.square().mean().sqrt()
    base /= rms
    maps *= rms
