"""Which row of a donor's vocabulary is the same token as each row of a target's."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.vocabularies.tokens import ROLES, Tokens

OTHER_ROLES = {"cls": "bos", "bos": "cls", "sep": "eos", "eos": "sep"}  # where a donor does not have the role itself


def match_rows(donor: Tokens, target: Tokens, n_source: int, n_target: int) -> Tensor:
    """int64 [n_target]: the donor's row of the same token for each row of the target, -1 where there is none.

    Special tokens are matched by their role, then by their string. Other tokens are matched by their string where both
    tokenizers are of one kind, then by their normal form. n_source, n_target: the rows of both embeddings.
    """
    rows: dict[int, int] = {}
    _match_roles(donor, target, rows)
    same_kind = (donor.form.kind, donor.form.mark) == (target.form.kind, target.form.mark)
    for token, row in target.ids.items():
        if row in rows:
            continue
        is_special = row in target.special_ids
        source = donor.ids.get(token) if same_kind or is_special else None
        if source is not None and (not donor.added or (source in donor.special_ids) == is_special):
            rows[row] = source
        elif not is_special and (found := donor.id_of_bytes.get(target.bytes_of_id[row])) is not None:
            rows[row] = found
    index = torch.full((n_target,), -1)
    kept = [(row, source) for row, source in rows.items() if row < n_target and source < n_source]
    if kept:
        places, sources = torch.tensor(kept).unbind(1)
        index[places] = sources
    return index


def _match_roles(donor: Tokens, target: Tokens, rows: dict[int, int]) -> None:
    """Adds to `rows` the target's special tokens of a role that the donor has."""
    for role in ROLES:
        row = target.roles.get(role)
        source = donor.roles.get(role, donor.roles.get(OTHER_ROLES.get(role, "")))
        if row in target.special_ids and source is not None:
            rows.setdefault(row, source)
