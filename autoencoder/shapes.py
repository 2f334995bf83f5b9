"""Random shapes around those of a zoo: on these the field is trained, so that it works at shapes that nobody has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from autoencoder.field import FieldSizes
from zoo.streams import stream
from zoo.targets.resizing import has_size
from zoo.tensors import Metadata

QUERY_HEADS = (1, 1, 1, 2, 3, 4)  # per KV head; repeated ones are drawn more often
ATTENTION = (0.5, 2.0)  # heads * head_dim per width
FFN = (1.2, 4.0)  # neurons per width
TIED = 0.2  # share of shapes that tie the head where the family does not, or the reverse
TRIES = 1000


@dataclass(frozen=True)
class ShapeRange:
    """From where random shapes are drawn: the least and the greatest of each size, and which heads are possible."""

    width: tuple[int, int]
    layers: tuple[int, int]
    groups: tuple[int, int]
    neurons: tuple[int, int]
    any_head_dim: bool = True  # else heads * head_dim is the width (GPT-2, Qwen2)
    any_groups: bool = True  # else each query head has keys and values of its own (GPT-2)


def shape_range(
    donors: Sequence[Metadata], sizes: FieldSizes, config: Mapping[str, object] | None = None
) -> ShapeRange:
    """From two thirds of the smallest donor to the largest shape of the field, and to twice the greatest depth.

    config: of one of the donors, which decides which heads are possible; None: any."""

    def least(size: str) -> int:
        return min(getattr(m, size) for m in donors)

    return ShapeRange(
        width=(max(2, 2 * least("width") // 3), sizes.width),
        layers=(max(1, least("layers")), 2 * max(m.layers for m in donors)),
        groups=(max(1, least("kv_heads") // 2), sizes.groups),
        neurons=(max(1, 2 * least("ffn") // 3), sizes.neurons),
        any_head_dim=config is None or has_size(config, "head_dim"),
        any_groups=config is None or has_size(config, "kv_heads"),
    )


def random_shape(base: Metadata, bounds: ShapeRange, seed: int, name: str) -> Metadata:
    """A shape drawn from the random stream (seed, name), log-uniform in each size. Vocabulary, head_dim and
    architecture are those of `base`.

    Sizes are drawn again until attention and MLP have usual sizes for the width; RuntimeError if none has."""
    rng = stream(seed, name)

    def draw(low: int, high: int, step: int = 1) -> int:
        value = math.exp(float(torch.empty(()).uniform_(math.log(low), math.log(high + 1e-6), generator=rng)))
        return min(high, max(low, round(value / step) * step))

    def choose(options: Sequence[float]) -> float:
        return options[int(torch.randint(len(options), (1,), generator=rng))]

    for _ in range(TRIES):
        groups, share = draw(*bounds.groups), int(choose(QUERY_HEADS))
        # transformers refuses a width that the heads do not divide.
        share = share if bounds.any_groups else 1
        width, layers = draw(*bounds.width, step=math.lcm(2, groups * share)), draw(*bounds.layers)
        width = width if bounds.any_head_dim else groups * share * base.head_dim
        neurons, tied = draw(*bounds.neurons), float(torch.rand((), generator=rng)) < TIED
        attention = groups * share * base.head_dim / width
        if not bounds.width[0] <= width <= bounds.width[1] or width % (groups * share):
            continue
        if not (ATTENTION[0] <= attention <= ATTENTION[1] and FFN[0] <= neurons / width <= FFN[1]):
            continue
        shape = replace(
            base, width=width, layers=layers, heads=groups * share, kv_heads=groups, ffn=neurons, tied=base.tied != tied
        )
        if layer_numbers(shape) <= layer_numbers_of_largest(bounds, base):
            return shape
    raise RuntimeError(f"no usual shape lies in {bounds}")


def layer_numbers(shape: Metadata) -> int:
    """How many numbers the blocks of a shape have."""
    attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    return shape.layers * shape.width * (attention + 3 * shape.ffn)


def layer_numbers_of_largest(bounds: ShapeRange, base: Metadata) -> int:
    """The most numbers in the blocks of a random shape: those of the widest at a third of the greatest depth."""
    widest = replace(
        base,
        width=bounds.width[1],
        layers=max(1, bounds.layers[1] // 3),
        heads=bounds.groups[1],
        kv_heads=bounds.groups[1],
        ffn=bounds.neurons[1],
    )
    return layer_numbers(widest)
