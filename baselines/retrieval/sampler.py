"""The method `retrieval`: blocks, heads and tokens of all donors of a zoo, chosen by a formula instead of a network."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from baselines.retrieval.bank import Bank, BankDonor, BankRequest, fit_bank, fitting_donors, open_bank
from baselines.retrieval.choice import DISAGREEMENT_SCALE, depth_distances, donor_distances, drawn_groups, drawn_order
from baselines.transfer.vocabulary import composed_rows, vocabulary_rows
from zoo.donors.zoo import Zoo
from zoo.options import option
from zoo.sampler import Sampler
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.units.decoder import Decoder, Layer, write_decoder
from zoo.units.gains import tie_head
from zoo.units.lazy import LazySequence
from zoo.units.resizing import principal_axes, project_to_axes, residual_energy, resize_units, to_width
from zoo.units.units import ROLES, unit_addresses, units_to_decoder, vocabulary_decoder
from zoo.vocabularies.build import DEFAULT_RULE, RULES, VOCABULARY_HELP
from zoo.words import shortened_list

log = logging.getLogger(__name__)

MAX_CACHED_NUMBERS = 1 << 26  # blocks of a narrower target are cached up to this size, else read twice


@dataclass(frozen=True)
class DrawnBlock:
    """A block of a donor that a block of the target takes."""

    donor: BankDonor
    index: int
    copies: int  # how many blocks of the target take it; they share its output


@dataclass(kw_only=True)
class Retrieval(Sampler):
    """Fills a target with units of a zoo's donors. No network is trained, and nothing but `noise` is new.

    The donors are brought into canonical form and aligned to the widest one by shared tokens. A donor is drawn for the
    whole model and gives the vocabulary. Each block of the target takes one block of one donor, each of its KV heads
    one KV head of that block, its neurons the block's most important ones. What is too few is repeated, and the copies
    share their output. A narrower target is cut along the principal axes of what was chosen. Coordinates that a donor
    does not have are small noise, because training does not move exact zeros apart.

    Our choice: a donor, a block and a head are drawn with a probability in proportion to exp(-d^2 / (2 bandwidth^2)).
    The distance d of a donor counts factors of two in each size and tenths of a nat of recorded loss. That of a block
    also counts blocks of relative depth, and how much the donor's vocabulary differs from that of the drawn donor.
    Blocks of donors that were trained independently do not work together, so nearly all come from the drawn one.

    Memory: the vocabulary of one donor, a rotation [d, d] per donor, one block three times over, and for narrower
    targets up to 2^26 numbers of blocks.
    """

    name: ClassVar[str] = "retrieval"
    family: ClassVar[str] = "generative"
    summary: ClassVar[str] = "blocks, heads and tokens drawn from all donors by their distance in depth, shape and loss"
    reference: ClassVar[str] = "baselines/README.md"
    needs: ClassVar[tuple[str, ...]] = ("donors",)
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"vocabulary": RULES}

    donor: str | None = option(None, "name of the only donor; none: all that fit")
    tokenizer: str | None = option(None, "the target's tokenizer (folder or tokenizer.json), to match tokens by string")
    vocabulary: str = option(DEFAULT_RULE, VOCABULARY_HELP)
    loss: float | None = option(None, "held-out loss of the donors to prefer; none: the lowest of the zoo")
    bandwidth: float = option(
        0.2, "how far draws reach: a distance d has the weight exp(-d^2 / (2 bandwidth^2)); 0: the nearest", least=0.0
    )
    noise: float = option(
        0.1, "standard deviation of the noise on a unit, relative to the RMS of its vectors", least=0.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._bank = Bank()

    @property
    def donors(self) -> tuple[str, ...]:
        return tuple(member.donor.name for member in self._bank.members)

    def planned_donors(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        return tuple(donor.name for donor in fitting_donors(zoo, self._request(blueprint)))

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        found = fitting_donors(zoo, self._request(blueprint))
        assert zoo is not None  # `fitting_donors` refuses that
        self._bank = fit_bank(zoo, found, self.name, self.device)
        log.info("%s: from %d donors: %s", self.name, len(self.donors), shortened_list(self.donors))
        known = self._known_rows(blueprint)
        if not known.all():
            log.info(
                "%s: donors have %d of the target's %d tokens; the others are made by the rule %s, or drawn",
                self.name, int(known.sum()), len(known), self.vocabulary,
            )  # fmt: skip
        return self

    def _known_rows(self, blueprint: Blueprint) -> Tensor:
        """bool [V]: the target's tokens that a donor has."""
        donors = [member.donor for member in self._bank.members]
        rows = [vocabulary_rows(donor, blueprint, self.tokenizer, self.vocabulary).index for donor in donors]
        return (torch.stack(rows) >= 0).any(0)

    def details(self, blueprint: Blueprint) -> dict[str, Any]:
        known = self._known_rows(blueprint) if self._bank.members else torch.ones(1)
        record = {"rule": self.vocabulary, "tokens": len(known), "copied": int(known.sum())}
        return {} if known.all() else {"vocabulary": record}

    def _request(self, blueprint: Blueprint) -> BankRequest:
        return BankRequest(self.name, blueprint, self.donor, self.tokenizer, self.vocabulary)

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        target, members = blueprint.metadata, self._bank.members
        if not members or target is None:
            raise RuntimeError(f"{self.name}: call fit before sample")
        distances = donor_distances([m.metadata for m in members], [m.loss for m in members], target, self.loss)
        order = drawn_order(distances, self.bandwidth, self._stream(seed, "donors")).tolist()
        distances += self._bank.disagreement[order[0]] / DISAGREEMENT_SCALE**2
        blocks = self._draw_blocks(distances, target, seed)
        taken = Counter(block.donor.donor.name for block in blocks)
        counts = ", ".join(f"{count} of {name}" for name, count in taken.most_common(3))
        log.info("%s: vocabulary of %s; blocks: %s", self.name, members[order[0]].donor.name, counts)
        pairs = self._vocabulary(blueprint, [members[i] for i in order], seed)
        width = max(target.width, pairs.shape[-1], *(block.donor.metadata.width for block in blocks))
        pairs = self._with_noise(to_width(pairs, width), members[order[0]], self._stream(seed, "noise vocab"))

        def block_units(index: int) -> dict[str, Tensor]:
            return self._block_units(blocks[index], index, replace(target, width=width), seed)

        decoder = lazy_decoder(pairs, block_units, target)
        for name, tensor in write_decoder(tie_head(decoder) if target.tied else decoder, blueprint):
            yield name, tensor.cpu()

    def _draw_blocks(self, distances: Tensor, target: Metadata, seed: int) -> list[DrawnBlock]:
        """The block of a donor for each block of a target. distances: of the donors, squared [D]."""
        members = self._bank.members
        numbers = [(m, i) for m in members for i in range(m.metadata.layers)]
        depth = torch.cat([depth_distances(m.metadata.layers, target.layers) for m in members], dim=1)
        squared = depth + distances.repeat_interleave(torch.tensor([m.metadata.layers for m in members]))
        drawn = [
            int(drawn_order(row, self.bandwidth, self._stream(seed, f"block {i}"))[0]) for i, row in enumerate(squared)
        ]
        copies = Counter(drawn)
        return [DrawnBlock(*numbers[number], copies[number]) for number in drawn]

    def _block_units(self, drawn: DrawnBlock, index: int, shape: Metadata, seed: int) -> dict[str, Tensor]:
        """The units of block `index` of a target by kind, float32 vectors [N, P, shape.width]."""
        source = drawn.donor.metadata
        order = drawn_groups(source.kv_heads, shape.kv_heads, self.bandwidth, self._stream(seed, f"heads {index}"))
        units = reorder_groups(drawn.donor.block(drawn.index), order)
        resized = resize_units(units, replace(source, layers=1, vocab=shape.vocab), replace(shape, layers=1))
        for kind in ("neuron", "vo"):
            resized[kind][:, -1] /= drawn.copies
        return {
            kind: self._with_noise(vectors, drawn.donor, self._stream(seed, f"noise {index} {kind}"))
            for kind, vectors in resized.items()
        }

    def _vocabulary(self, blueprint: Blueprint, members: list[BankDonor], seed: int) -> Tensor:
        """The vocabulary pairs, float32 [V, 2, width of the widest donor that gives one].

        members: the donors in the order in which they were drawn. A token that the first one does not have comes from
        the next one that has it; else the rule `vocabulary` says how it is made of the first one's."""
        first = members[0]
        rows = composed_rows(first.donor, blueprint, self.tokenizer, self.vocabulary)
        own = first.vocabulary()
        draws = torch.randn(len(rows.index), *own.shape[1:], generator=self._stream(seed, "tokens"))
        pairs = rows.apply(own, own.mean(0) + own.std(0, correction=0) * draws.to(own))
        missing = rows.index < 0
        for member in members[1:]:
            if not missing.any():
                break
            index = vocabulary_rows(member.donor, blueprint, self.tokenizer, self.vocabulary).index
            found = missing & (index >= 0)
            if found.any():
                width = max(pairs.shape[-1], member.metadata.width)
                pairs = to_width(pairs, width)
                pairs[found] = to_width(member.vocabulary()[index[found]], width)
                missing &= ~found
        return pairs

    def _with_noise(self, vectors: Tensor, donor: BankDonor, generator: torch.Generator) -> Tensor:
        """Vectors [N, P, d] of units of a donor, with normal noise on all coordinates, also those that it lacks."""
        if self.noise == 0:
            return vectors
        scale = self.noise * donor.metadata.width**-0.5 * vectors.norm(dim=-1, keepdim=True)
        return vectors + scale * torch.randn(vectors.shape, generator=generator).to(vectors)

    def _stream(self, seed: int, name: str) -> torch.Generator:
        return stream(seed, f"{self.name}/{name}")

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return self._bank.state()

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._bank = open_bank(values, tensors, self.name, self.device)


def reorder_groups(units: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """The units of a block with its KV groups in another order. order: int64 [K]."""
    return {
        kind: vectors.unflatten(0, (len(order), -1))[order].flatten(0, 1) if kind in ("qk", "vo") else vectors
        for kind, vectors in units.items()
    }


def lazy_decoder(pairs: Tensor, units: Callable[[int], dict[str, Tensor]], target: Metadata) -> Decoder:
    """A canonical decoder of vocabulary pairs [V, 2, W] and the units of each block, which are made when they are read.

    A target that is narrower than W is cut along the principal axes of all units."""
    axes, width = None, pairs.shape[-1]
    if width > target.width:
        units = cache(units) if _numbers_of_blocks(target, width) <= MAX_CACHED_NUMBERS else units
        energy = residual_energy({"vocab": pairs}, target)
        for index in range(target.layers):
            energy += residual_energy(units(index), target)
        axes = principal_axes(energy, target.width)
        pairs = project_to_axes({"vocab": pairs}, axes)["vocab"]

    def make_layer(index: int) -> Layer:
        found = units(index) if axes is None else project_to_axes(units(index), axes)
        return units_to_decoder({**found, "vocab": pairs[:0]}, replace(target, layers=1, vocab=0)).layers[0]

    return vocabulary_decoder(pairs, target, LazySequence(make_layer, target.layers))


def _numbers_of_blocks(shape: Metadata, width: int) -> int:
    """How many numbers the units of all blocks of a shape hold at this width."""
    block = unit_addresses(replace(shape, layers=1, vocab=0))
    return shape.layers * width * sum(len(address[0]) * len(ROLES[kind]) for kind, address in block.items())
