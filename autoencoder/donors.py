"""The donors of a zoo as training data: their tables in common coordinates, their tokens, and text for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoder.field import FieldSizes, head_components, in_field_roles
from zoo.donors.donor import Donor
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.tensors import Metadata
from zoo.training.corpora import corpus_name
from zoo.units.aligned import align_decoders, is_last_checkpoint, recorded_loss
from zoo.units.family import Family, family_of, require_family, with_family
from zoo.units.tables import layer_to_tables, numbers_of, position_table, split_constants, token_table

GROWTH = 1.25  # the field's largest width, heads and neurons, in those of the largest donor
RANK = 2.4  # numbers per slot and base, per coordinate of the field's width
SHARE = 0.42  # of the zoo's weights that the bases and maps of a field hold at most; networks come on top
MOST_BASES = 32
LEAST_BASES = 2
SMALL_ZOO = 2_000_000  # weights; below, the share does not bind


@dataclass(frozen=True)
class TrainingDonor:
    """One donor in canonical coordinates, float32."""

    donor: Donor
    shape: Metadata  # with its family (`zoo.units.family`)
    blocks: dict[str, Tensor]  # tables, each with a first axis of L
    tokens: Tensor  # [V, 2, d]
    rows: Tensor  # int64 [V]: the field's row of each token
    positions: Tensor | None = None  # [P, 1, c], where its family has learned ones

    @property
    def name(self) -> str:
        return self.donor.name

    @property
    def loss(self) -> float | None:
        """The held-out loss that is recorded for it, in nats per token."""
        return recorded_loss(self.donor.facts)

    @property
    def family(self) -> Family:
        return family_of(self.shape)

    @property
    def is_tied(self) -> bool:
        """Whether it has one tensor for head and embedding; `shape` is that of its tables, which have two."""
        metadata = self.donor.blueprint.metadata
        return metadata is not None and metadata.tied

    @property
    def corpus(self) -> str:
        """The name of the text that it was trained on, "" where it is not known."""
        return corpus_name(self.donor.facts)

    @property
    def is_final(self) -> bool:
        """Whether it is the last checkpoint of its run, as far as its facts say."""
        return is_last_checkpoint(self.donor.facts)


def read_training_donors(zoo: Zoo, quiet: bool) -> tuple[list[TrainingDonor], tuple[str, ...]]:
    """The donors whose whole function is in tables, and the token strings that the field's rows stand for.

    The widest donor comes first. Others are left out and, unless `quiet`, named on stderr. Raises UserError if the zoo
    has no usable donor."""
    row: dict[str, int] = {}
    donors = []
    for aligned in align_decoders(zoo, quiet, require=require_family):
        decoder = aligned.decoder
        shape = with_family(decoder.metadata, require_family(decoder, aligned.donor.name))
        decoder = replace(decoder, metadata=shape)
        tables = [{t: x.float() for t, x in layer_to_tables(layer, shape).items()} for layer in decoder.layers]
        blocks = {t: torch.stack([table[t] for table in tables]) for t in tables[0]}
        positions = position_table(decoder)
        for token in aligned.tokens:
            row.setdefault(token, len(row))
        rows = torch.tensor([row[token] for token in aligned.tokens])
        tokens = token_table(decoder).float()
        donors.append(
            TrainingDonor(aligned.donor, shape, blocks, tokens, rows, None if positions is None else positions.float())
        )
    return donors, tuple(row)


def field_sizes(donors: Sequence[TrainingDonor], tokens: int) -> FieldSizes:
    """The sizes of a field for these donors: room for shapes beyond the largest donor, and as many bases as keep its
    numbers below `SHARE` of the donors' weights."""

    def largest(size: str) -> int:
        return int(max(getattr(d.shape, size) for d in donors))

    width = -(-int(GROWTH * largest("width")) // 8) * 8
    rank = round(RANK * width)
    families = tuple(dict.fromkeys(d.family for d in donors))
    kinds = len({(d.corpus, d.family) for d in donors})
    shared: dict[str, Any] = {
        "width": width,
        "neurons": round(GROWTH * largest("ffn") * 1.06),
        "groups": -(-int(100 * GROWTH * largest("kv_heads")) // 100),
        "head_dim": largest("head_dim"),
        "tokens": tokens,
        "rank": rank,
        "token_bases": min(4, max(1, kinds), len(donors)) if tokens <= 4096 else 1,
        "positions": largest("positions"),
        "families": families,
    }
    weights = sum(d.donor.parameters for d in donors)
    token_rank = int(SHARE / 2 * weights / (tokens * shared["token_bases"]))
    if weights >= SMALL_ZOO and token_rank < rank:  # a large vocabulary would leave no room for blocks
        shared["token_rank"] = max(1, token_rank)
    bases = min(MOST_BASES, _blocks_of_one_donor(donors))
    while bases > LEAST_BASES * len(families) and weights >= SMALL_ZOO:
        if field_numbers(FieldSizes(bases=bases, **shared)) <= SHARE * weights:
            break
        bases -= 1
    return FieldSizes(bases=bases, **shared)


def _blocks_of_one_donor(donors: Sequence[TrainingDonor]) -> int:
    """The blocks of the largest donor of each text and family together. A donor of an unknown text is its own kind.

    With a base for every block of two donors of a text, training is slower: on three texts and 24 bases the loss after
    800 steps was 2.60, with 12 bases 2.37."""
    found: dict[tuple[str, Family], int] = {}
    for donor in _by_text_in_turn(donors):
        found.setdefault((donor.corpus or f"text of {donor.name}", donor.family), donor.shape.layers)
    return sum(found.values())


def count_numbers(donor: TrainingDonor) -> int:
    """The numbers in the tables of a donor."""
    positions = 0 if donor.positions is None else donor.positions.numel()
    return donor.tokens.numel() + sum(t.numel() for t in donor.blocks.values()) + positions


def field_numbers(sizes: FieldSizes) -> int:
    """The numbers that a field stores, without its small network."""
    total = 0
    for table in sizes.tables:
        rank, roles, numbers = sizes.table_rank(table), sizes.vector_roles(table), sizes.number_roles(table)
        total += sizes.base_count(table) * sizes.slots(table) * rank
        total += rank * (len(roles) * sizes.width + len(numbers))
    return total


def base_blocks(donors: Sequence[TrainingDonor], sizes: FieldSizes) -> list[dict[str, Tensor]]:
    """The blocks that the bases start from, in all roles of the field: whole donors, the largest final ones, each text
    in turn, and as many blocks of each family.

    The last donor gives evenly spaced blocks where there is no room for all."""
    blocks: list[dict[str, Tensor]] = []
    left = dict.fromkeys(sizes.families, -(-sizes.bases // len(sizes.families)))
    for donor in _by_text_in_turn(donors):
        room = min(donor.shape.layers, sizes.bases - len(blocks), left[donor.family])
        if room <= 0:
            continue
        left[donor.family] -= room
        places = torch.linspace(0, donor.shape.layers - 1, room).round().long().tolist() if room > 1 else [0]
        blocks += [_base_block(donor, i, sizes) for i in places]
    return blocks


def _base_block(donor: TrainingDonor, index: int, sizes: FieldSizes) -> dict[str, Tensor]:
    """A donor's block with heads of the field's size. Heads of another size repeat their components, or lose some."""
    tables = {t: x[index] for t, x in donor.blocks.items()}
    if donor.shape.head_dim != sizes.head_dim:
        component = head_components(donor.shape.head_dim, sizes.head_dim, donor.family.rotary)
        for table, axis in (("query", 2), ("key", 1)):
            for name in {table, numbers_of(table)} & set(tables):
                tables[name] = tables[name].index_select(axis, component)
    return in_field_roles(tables, donor.family, sizes)


def base_vocabularies(donors: Sequence[TrainingDonor], sizes: FieldSizes) -> list[dict[str, Tensor]]:
    """The token tables [tokens, 2, c] that the token bases start from, in all roles of the field, and position tables;
    the mean pair stands for a missing token."""
    ranked = _by_text_in_turn(donors)
    found = []
    for donor in ranked[: sizes.token_bases]:
        table = donor.tokens.mean(0).expand(sizes.tokens, *donor.tokens.shape[1:]).clone()
        table[donor.rows] = donor.tokens
        found.append(in_field_roles(split_constants(table, donor.family), donor.family, sizes))
    return found + [{"position": donor.positions} for donor in ranked if donor.positions is not None]


def _by_text_in_turn(donors: Sequence[TrainingDonor]) -> list[TrainingDonor]:
    ranked = sorted(donors, key=lambda d: (not d.is_final, -count_numbers(d), d.loss or 0.0, d.name))
    families = list(dict.fromkeys(d.family for d in donors))
    by_text: dict[tuple[str, int], list[TrainingDonor]] = {}
    for donor in ranked:
        by_text.setdefault((donor.corpus, families.index(donor.family)), []).append(donor)
    order = sorted(by_text)
    most = max(len(group) for group in by_text.values())
    return [by_text[text][i] for i in range(most) for text in order if i < len(by_text[text])]


FOR_ALL = "all"  # the name of a text that is given for every donor


def given_corpora(files: Mapping[str, str | Path], donors: Sequence[Donor]) -> dict[str, Path]:
    """{name: file} of --corpus, checked. A name is a donor's, that of a text in the donors' facts, or `all`.

    Raises UserError for another name, and for a file that does not exist."""
    names = {d.name for d in donors} | {corpus_name(d.facts) for d in donors} | {FOR_ALL}
    for name, path in files.items():
        if name not in names:
            raise UserError(
                f"--corpus {name}={path}: no donor and no donor's text is called {name!r}; see `headstart zoo list`"
            )
        if not Path(path).exists():
            raise UserError(f"--corpus {path}: no such file; give FILE, or NAME=FILE per donor or text")
    return {name: Path(path) for name, path in files.items()}
