"""Which rows of a donor's vocabulary each row of a target's vocabulary is made of."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from baselines.transfer.sizes import metadata_pair
from zoo.checkpoints.side_files import vocabulary_file
from zoo.donors.donor import Donor
from zoo.donors.folder import FolderDonor, StandaloneDonor
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.vocabularies.build import DEFAULT_RULE, build_row_map, match_vocabularies
from zoo.vocabularies.row_map import RowMap
from zoo.vocabularies.tokens import Tokens, read_tokens
from zoo.vocabulary import fits_padded, rows_by_token

log = logging.getLogger(__name__)

LEAST_SHARE = 0.5  # of a target's tokens that a donor should serve; below it a warning says so


@dataclass(frozen=True)
class VocabularyRows:
    """The donor's rows for each row of the target's vocabulary."""

    index: Tensor  # [V] int64: the row that is copied, -1 for none
    same_tokenizer: bool  # also true where no tokenizer is known and both vocabularies have the same size
    padded: bool = False  # whether the target, without a tokenizer, is taken to have the donor's, with padding
    row_map: RowMap | None = None  # where the tokenizers differ: the whole map, with the composed rows

    @property
    def is_drawn(self) -> Tensor:
        """[V] bool: the rows that are neither copied nor composed."""
        return self.index < 0 if self.row_map is None else self.row_map.is_drawn

    def apply(self, table: Tensor, drawn: Tensor) -> Tensor:
        """[V, …]: the target's table from the donor's; `drawn` [V, …] gives the rows without a counterpart."""
        if self.row_map is not None:
            return self.row_map.apply(table, drawn)
        known = (self.index >= 0).to(table.device).view(-1, *[1] * (table.ndim - 1))
        return torch.where(known, table[self.index.clamp_min(0).to(table.device)], drawn)

    def record(self, rule: str) -> dict[str, Any]:
        """How the target's tokens are served, for `headstart.json`; empty in the donor's own vocabulary."""
        return {} if self.row_map is None else {"rule": rule, **self.row_map.coverage.record()}


def vocabulary_rows(
    donor: Donor, blueprint: Blueprint, tokenizer: str | None, rule: str = DEFAULT_RULE
) -> VocabularyRows:
    """The rows of a donor's vocabulary that a target copies; `composed_rows` adds those of the other tokens.

    tokenizer: the target's, a folder or a file of it. Without it rows keep their places: the vocabularies must have
    the same size, or both sizes must be that of the donor's tokenizer with padding. rule: one of RULES. Raises
    UserError for other sizes, and where no token is shared.
    """
    source, target = metadata_pair(donor, blueprint)
    target_tokens = read_tokens(tokenizer, blueprint.config) if tokenizer is not None else None
    other_size = source.vocab != target.vocab
    donor_tokens = read_donor_tokens(donor) if other_size or target_tokens is not None else None
    if other_size and target_tokens is None and donor_tokens and fits_padded(donor_tokens.ids, target.vocab):
        return VocabularyRows(_same_rows(source.vocab, target.vocab), False, padded=True)
    if target_tokens is None or donor_tokens is None:
        if other_size:
            more = "" if donor_tokens else ", and a donor that has a tokenizer"
            raise UserError(
                f"vocab {source.vocab} is not the target's {target.vocab}, and tokens cannot be matched by string:"
                f" give the target's --tokenizer{more}"
            )
        return VocabularyRows(torch.arange(target.vocab), True)
    if target_tokens.ids == donor_tokens.ids:  # the sizes may differ by padding
        return VocabularyRows(_same_rows(source.vocab, target.vocab), True)
    index = match_vocabularies(donor_tokens, target_tokens, source.vocab, target.vocab, rule)
    if (index < 0).all():
        raise UserError("its tokenizer shares no token with the target's")
    return VocabularyRows(index, False)


def composed_rows(
    donor: Donor, blueprint: Blueprint, tokenizer: str | None, rule: str = DEFAULT_RULE, model: str | None = None
) -> VocabularyRows:
    """`vocabulary_rows` with the map of all rows where the tokenizers differ (`zoo.vocabularies`). It takes seconds.

    model: a trained model (folder or hub id) with the target's tokenizer, whose embedding `omp` and `focus` compare
    tokens by. Raises UserError also where that has no embedding of these tokens.
    """
    rows = vocabulary_rows(donor, blueprint, tokenizer, rule)
    if rows.same_tokenizer or rows.padded or tokenizer is None or (donor_tokens := read_donor_tokens(donor)) is None:
        return rows
    source, target = metadata_pair(donor, blueprint)
    tokens = read_tokens(tokenizer, blueprint.config)
    vectors = None if model is None else token_vectors(model, tokens, target.vocab)
    return replace(rows, row_map=build_row_map(donor_tokens, tokens, source.vocab, target.vocab, rule, vectors))


def token_vectors(model: str, tokens: Tokens, n_target: int) -> Tensor:
    """[n_target, D] float32: the embedding of a trained model for each token of a target, zero for unknown ones.

    UserError where the model has no embedding, no tokenizer, or none of the tokens.
    """
    donor = StandaloneDonor.open(model, quiet=True)
    own = read_donor_tokens(donor)
    tables = [spec for spec, part in donor.blueprint.find("embed") if part.axes == ("vocab", "residual")]
    if own is None or not tables:
        raise UserError(f"{model}: has no {'tokenizer' if own is None else 'embedding'}; give a whole language model")
    table = donor.read(tables[0].name, torch.float32)
    index = rows_by_token(own.ids, tokens.ids, len(table), n_target)
    if (index < 0).all():
        raise UserError(f"{model}: its tokenizer shares no token with the target's; give a model with that tokenizer")
    return table[index.clamp_min(0)] * (index >= 0)[:, None]


def read_donor_tokens(donor: Donor) -> Tokens | None:
    """The tokens of a donor, None where it has no tokenizer."""
    if isinstance(donor, FolderDonor):
        return None if vocabulary_file(donor.files) is None else read_tokens(donor.folder, donor.config)
    ids = donor.vocabulary()
    return None if ids is None else Tokens.of_strings(ids)


def log_vocabulary(rows: VocabularyRows, method: str, rule: str) -> None:
    """Says how many rows are copied, composed and drawn. A warning where less than half of the tokens are known."""
    n_rows, n_drawn = len(rows.index), int(rows.is_drawn.sum())
    if rows.padded:
        log.info("%s: the target has no tokenizer: it is taken to have the donor's, with rows of padding", method)
    if rows.row_map is None or not rows.row_map.coverage.composed:
        if n_drawn or not rows.same_tokenizer:
            shared = f"{n_rows - n_drawn} of {n_rows} tokens are in the donor's vocabulary"
            log.info("%s: %s; the other %d rows are drawn like the donor's", method, shared, n_drawn)
    else:
        found = rows.row_map.coverage
        log.info(
            "%s: %d of %d tokens are in the donor's vocabulary, %d are composed of its tokens (%s), %d rows are drawn"
            " like the donor's", method, found.copied, found.tokens, found.composed, rule, n_drawn,
        )  # fmt: skip
    if rows.row_map is not None and (share := rows.row_map.coverage.share) < LEAST_SHARE:
        drawn = rule in ("match", "strings")
        advice = "leave out the option vocabulary" if drawn else "choose a donor of the same language and script"
        log.warning("%s: the donor's vocabulary serves only %.0f%% of the tokens; %s", method, 100 * share, advice)


def _same_rows(n_source: int, n_target: int) -> Tensor:
    """Each row in its place, -1 past the donor's last one."""
    index = torch.arange(n_target)
    index[n_source:] = -1
    return index
