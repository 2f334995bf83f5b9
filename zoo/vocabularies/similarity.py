"""Tokens as combinations of the shared tokens that are most like them: in spelling, or in a trained model's embedding.

OMP (2506.06607) and FOCUS (2305.14481) compare tokens in a space that has both the new tokens and the shared ones. The
papers use the embedding of a model that was trained with the new tokenizer, and fastText vectors of a text. Our choice:
a new model has neither, so that the space is that of fastText's features without training: byte n-grams, hashed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.vocabularies.row_map import RowSums, sums_of_counts

SPELLING_SIZE = 512  # coordinates of the spelling space
NGRAMS = range(1, 6)  # bytes of an n-gram
MAX_ANCHORS = 4096  # shared tokens that combinations are made of, the first ones, which are the most frequent
OMP_TERMS = 8  # anchors of a combination; the paper's 64 are for embeddings of some thousand coordinates
LEAST_CORRELATION = 0.15  # of an anchor with a vector, or with what is left of it: hashes have less by chance
FOCUS_NEIGHBOURS = 64  # anchors among which sparsemax divides the weights
ROWS_AT_ONCE = 4096

Combine = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def spelling_vectors(forms: Sequence[bytes]) -> Tensor:
    """[N, SPELLING_SIZE] float32: unit vectors of normal forms. Forms that share n-grams of bytes are near each other.

    The hashed n-grams of one to five bytes, with an end mark, each with its sign (2305.14481's fastText untrained).
    """
    parts = [
        _hashed_ngrams(forms[start : start + 8 * ROWS_AT_ONCE]) for start in range(0, len(forms), 8 * ROWS_AT_ONCE)
    ]
    return F.normalize(torch.cat(parts or [torch.zeros(0, SPELLING_SIZE)]), dim=1)


def _hashed_ngrams(forms: Sequence[bytes]) -> Tensor:
    """[N, SPELLING_SIZE] float32: the signed counts of the n-grams of each form in the coordinate of its hash."""
    marked = [data + b"\x00" for data in forms]
    flat = torch.frombuffer(bytearray(b"".join(marked)), dtype=torch.uint8).long()
    counts = torch.tensor([len(data) for data in marked])
    owner = torch.arange(len(forms)).repeat_interleave(counts)
    found = torch.zeros(len(forms) * SPELLING_SIZE)
    code = torch.zeros_like(flat)
    for n in NGRAMS:
        if n > len(flat):
            break
        code = code[: len(flat) - n + 1] * 1_000_003 + flat[n - 1 :] + 1  # wraps around, as hashes do
        whole = owner[: len(code)] == owner[n - 1 :]
        mixed = (code[whole] ^ (code[whole] >> 29)) * 0x1B873593 ^ n
        mixed = (mixed ^ (mixed >> 17)) & 0x7FFFFFFF
        place = owner[: len(code)][whole] * SPELLING_SIZE + mixed % SPELLING_SIZE
        found.index_add_(0, place, 1.0 - 2.0 * ((mixed >> 20) & 1).float())
    return found.view(len(forms), SPELLING_SIZE)


def combine_anchors(vectors: Tensor, anchors: Tensor, rows: Tensor, combine: Combine) -> tuple[RowSums, Tensor]:
    """(the sums of the anchors' rows for vectors that are like some anchor, which vectors those are: bool [N]).

    vectors: [N, D] and anchors: [A, D], in one space. rows: [A] int64, the donor's rows of the anchors. combine:
    `matching_pursuit` or `sparse_similarity`.
    """
    rows, anchors = rows[:MAX_ANCHORS], F.normalize(anchors[:MAX_ANCHORS], dim=1)
    found = [combine(part, anchors) for part in F.normalize(vectors, dim=1).split(ROWS_AT_ONCE)]
    columns, weights = (torch.cat([pair[k] for pair in found]) for k in (0, 1))
    used = weights != 0
    counts = used.sum(1)
    return sums_of_counts(counts, rows[columns[used]], weights[used]).select(counts > 0), counts > 0


def matching_pursuit(vectors: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """(columns, weights), [N, OMP_TERMS]: sparse least-squares combinations of unit anchors [A, D] (2506.06607).

    Orthogonal matching pursuit: each step takes the anchor of the largest correlation with what is left of the vector,
    and fits the weights of all anchors taken again. Correlations below LEAST_CORRELATION count as none.
    """
    chosen = torch.empty(len(vectors), 0, dtype=torch.int64)
    used = torch.empty(len(vectors), 0, dtype=torch.bool)
    weights = vectors.new_zeros(len(vectors), 0)
    left = vectors
    for _ in range(min(OMP_TERMS, len(anchors))):
        scores = (left @ anchors.mT).abs()
        scores.scatter_(1, chosen, -1.0)
        best = scores.max(1, keepdim=True)
        chosen, used = torch.cat([chosen, best.indices], 1), torch.cat([used, best.values >= LEAST_CORRELATION], 1)
        basis = anchors[chosen] * used[..., None]  # [N, terms, D]
        gram = basis @ basis.mT + 1e-4 * torch.eye(chosen.shape[1])
        weights = torch.linalg.solve(gram, basis @ vectors[..., None])[..., 0]
        left = vectors - (weights[:, None] @ basis)[:, 0]
    return chosen, weights


def sparse_similarity(vectors: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """(columns, weights), [N, neighbours]: sparsemax of the cosines with the nearest unit anchors [A, D] (2305.14481).

    The weights of a vector are not negative and sum to one. A vector without a cosine of LEAST_CORRELATION gets none.
    """
    cosines, columns = (vectors @ anchors.mT).topk(min(FOCUS_NEIGHBOURS, len(anchors)), dim=1)
    return columns, sparsemax(cosines) * (cosines[:, :1] >= LEAST_CORRELATION)


def sparsemax(scores: Tensor) -> Tensor:
    """[N, K]: the nearest point of the simplex to each row of scores, sorted from high to low (1602.02068)."""
    places = torch.arange(1, scores.shape[1] + 1)
    sums = scores.cumsum(1) - 1
    size = (places * scores > sums).sum(1, keepdim=True)
    return (scores - sums.gather(1, size - 1) / size).clamp_min(0)
