"""The pieces of a donor's vocabulary that make up a token: as its tokenizer splits the token's text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zoo.vocabularies.row_map import RowSums, sums_of_counts
from zoo.vocabularies.tokens import Tokens
from zoo.vocabulary import encode_strings

LEAST_COVERED = 0.5  # of a token's bytes that its pieces must have; our choice


def split_tokens(forms: Sequence[bytes], donor: Tokens, n_source: int) -> tuple[Tensor, Tensor]:
    """(the number of pieces of each normal form, all pieces as rows of the donor), int64: [N] and [sum of the numbers].

    The donor's tokenizer splits what is text. Bytes that are not (a part of a character), and all forms where only the
    strings of the donor's tokens are known, are split into the longest tokens from the left. Pieces that the donor does
    not know are left out. n_source: the rows of the donor's embedding.
    """
    found: list[list[int]] = [[] for _ in forms]
    as_text: list[tuple[int, str]] = []
    longest = max(map(len, donor.id_of_bytes), default=0)
    for i, data in enumerate(forms):
        text = _decode(data) if donor.path is not None else None
        if text is None:
            found[i] = longest_pieces(data, donor.id_of_bytes, longest)
        else:
            as_text.append((i, text))
    for inside in (False, True):
        group = [pair for pair in as_text if _is_inside_word(pair[1], donor) == inside]
        if group:
            assert donor.path is not None
            mark = donor.form.mark if inside else ""
            counts, ids = encode_strings([mark + text for _, text in group], donor.path, word_inside=inside)
            pieces = ids.tolist()
            end = 0
            for (i, _), count in zip(group, counts.tolist(), strict=True):
                found[i] = pieces[end : end + count]
                end += count
    known = {i for i, data in donor.bytes_of_id.items() if data and i < n_source and i != donor.roles.get("unk")}
    kept = [[piece for piece in pieces if piece in known] for pieces in found]
    numbers = torch.tensor([len(pieces) for pieces in kept], dtype=torch.int64)
    return numbers, torch.tensor([piece for pieces in kept for piece in pieces], dtype=torch.int64)


def longest_pieces(data: bytes, id_of_bytes: dict[bytes, int], longest: int) -> list[int]:
    """The ids of the longest tokens from the left whose bytes make up `data`; bytes of no token are left out.

    longest: the number of bytes of the longest token.
    """
    found, start = [], 0
    while start < len(data):
        for end in range(min(len(data), start + longest), start, -1):
            if (piece := id_of_bytes.get(data[start:end])) is not None:
                found.append(piece)
                start = end
                break
        else:
            start += 1
    return found


def compose_of_pieces(
    forms: Sequence[bytes], counts: Tensor, pieces: Tensor, donor: Tokens, by_length: bool
) -> tuple[RowSums, Tensor]:
    """(the sums of pieces for the normal forms that have enough of them, which of the forms those are: bool [N]).

    A sum is the mean of the pieces' rows, or their mean weighted by their numbers of bytes. Forms of which the pieces
    have less than half of the bytes are left out.
    """
    lengths = _values(pieces, {i: len(data) for i, data in donor.bytes_of_id.items()})
    owner = torch.arange(len(forms)).repeat_interleave(counts)
    covered = torch.zeros(len(forms), dtype=torch.float64).index_add(0, owner, lengths)
    enough = covered >= LEAST_COVERED * torch.tensor([max(1, len(data)) for data in forms])
    weights = lengths / covered[owner] if by_length else 1 / counts.double()[owner]
    return sums_of_counts(counts, pieces, weights).select(enough), enough


def of_bytes_alone(sums: RowSums, donor: Tokens) -> Tensor:
    """bool [N]: the sums all of whose pieces are single bytes without a meaning of their own."""
    single = _values(sums.columns, dict.fromkeys(donor.byte_pieces, 1))
    owner = torch.arange(len(sums)).repeat_interleave(sums.offsets.diff())
    n_single = torch.zeros(len(sums), dtype=torch.float64).index_add(0, owner, single)
    return n_single == sums.offsets.diff()


def _values(ids: Tensor, value_of_id: dict[int, int]) -> Tensor:
    """float64: the value of each id, 0 for an id without one."""
    table = torch.zeros(max(map(int, (*value_of_id, *_last(ids))), default=0) + 1, dtype=torch.float64)
    if value_of_id:
        table[torch.tensor(list(value_of_id))] = torch.tensor(list(value_of_id.values()), dtype=torch.float64)
    return table[ids]


def _last(ids: Tensor) -> Iterable[int]:
    return (int(ids.max()),) if len(ids) else ()


def _is_inside_word(text: str, donor: Tokens) -> bool:
    """Whether a text continues a word for a WordPiece donor, which marks the inside of words and not their start."""
    return donor.form.kind == "wordpiece" and text[:1].isalnum()


def _decode(data: bytes) -> str | None:
    """The text of UTF-8 bytes, None where they are not."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
