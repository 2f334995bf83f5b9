"""Which row of a donor's vocabulary belongs to each row of a target's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.donors.donor import Donor
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.vocabulary import read_vocabulary, rows_by_token


@dataclass(frozen=True)
class VocabularyRows:
    """What is known of the target's vocabulary rows: the donor's row of each, -1 where it has none."""

    index: Tensor  # [V] int64
    same: bool  # the tokenizers agree (or their sizes do, and nothing more is known)


def vocabulary_rows(donor: Donor, blueprint: Blueprint, tokenizer: str | None) -> VocabularyRows:
    """The donor's row of every row of the target's vocabulary. tokenizer: the target's folder or tokenizer.json, None
    where it is not known: then the sizes must agree. Raises UserError where they do not, or no token is shared."""
    source, target = donor.blueprint.metadata, blueprint.metadata
    assert source is not None and target is not None
    theirs = donor.vocabulary()
    ours = read_vocabulary(tokenizer) if tokenizer is not None else None
    if ours is None or theirs is None:
        if source.vocab != target.vocab:
            raise UserError(
                f"vocab {source.vocab} is not the target's {target.vocab} and the tokens cannot be matched by their"
                f" strings: give the target's --tokenizer{'' if theirs else ', and a donor that has one'}"
            )
        return VocabularyRows(torch.arange(target.vocab), True)
    if ours == theirs:  # sizes may differ by padding
        index = torch.arange(target.vocab)
        index[source.vocab :] = -1
        return VocabularyRows(index, True)
    index = rows_by_token(theirs, ours, source.vocab, target.vocab)
    if (index < 0).all():
        raise UserError("its tokenizer shares no token with the target's")
    return VocabularyRows(index, False)
