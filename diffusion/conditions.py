"""The condition of a model: the metadata that somebody asks for, as numbers.

Each number is centred and scaled by its mean and deviation over the training samples. One that is constant in a zoo is
left out, so that it has no effect."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.tensors import Metadata
from zoo.training import text_features
from zoo.units.family import FLAGS, family_of

SHAPE_NAMES = ("width", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab", "tied", "rope_theta")
CONSTANT = 1e-4  # deviation below which a number is constant
REACH = 3.0  # deviations beyond which a number is cut, because no donor is there


@dataclass(frozen=True)
class Wanted:
    """What to generate, beside the architecture.

    excess: nats above the lowest held-out loss that the zoo has on the same text; 0 asks for the best."""

    shape: Metadata
    text: Tensor | None = None  # features of a sample, [text_features.SIZE]
    vocabulary: Tensor | None = None  # features of the token strings, [text_features.SIZE]
    excess: float = 0.0


GROUPS = {"shape": len(SHAPE_NAMES), "quality": 1, "text": text_features.SIZE, "vocabulary": text_features.SIZE}
SIZE = sum(GROUPS.values())
FAMILY_GROUPS = {**GROUPS, "family": FLAGS}  # of a zoo of several families


def condition_groups(several_families: bool) -> dict[str, int]:
    """The parts of a condition and their sizes."""
    return FAMILY_GROUPS if several_families else GROUPS


def condition_values(wanted: Wanted, several_families: bool = False) -> Tensor:
    """The numbers of a condition, float32 [SIZE]; NaN for what is not known. several_families: whether the zoo has
    several, so that the flags of the family follow."""
    shape = wanted.shape
    sizes = [
        math.log2(shape.width),
        math.log2(shape.layers),
        math.log2(shape.heads),
        math.log2(shape.kv_heads),
        math.log2(shape.head_dim),
        math.log2(shape.ffn),
        math.log2(shape.vocab),
        float(shape.tied),
        math.log10(shape.rope_theta or 1.0),
    ]
    unknown = torch.full((text_features.SIZE,), float("nan"))
    return torch.cat(
        [
            torch.tensor([*sizes, wanted.excess]),
            unknown if wanted.text is None else wanted.text,
            unknown if wanted.vocabulary is None else wanted.vocabulary,
            torch.tensor(family_of(shape).flags() if several_families else []),
        ]
    )


def vocabulary_features(strings: Iterable[str]) -> Tensor:
    """The features of a vocabulary: those of its token strings as a text."""
    return text_features.text_features("\0".join(sorted(strings)).encode())


def fit_scales(values: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The mean [SIZE] and the inverse deviation [SIZE] of conditions [N, SIZE]; unknown numbers do not count.

    texts: the name of each condition's text. Features of texts and vocabularies are scaled by how far different texts
    lie apart, by one number for all, so that a zoo of one text does not react to another."""
    mean, deviation = _moments(values)
    inverse = torch.where(deviation > CONSTANT, 1 / deviation.clamp_min(CONSTANT), torch.zeros_like(deviation))
    names = sorted(set(texts))
    by_text = torch.stack([_moments(values[[i for i, t in enumerate(texts) if t == name]])[0] for name in names])
    start = 0
    for group, size in condition_groups(values.shape[1] > SIZE).items():
        columns = slice(start, start + size)
        start += size
        if group in ("text", "vocabulary"):
            spread = _moments(by_text[:, columns])[1].square().mean().sqrt()
            inverse[columns] = 1 / spread if spread > CONSTANT else 0.0
    return mean, inverse


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each column of [N, C] over the numbers that are not NaN."""
    known = ~values.isnan()
    count = known.sum(0).clamp_min(1)
    mean = values.nan_to_num().sum(0) / count
    return mean, (((values - mean).nan_to_num().square() * known).sum(0) / count).sqrt()


def scaled(values: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """Conditions [..., SIZE] in units of their deviation; unknown numbers are at the mean.

    The numbers of a text have one scale, so that their distances stay."""
    return ((values - mean) * inverse).nan_to_num().clamp(-REACH, REACH)
