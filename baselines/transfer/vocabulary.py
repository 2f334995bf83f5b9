"""Which row of a donor's vocabulary each row of a target's vocabulary copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.transfer.sizes import metadata_pair
from zoo.donors.donor import Donor
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.vocabulary import fits_padded, read_vocabulary, rows_by_token


@dataclass(frozen=True)
class VocabularyRows:
    """The donor's row for each row of the target's vocabulary."""

    index: Tensor  # [V] int64, -1 where the donor does not have the token
    same_tokenizer: bool  # also true where no tokenizer is known and both vocabularies have the same size
    padded: bool = False  # whether the target, without a tokenizer, is taken to have the donor's, with padding


def vocabulary_rows(donor: Donor, blueprint: Blueprint, tokenizer: str | None) -> VocabularyRows:
    """Matches the tokens of a target to those of a donor by their strings.

    tokenizer: the target's, a folder or a file of it. Without it rows keep their places: the vocabularies must have
    the same size, or both sizes must be that of the donor's tokenizer with padding. Raises UserError for other sizes,
    and where no token is shared.
    """
    source, target = metadata_pair(donor, blueprint)
    target_tokens = read_vocabulary(tokenizer) if tokenizer is not None else None
    other_size = source.vocab != target.vocab
    donor_tokens = donor.vocabulary() if other_size or target_tokens is not None else None
    if other_size and target_tokens is None and donor_tokens is not None and fits_padded(donor_tokens, target.vocab):
        index = torch.arange(target.vocab)
        index[source.vocab :] = -1
        return VocabularyRows(index, False, padded=True)
    if target_tokens is None or donor_tokens is None:
        if other_size:
            more = "" if donor_tokens else ", and a donor that has a tokenizer"
            raise UserError(
                f"vocab {source.vocab} is not the target's {target.vocab}, and tokens cannot be matched by string:"
                f" give the target's --tokenizer{more}"
            )
        return VocabularyRows(torch.arange(target.vocab), True)
    if target_tokens == donor_tokens:  # the sizes may differ by padding
        index = torch.arange(target.vocab)
        index[source.vocab :] = -1
        return VocabularyRows(index, True)
    index = rows_by_token(donor_tokens, target_tokens, source.vocab, target.vocab)
    if (index < 0).all():
        raise UserError("its tokenizer shares no token with the target's")
    return VocabularyRows(index, False)
