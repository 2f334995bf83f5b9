"""The field: a network that writes the residual vectors of a block of any shape.

An entry of a table (`zoo/units/tables.py`) is the vector

    map · (gate ⊙ Σ_k weight_k · basis_k[slot])

`basis_k[slot]` are S numbers that belong to a neuron's rank, to a component of a head, or to a token. `map` turns them
into residual vectors over the widest stream. The weights and gates come from a small network that reads the depth, the
shape and the latents, so they are what differs between blocks, shapes and models. Bases and maps are shared by all.

The single numbers of an entry, such as the bias of a neuron, come from the same S numbers by a map of their own. The
field holds the roles of all families of a zoo; a shape gets those of its own family.

A target that is narrower than the field uses the first coordinates, neurons and heads; the network learns what this
costs and corrects it. Letters: K bases, S rank, P vectors of an entry, W width of the field, L blocks, n slots, c free
coordinates of a shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.linear_algebra import symmetric_eigenvectors
from zoo.tensors import Metadata
from zoo.units.family import FLAGS, NUMBER_ROLES, PLAIN, VECTOR_ROLES, Family, coordinates, family_of
from zoo.units.tables import join_constants, neutral_value, numbers_of

DEPTH_FREQUENCIES = (1.0, 2.0, 4.0, 8.0)  # Fourier features of the relative depth, in half-turns
DEPTH_FEATURES = 2 + 2 * len(DEPTH_FREQUENCIES)
SHAPE_FEATURES = 7
OUTER_TABLES = ("token", "position")  # of a model; the others are of a block


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
    positions: int = 0  # learned ones
    token_rank: int = 0  # the rank of the vocabulary's tables, where it is lower; 0: as `rank`
    families: tuple[Family, ...] = (PLAIN,)  # of the donors

    def to_json(self) -> dict[str, int]:
        """The sizes by name, without the families; those that can be 0 only where they are not."""
        return {name: value for name, value in vars(self).items() if name != "families" and value != 0}

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that some family has."""
        return tuple(t for t in VECTOR_ROLES if self.vector_roles(t))

    def vector_roles(self, table: str) -> tuple[str, ...]:
        """The residual vectors of an entry that some family has."""
        return tuple(r for r in VECTOR_ROLES[table] if any(f.has_role(r) for f in self.families))

    def number_roles(self, table: str) -> tuple[str, ...]:
        """The single numbers of an entry that some family has."""
        return tuple(r for r in NUMBER_ROLES.get(table, ()) if any(f.has_role(r) for f in self.families))

    @property
    def flags(self) -> int:
        """How many numbers tell the families apart: none if there is one family."""
        return FLAGS if len(self.families) > 1 else 0

    def slots(self, table: str) -> int:
        """How many entries a table has in its largest shape, with one query head per KV head."""
        heads = self.groups * self.head_dim
        sizes = {"neuron": self.neurons, "query": heads, "key": heads, "token": self.tokens}
        return {**sizes, "block": 1, "position": self.positions}[table]

    def base_count(self, table: str) -> int:
        return self.token_bases if table in OUTER_TABLES else self.bases

    def table_rank(self, table: str) -> int:
        """S of a table: never more than its vectors have numbers, and for a table of one slot than it has bases."""
        numbers = len(self.vector_roles(table)) * self.width + len(self.number_roles(table))
        if table in OUTER_TABLES:
            return min(self.token_rank or self.rank, numbers)
        return min(self.rank, numbers, self.bases) if table == "block" else min(self.rank, numbers)


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
        for table in sizes.tables:
            count, rank, roles = sizes.base_count(table), sizes.table_rank(table), sizes.vector_roles(table)
            self.bases[table] = nn.Parameter(torch.randn(count, sizes.slots(table), rank))
            self.maps[table] = nn.Parameter(torch.randn(rank, len(roles), sizes.width) / rank**0.5)
            self.mixers[table] = nn.Linear(sizes.hidden, count + rank)
            self.register_buffer(f"scale_{table}", torch.ones(len(roles)))  # RMS of the entries of each role
            if numbers := len(sizes.number_roles(table)):
                self.maps[numbers_of(table)] = nn.Parameter(torch.randn(rank, numbers) / rank**0.5)
                self.register_buffer(f"scale_{numbers_of(table)}", torch.ones(numbers))
        n_features = DEPTH_FEATURES + SHAPE_FEATURES + sizes.flags + 1 + sizes.model_latent + sizes.block_latent
        self.condition = nn.Sequential(
            nn.Linear(n_features, sizes.hidden), nn.SiLU(), nn.Linear(sizes.hidden, sizes.hidden), nn.SiLU()
        )
        for mixer in self.mixers.values():
            nn.init.zeros_(mixer.get_parameter("bias"))

    def _features(self, shape: Metadata, latents: Latents, index: Tensor, member: float = 0.0) -> Tensor:
        """The condition of blocks number `index` [n], for query heads number `member` of their groups: [n, hidden]."""
        n, device = len(index), latents.model.device
        flags = torch.tensor(family_of(shape).flags() if self.sizes.flags else [])
        parts = [
            depth_features(index, shape.layers).to(device),
            torch.cat([shape_features(shape), flags]).to(device).expand(n, -1),
            torch.full((n, 1), member / 2, device=device),
            latents.model.expand(n, -1),
            latents.blocks[index.to(device)],
        ]
        return self.condition(torch.cat(parts, dim=1))

    def _vocabulary_condition(self, shape: Metadata, latents: Latents) -> Tensor:
        mean = Latents(latents.model, latents.blocks.mean(0, keepdim=True))
        return self._features(shape, mean, torch.zeros(1, dtype=torch.long))

    def _entries(self, table: str, condition: Tensor, slots: Tensor, shape: Metadata) -> dict[str, Tensor]:
        """The entries of slots [n], one table per row of the condition [L, hidden]: vectors [L, n, P, c] and, for a
        family that has some, numbers [L, n, S]. Roles that no donor has are neutral."""
        family, size = family_of(shape), coordinates(shape)
        wanted, numbers = family.vector_roles(table), family.number_roles(table)
        if table not in self.bases:
            return {table: _in_order({}, wanted, condition.new_zeros(len(condition), len(slots), size), -2, shape)}
        base, count = self.bases[table], self.sizes.base_count(table)
        weight, gate = self.mixers[table](condition).split([count, base.shape[2]], dim=1)
        codes = torch.einsum("lk,kns->lns", weight, base[:, slots]) * (1 + gate)[:, None]
        roles = self.sizes.vector_roles(table)
        maps = self.maps[table][..., :size] * self.get_buffer(f"scale_{table}")[:, None]
        if wanted == roles:
            found = {table: torch.einsum("lns,spw->lnpw", codes, maps)}
        else:
            own = {r: torch.einsum("lns,sw->lnw", codes, maps[:, roles.index(r)]) for r in wanted if r in roles}
            found = {table: _in_order(own, wanted, codes.new_zeros(*codes.shape[:2], size), -2, shape)}
        if numbers:
            roles, own = self.sizes.number_roles(table), {}
            if roles:
                name = numbers_of(table)
                every = codes @ (self.maps[name] * self.get_buffer(f"scale_{name}"))
                own = dict(zip(roles, every.unbind(-1), strict=True))
            found[numbers_of(table)] = _in_order(own, numbers, codes.new_zeros(codes.shape[:2]), -1, shape)
        return found

    def tokens(self, shape: Metadata, latents: Latents, rows: Tensor | None = None) -> Tensor:
        """The vocabulary pairs of the tokens in `rows` (all by default), [V, 2, d]."""
        condition = self._vocabulary_condition(shape, latents)
        rows = torch.arange(self.sizes.tokens) if rows is None else rows
        found = self._entries("token", condition, rows, shape)
        if family_of(shape).norm != "layer":
            return found["token"][0]
        constants = found.get(numbers_of("token"))
        return join_constants(found["token"][0], None if constants is None else constants[0, :, 0])

    def positions(self, shape: Metadata, latents: Latents) -> Tensor | None:
        """The learned positions of a shape, [P, 1, c]; None for a family without. Positions beyond the field's repeat
        (2004.05150)."""
        if not family_of(shape).positions:
            return None
        slots = torch.arange(shape.positions) % self.sizes.positions
        return self._entries("position", self._vocabulary_condition(shape, latents), slots, shape)["position"][0]

    def blocks(self, shape: Metadata, latents: Latents, index: Tensor) -> dict[str, Tensor]:
        """The tables of blocks number `index` [n], each with a first axis of n. The latents have the shape's depth."""
        h, groups, share = shape.head_dim, shape.kv_heads, shape.heads // shape.kv_heads
        condition = self._features(shape, latents, index)
        members = [condition, *(self._features(shape, latents, index, i) for i in range(1, share))]
        heads = self._head_slots(shape)
        query = [_by_head(self._entries("query", c, heads, shape), groups, h) for c in members]
        found = {
            **self._entries("neuron", condition, torch.arange(shape.ffn), shape),
            **{name: torch.stack([q[name] for q in query], dim=2) for name in query[0]},
            **_by_head(self._entries("key", condition, heads, shape), groups, h),
        }
        if family_of(shape).vector_roles("block"):
            found |= self._entries("block", condition, torch.zeros(1, dtype=torch.long), shape)
        return found

    def _head_slots(self, shape: Metadata) -> Tensor:
        """The slots of the components of KV heads, int64 [groups * head_dim]."""
        own = self.sizes.head_dim
        component = head_components(own, shape.head_dim, family_of(shape).rotary)
        return (torch.arange(shape.kv_heads)[:, None] * own + component).flatten()


def head_components(own: int, head_dim: int, rotary: float) -> Tensor:
    """The component of a head of `own` components for each one of another size, int64 [head_dim].

    A share `rotary` is turned: it takes the components whose frequencies are nearest. The others take the first ones,
    which are the most important, and repeat them if there are too few."""
    if own == head_dim:
        return torch.arange(own)
    turned, own_turned = (int(rotary * size) // 2 * 2 for size in (head_dim, own))
    half = torch.arange(turned // 2) * own_turned // max(turned, 1)
    rest = own_turned + torch.arange(head_dim - turned) % max(own - own_turned, 1)
    return torch.cat([half, half + own_turned // 2, rest])


def _by_head(entries: dict[str, Tensor], groups: int, head_dim: int) -> dict[str, Tensor]:
    return {name: table.unflatten(1, (groups, head_dim)) for name, table in entries.items()}


def _in_order(
    found: Mapping[str, Tensor], roles: tuple[str, ...], like: Tensor, dim: int, shape: Metadata | None = None
) -> Tensor:
    """Parts by role, stacked in the order of `roles`. A role that is missing is neutral at a shape, zero without one.
    like: a tensor of a part's shape."""

    def value(role: str) -> float:
        return 0.0 if shape is None else neutral_value(role, shape)

    return torch.stack([found[r] if r in found else torch.full_like(like, value(r)) for r in roles], dim=dim)


def in_field_roles(tables: Mapping[str, Tensor], family: Family, sizes: FieldSizes) -> dict[str, Tensor]:
    """Tables of a family in all roles of a field, zero for those that the family lacks.

    Tables that the field has and the family lacks are left out, unless they are the numbers of entries."""
    found = {}
    for table in sizes.tables:
        if table not in tables:
            continue
        entries, roles, numbers = tables[table], sizes.vector_roles(table), sizes.number_roles(table)
        own = family.vector_roles(table)
        if own == roles:
            found[table] = entries
        else:
            found[table] = _in_order(dict(zip(own, entries.unbind(-2), strict=True)), roles, entries[..., 0, :], -2)
        if numbers:
            own, name = family.number_roles(table), numbers_of(table)
            parts = dict(zip(own, tables[name].unbind(-1), strict=True)) if own else {}
            found[name] = _in_order(parts, numbers, entries[..., 0, 0], -1)
    return found


def all_blocks(field: WeightField, shape: Metadata, latents: Latents) -> dict[str, Tensor]:
    """The tables of all blocks, each with a first axis of L."""
    return field.blocks(shape, latents.at_depth(shape.layers), torch.arange(shape.layers))


@torch.no_grad()
def start_field(
    field: WeightField,
    blocks: list[dict[str, Tensor]],
    vocabularies: list[dict[str, Tensor]],
    rng: torch.Generator,
) -> None:
    """Sets bases and maps to the principal components of a zoo's blocks, by table, and of its vocabularies.

    blocks: one per base, tables in the field's roles without an axis of layers; the slots of a group's further query
    heads are left out. vocabularies: the table `token`, with its numbers, and `position` where there is one. Neurons,
    heads and coordinates that no block has start as weak copies and noise, because training cannot move exact zeros
    away from zero."""
    for table in field.sizes.tables:
        sources = vocabularies if table in OUTER_TABLES else blocks
        found = [_slot_tables(source, table) for source in sources if table in source]
        if found:
            _start_table(field, table, found[: field.sizes.base_count(table)], rng)


def _slot_tables(source: Mapping[str, Tensor], table: str) -> tuple[Tensor, Tensor | None]:
    """A table as vectors [slots, P, c] and numbers [slots, S], with the first query head of each group."""

    def by_slot(entries: Tensor) -> Tensor:
        if table not in ("query", "key"):
            return entries
        return (entries[:, 0] if table == "query" else entries).flatten(0, 1)

    numbers = source.get(numbers_of(table))
    return by_slot(source[table]), None if numbers is None else by_slot(numbers)


def _role_scale(energies: list[Tensor]) -> Tensor:
    """The RMS of each role over the sources that have it, by their mean squares [P]; 1 where it is zero in all."""
    energy = torch.stack(energies)
    mean = energy.sum(0) / (energy > 0).sum(0).clamp_min(1)
    return torch.where(mean > 0, mean.sqrt(), torch.ones_like(mean))


def _start_table(
    field: WeightField, table: str, found: list[tuple[Tensor, Tensor | None]], rng: torch.Generator
) -> None:
    sizes = field.sizes
    base, maps, rank = field.bases[table], field.maps[table], sizes.table_rank(table)
    scale = _role_scale([t.square().mean((0, 2)) for t, _ in found])  # a donor counts by its own RMS
    flat = [torch.nn.functional.pad(t / scale[:, None], (0, sizes.width - t.shape[-1])).flatten(1) for t, _ in found]
    field.get_buffer(f"scale_{table}").copy_(scale)
    weight = sizes.width**0.5  # of a number, so that it counts as much as a vector
    if sizes.number_roles(table):
        numbers = [n for _, n in found if n is not None]
        number_scale = _role_scale([n.square().mean(0) for n in numbers])
        field.get_buffer(f"scale_{numbers_of(table)}").copy_(number_scale)
        flat = [torch.cat([t, n / number_scale * weight], dim=1) for t, n in zip(flat, numbers, strict=True)]
    rows = torch.cat(flat).double()
    axes = symmetric_eigenvectors(rows.mT @ rows)[1].mT[:rank].float()
    kept, columns = len(axes), maps[0].numel()
    base.zero_()
    maps.zero_()
    maps[:kept] = axes[:, :columns].unflatten(1, (-1, sizes.width))
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
    known = max(t.shape[-1] for t, _ in found)
    maps[:, :, known:] = 0.05 / rank**0.5 * torch.randn(maps[:, :, known:].shape, generator=rng)
    rms = base.square().mean().sqrt()
    base /= rms
    maps *= rms
    if sizes.number_roles(table):
        number_maps = field.maps[numbers_of(table)]
        number_maps.zero_()
        number_maps[:kept] = axes[:, columns:] / weight * rms
