"""Units of several donors in one model: a mixture of their laws, in the residual basis that alignment gives them.

Units of different donors can stand beside each other only where their residual vectors mean the same. Donors are
brought into canonical form and aligned by their vocabulary, so the residual coordinates are shared
and cannot be drawn: a narrower target takes the first, a wider one is zero beyond the widest donor. The hidden spaces
have no common coordinates and need none. With mu_a the law of donor a's n_a units in a layer, that layer adds
n_a E_mu_a[down phi(gate x, up x)] to the stream, and a pool of A donors is to add the mean of that over a. [R: the
published text samples one donor.] N units, N / A of each donor, add this in expectation where each writes n_a / N of
its output (scale n/N). The scale 1/multiplicity shares a unit's output among its copies instead, and divides by the
number of whole layers that were drawn where that is more than one. Heads likewise, by whole KV groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.transfer.index_maps import spread_queries
from baselines.transfer.transfer import vocabulary_rows
from zoo.donors.store import Chosen, Donor, Zoo, size_gap
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.units.aligned import align, token_strings
from zoo.units.canonical import tie
from zoo.units.decoder import write_decoder
from zoo.units.units import ROLES, addresses, require_unit_target, scatter, to_width


class Pool(Chosen):
    """The donors whose units are pooled, the one that gives the vocabulary first."""

    @property
    def shapes(self) -> tuple[Metadata, ...]:
        return tuple(donor.blueprint.metadata for donor in self.members if donor.blueprint.metadata is not None)


@dataclass(frozen=True)
class Picked:
    """Units of one layer of one donor: neurons, or query heads in whole groups."""

    index: Tensor  # [n] int64
    scale: Tensor  # [n]: what each writes of its output
    first: int  # where they stand in the target's layer


@dataclass(frozen=True)
class Drawn:
    """What a layer of the target takes of one donor."""

    layer: int  # the donor's
    neurons: Picked
    heads: Picked


def choose(zoo: Zoo | None, blueprint: Blueprint, wanted: str, tokenizer: str | None, who: str) -> Pool:
    """wanted: names with commas between, or how many of the donors that fit, nearest in size first. Raises UserError,
    with the reason, where one that is named does not fit, or too few fit. Reads configs and tokenizers only."""
    target = require_unit_target(blueprint, "target")
    if zoo is None:
        raise UserError(f"{who}: a pool needs a zoo: give --zoo DIR")
    names = [] if wanted.isdecimal() else [name.strip() for name in wanted.split(",")]
    fitting: list[tuple[float, Donor]] = []
    for donor in [zoo.donor(name) for name in names] or zoo.donors:
        try:
            shape = require_unit_target(donor.blueprint, donor.name)
            if shape.head_dim != target.head_dim:
                raise UserError(f"head_dim {shape.head_dim} is not the target's {target.head_dim}")
            vocabulary_rows(donor, blueprint, tokenizer)
        except UserError as error:
            if names:
                raise UserError(f"{who}: donor {donor.name!r} does not fit the pool: {error}") from error
            continue
        fitting.append((size_gap(donor, blueprint), donor))
    count = len(names) or int(wanted)
    if count < 2 or len(set(names)) < len(names):
        raise UserError(f"{who}: pool={wanted} is not several donors; give at least two, or donor=NAME for one")
    if len(fitting) < count:
        raise UserError(
            f"{who}: pool={wanted}, and {len(fitting)} donors of {zoo.path} fit the target (RMSNorm, rotary attention,"
            f" a gated MLP, head_dim {target.head_dim}, its tokens)"
        )
    if not names:
        fitting.sort(key=lambda entry: (entry[0], entry[1].name))
    members = tuple(donor for _, donor in fitting[:count])
    tokens = {donor.name: set(token_strings(donor)) for donor in members}
    for a, b in itertools.combinations(tokens, 2):
        if tokens[a].isdisjoint(tokens[b]):
            raise UserError(f"{who}: {a!r} and {b!r} share no token string to be aligned by; pool donors that do")
    return Pool(zoo.path, members)


def draw(
    pool: Pool,
    target: Metadata,
    mix: str,
    layers: Sequence[tuple[int, ...]],
    shares: Sequence[Sequence[float]],
    index: Callable[[int, int], Tensor],
    scale: Callable[[Tensor, int, int, float], Tensor | float],
    generator: torch.Generator,
) -> list[dict[int, Drawn]]:
    """Per donor: layer of the target -> what that takes of the donor.

    mix: `units` (every layer from all donors) or `layers` (every layer from one, all equally often). layers, shares:
    per donor, its layer of each of the target's and what that writes of its output. index(t, s): [s] int64, s of t.
    scale(index, n, N, whole): of units drawn by index from n for N, when `whole` layers were drawn altogether."""
    shapes = pool.shapes
    everyone = list(range(len(shapes)))
    turns = index(len(shapes), target.layers)[torch.randperm(target.layers, generator=generator)].tolist()
    out: list[dict[int, Drawn]] = [{} for _ in shapes]

    def picked(found: dict[int, Tensor], sizes: dict[int, int], wanted: int, i: int) -> dict[int, Picked]:
        whole = sum(len(found[a].unique()) / sizes[a] for a in found)
        firsts = itertools.accumulate((len(chosen) for chosen in found.values()), initial=0)
        return {
            a: Picked(chosen, torch.ones(1) * scale(chosen, sizes[a], wanted, whole) * shares[a][i], first)
            for (a, chosen), first in zip(found.items(), firsts, strict=False)
        }

    for i in range(target.layers):
        among = everyone if mix == "units" else [turns[i]]
        neurons, heads = {}, {}
        for a, n in zip(among, _split(len(among), target.ffn, index), strict=True):
            neurons[a] = index(shapes[a].ffn, n)
        for a, n in zip(among, _split(len(among), target.kv_heads, index), strict=True):
            per_group = shapes[a].heads // shapes[a].kv_heads
            groups = index(shapes[a].kv_heads, n)
            queries = spread_queries(groups, per_group, target.heads // target.kv_heads)
            heads[a] = (groups[:, None] * per_group + queries).flatten()
        of_neurons = picked(neurons, {a: shapes[a].ffn for a in among}, target.ffn, i)
        of_heads = picked(heads, {a: shapes[a].heads for a in among}, target.heads, i)
        for a in among:
            out[a][i] = Drawn(layers[a][i], of_neurons[a], of_heads[a])
    return out


def _split(donors: int, units: int, index: Callable[[int, int], Tensor]) -> list[int]:
    """How many of the units each donor gives."""
    return torch.bincount(index(donors, units), minlength=donors).tolist()


def sample(
    pool: Pool,
    blueprint: Blueprint,
    drawn: list[dict[int, Drawn]],
    vocabulary: str,
    tokenizer: str | None,
    generator: torch.Generator,
) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor) of a target filled with what `draw` gave. One donor and the target's units are in memory
    at a time.

    vocabulary: `first` (pairs of the pool's first donor) or `mean` (over the donors that know the token). Tokens that
    none of them knows are drawn: normal, with mean and standard deviation of the others, coordinate by coordinate."""
    target = blueprint.metadata
    assert target is not None
    count = {kind: len(layer) for kind, (layer, _, _) in addresses(target).items()}
    units = {kind: torch.zeros(n, len(ROLES[kind]), target.width) for kind, n in count.items()}
    kinds = (("neuron", "ffn", 1), ("qk", "heads", target.head_dim // 2), ("vo", "heads", target.head_dim))
    known = torch.zeros(target.vocab)
    left = list(pool.names)
    for donor in align(pool):
        a = pool.names.index(donor.name)
        left.remove(donor.name)
        for i, found in drawn[a].items():
            for kind, of, size in kinds:
                picked = found.neurons if of == "ffn" else found.heads
                mine = donor.units[kind].unflatten(0, (-1, getattr(donor.metadata, of), size))
                taken = to_width(mine[found.layer, picked.index], target.width)
                if kind != "qk":  # queries and keys write nothing
                    taken[..., -1, :] *= picked.scale[:, None, None]
                place = slice(picked.first, picked.first + len(taken))
                units[kind].unflatten(0, (target.layers, -1, size))[i, place] = taken
        if a == 0 or vocabulary == "mean":
            rows = vocabulary_rows(pool.members[a], blueprint, tokenizer).index
            there = rows >= 0
            units["vocab"][there] += to_width(donor.units["vocab"][rows[there]], target.width)
            known += there
    if left:
        raise UserError(f"{pool.path}: donor {left[0]!r} could not be brought into canonical form; leave it out")
    pairs = units["vocab"]
    pairs /= known.clamp_min(1)[:, None, None]
    fresh, those = known == 0, pairs[known > 0]
    draws = torch.randn(int(fresh.sum()), *pairs.shape[1:], generator=generator)
    pairs[fresh] = those.mean(0) + those.std(0, correction=0) * draws
    decoder = scatter(units, target)
    yield from write_decoder(tie(decoder) if target.tied else decoder, blueprint)
