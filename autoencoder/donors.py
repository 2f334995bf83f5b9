"""The donors of a zoo as training data: their tables in common coordinates, their tokens, and text for each."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from autoencoder.field import FieldSizes
from zoo.donors.donor import Donor
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.tensors import Metadata
from zoo.training.corpora import corpus_name
from zoo.units.aligned import align_decoders, recorded_loss
from zoo.units.tables import BLOCK_TABLES, TABLE_ROLES, layer_to_tables, token_table

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
    shape: Metadata
    blocks: dict[str, Tensor]  # tables, each with a first axis of L
    tokens: Tensor  # [V, 2, d]
    rows: Tensor  # int64 [V]: the field's row of each token

    @property
    def name(self) -> str:
        return self.donor.name

    @property
    def loss(self) -> float | None:
        """The held-out loss that is recorded for it, in nats per token."""
        return recorded_loss(self.donor.facts)

    @property
    def corpus(self) -> str:
        """The name of the text that it was trained on, "" where it is not known."""
        return corpus_name(self.donor.facts)

    @property
    def is_final(self) -> bool:
        """Whether it is the last checkpoint of its run, as far as its facts say."""
        facts = self.donor.facts
        return facts.get("step") is None or facts.get("step") == facts.get("steps")


def read_training_donors(zoo: Zoo, quiet: bool) -> tuple[list[TrainingDonor], tuple[str, ...]]:
    """The donors whose whole function is in tables, and the token strings that the field's rows stand for.

    The widest donor comes first. All have the head_dim of most weights; others are left out and, unless `quiet`, named
    on stderr. Raises UserError if the zoo has no usable donor."""
    found: list[tuple[TrainingDonor, tuple[str, ...]]] = []
    weights: dict[int, int] = {}
    for aligned in align_decoders(zoo, quiet):
        meta = aligned.decoder.metadata
        tables = [{t: x.float() for t, x in layer_to_tables(layer, meta).items()} for layer in aligned.decoder.layers]
        blocks = {t: torch.stack([table[t] for table in tables]) for t in BLOCK_TABLES}
        tokens = token_table(aligned.decoder).float()
        found.append((TrainingDonor(aligned.donor, meta, blocks, tokens, torch.empty(0)), aligned.tokens))
        weights[meta.head_dim] = weights.get(meta.head_dim, 0) + aligned.donor.parameters
    head_dim = max(weights, key=lambda size: (weights[size], size))
    row: dict[str, int] = {}
    donors = []
    for donor, strings in found:
        if donor.shape.head_dim != head_dim:
            if not quiet:
                sizes = f"has heads of {donor.shape.head_dim}, others of {head_dim}"
                print(f"skipped: {donor.name}: {sizes}", file=sys.stderr)
            continue
        for token in strings:
            row.setdefault(token, len(row))
        donors.append(replace(donor, rows=torch.tensor([row[token] for token in strings])))
    return donors, tuple(row)


def field_sizes(donors: Sequence[TrainingDonor], tokens: int) -> FieldSizes:
    """The sizes of a field for these donors: room for shapes beyond the largest donor, and as many bases as keep its
    numbers below `SHARE` of the donors' weights."""

    def largest(size: str) -> int:
        return int(max(getattr(d.shape, size) for d in donors))

    width = -(-int(GROWTH * largest("width")) // 8) * 8
    rank = round(RANK * width)
    shared = {
        "width": width,
        "neurons": round(GROWTH * largest("ffn") * 1.06),
        "groups": -(-int(100 * GROWTH * largest("kv_heads")) // 100),
        "head_dim": donors[0].shape.head_dim,
        "tokens": tokens,
        "rank": rank,
        "token_bases": min(4, max(1, len({d.corpus for d in donors})), len(donors)) if tokens <= 4096 else 1,
    }
    weights = sum(d.donor.parameters for d in donors)
    bases = MOST_BASES
    while bases > LEAST_BASES and weights >= SMALL_ZOO:
        if field_numbers(FieldSizes(bases=bases, **shared)) <= SHARE * weights:
            break
        bases -= 1
    blocks = sum(d.shape.layers for d in donors)
    return FieldSizes(bases=max(1, min(bases, blocks)), **shared)


def count_numbers(donor: TrainingDonor) -> int:
    """The numbers in the tables of a donor."""
    return donor.tokens.numel() + sum(t.numel() for t in donor.blocks.values())


def field_numbers(sizes: FieldSizes) -> int:
    """The numbers that a field stores, without its small network."""
    total = 0
    for table, roles in TABLE_ROLES.items():
        rank = sizes.table_rank(table)
        total += sizes.base_count(table) * sizes.slots(table) * rank + rank * len(roles) * sizes.width
    return total


def base_blocks(donors: Sequence[TrainingDonor], count: int) -> list[dict[str, Tensor]]:
    """The blocks that the bases start from: whole donors, the largest final ones, each text in turn.

    The last donor gives evenly spaced blocks where there is no room for all."""
    blocks: list[dict[str, Tensor]] = []
    for donor in _by_text_in_turn(donors):
        room = min(donor.shape.layers, count - len(blocks))
        if room <= 0:
            break
        places = torch.linspace(0, donor.shape.layers - 1, room).round().long().tolist() if room > 1 else [0]
        blocks += [{t: donor.blocks[t][i] for t in BLOCK_TABLES} for i in places]
    return blocks


def base_vocabularies(donors: Sequence[TrainingDonor], count: int, tokens: int) -> list[Tensor]:
    """Token tables [tokens, 2, d] that the token bases start from; the mean pair stands for a missing token."""
    found = []
    for donor in _by_text_in_turn(donors)[:count]:
        table = donor.tokens.mean(0).expand(tokens, *donor.tokens.shape[1:]).clone()
        table[donor.rows] = donor.tokens
        found.append(table)
    return found


def _by_text_in_turn(donors: Sequence[TrainingDonor]) -> list[TrainingDonor]:
    ranked = sorted(donors, key=lambda d: (not d.is_final, -count_numbers(d), d.loss or 0.0, d.name))
    by_text: dict[str, list[TrainingDonor]] = {}
    for donor in ranked:
        by_text.setdefault(donor.corpus, []).append(donor)
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
