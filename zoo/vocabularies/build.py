"""From two vocabularies to the map between their rows, by one of the rules for tokens that a donor does not have."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.vocabularies.matching import match_rows
from zoo.vocabularies.pieces import compose_of_pieces, of_bytes_alone, split_tokens
from zoo.vocabularies.row_map import Coverage, RowMap, RowSums, sums_of_counts
from zoo.vocabularies.similarity import combine_anchors, matching_pursuit, sparse_similarity, spelling_vectors
from zoo.vocabularies.tokens import Tokens
from zoo.vocabulary import rows_by_token

RULES = ("length-weighted", "mean", "omp", "focus", "match", "strings")
DEFAULT_RULE = "mean"  # as good as any after 100 steps (benchmarks/results/vocabulary.md), and the simplest
VOCABULARY_HELP = (
    "tokens that the donor does not have: mean or length-weighted (mean of its pieces), omp or focus (of tokens that"
    " are alike), match or strings (drawn; strings: only equal strings are matched)"
)
MODEL_HELP = "for omp and focus: a trained model with the target's tokenizer, to compare tokens; none: by spelling"


def match_vocabularies(donor: Tokens, target: Tokens, n_source: int, n_target: int, rule: str) -> Tensor:
    """int64 [n_target]: the donor's row that each row of the target copies, -1 for none.

    rule `strings`: equal strings only, as before normal forms were known."""
    if rule == "strings":
        return rows_by_token(donor.ids, target.ids, n_source, n_target)
    return match_rows(donor, target, n_source, n_target)


def build_row_map(
    donor: Tokens, target: Tokens, n_source: int, n_target: int, rule: str = DEFAULT_RULE, vectors: Tensor | None = None
) -> RowMap:
    """The map from the rows of a donor's vocabulary to those of a target's.

    n_source, n_target: the rows of both embeddings, which may have padding. rule: what a token is made of that the
    donor does not have. `mean` and `length-weighted`: of the pieces that the donor's tokenizer splits its text into.
    `omp` and `focus`: of shared tokens that are like it. `match` and `strings`: of nothing; it is drawn. vectors:
    [n_target, D], what says which tokens of the target are alike, such as a trained embedding; None: their spelling.
    """
    index = match_vocabularies(donor, target, n_source, n_target, rule)
    n_tokens = len({row for row in target.ids.values() if row < n_target})
    copied = int((index >= 0).sum())
    missing = [
        (row, data)
        for row, data in sorted(target.bytes_of_id.items())
        if rule not in ("match", "strings") and row < n_target and index[row] < 0 and data
    ]
    rows = torch.tensor([row for row, _ in missing], dtype=torch.int64)
    forms = [data for _, data in missing]
    if rule in ("mean", "length-weighted"):
        counts, pieces = split_tokens(forms, donor, n_source)
        sums, made = compose_of_pieces(forms, counts, pieces, donor, rule == "length-weighted")
    else:
        sums, made = _combine_shared(rows, donor, target, index, rule, vectors)
    from_bytes = int(of_bytes_alone(sums, donor).sum())
    return RowMap(index, rows[made], sums, Coverage(n_tokens, copied, len(sums), from_bytes))


def _combine_shared(
    rows: Tensor, donor: Tokens, target: Tokens, index: Tensor, rule: str, vectors: Tensor | None
) -> tuple[RowSums, Tensor]:
    """(the sums of shared tokens that are like the tokens in these rows, which of the rows have one: bool [N])."""
    texts = target.bytes_of_id
    shared = [(source, row) for row, source in enumerate(index.tolist()) if source >= 0 and texts.get(row)]
    shared = sorted((source, row) for source, row in shared if source not in donor.byte_pieces)
    if not shared or not len(rows):
        return sums_of_counts(*torch.empty(3, 0, dtype=torch.int64)), torch.zeros(len(rows), dtype=torch.bool)
    sources, anchors = torch.tensor(shared).unbind(1)
    if vectors is None:
        new, old = (spelling_vectors([texts[row] for row in group.tolist()]) for group in (rows, anchors))
    else:
        new, old = vectors[rows], vectors[anchors]
    return combine_anchors(new, old, sources, matching_pursuit if rule == "omp" else sparse_similarity)
