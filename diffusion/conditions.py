"""The condition of a unit: the target's metadata and the unit's address, as features in about [-2, 2].

Letters: N units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.tensors import Metadata

FREQUENCIES = (1.0, 2.0, 4.0)  # Fourier features of relative positions, in half-turns over the range
PERIODS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 512.0)  # Fourier features of the rank, which separate neighbours
SHAPE_FEATURES = 8  # of a model; two more describe its quality
MODEL_FEATURES = SHAPE_FEATURES + 2
FEATURES = MODEL_FEATURES + 3 * (1 + 2 * len(FREQUENCIES)) + 3 + 2 * len(PERIODS)

Address = tuple[Tensor, Tensor, Tensor]  # (layer, head, slot), int64 [N] each, -1 where it does not apply
MODEL_ADDRESS: Address = (torch.tensor([-1]), torch.tensor([-1]), torch.tensor([-1]))  # stands for a whole model


def model_features(metadata: Metadata, loss: float | None) -> Tensor:
    """The shape of a model on a log scale, and its quality: float32 [MODEL_FEATURES].

    loss: held-out loss in nats, None if unknown."""
    sizes = (
        math.log2(metadata.width) - 7,
        math.log2(metadata.layers) - 2,
        math.log2(metadata.heads) - 2,
        math.log2(metadata.kv_heads) - 2,
        math.log2(metadata.head_dim) - 4,
        math.log2(metadata.ffn / metadata.width) - 1.4,
        math.log2(metadata.vocab) - 8,
        math.log10(metadata.rope_theta or 1.0) - 4,
    )
    quality = (0.0, 0.0) if loss is None else (2 * (loss - 1.5), 1.0)
    return torch.tensor([*sizes, *quality], dtype=torch.float32)


def _relative_position(index: Tensor, size: int) -> Tensor:
    """index / (size - 1) and its Fourier features, [N] -> [N, 1 + 2 len(FREQUENCIES)]; zeros if the index is -1."""
    value = index.clamp_min(0) / max(size - 1, 1)
    waves = [f(math.pi * w * value) for w in FREQUENCIES for f in (torch.sin, torch.cos)]
    return torch.stack([2 * value - 1, *waves], dim=1) * (index >= 0)[:, None]


def unit_features(kind: str, address: Address, metadata: Metadata, loss: float | None) -> Tensor:
    """The features of units of a kind at addresses (layer, head, slot): float32 [N, FEATURES]."""
    layer, head, slot = address
    sizes = {"neuron": metadata.ffn, "qk": metadata.head_dim // 2, "vo": metadata.head_dim}
    rank = slot if kind in sizes else torch.full_like(slot, -1)  # a token has no rank
    angle = 2 * math.pi * slot[:, None] / torch.tensor(PERIODS) + 0.5
    exact_rank = torch.cat([angle.sin(), angle.cos()], dim=1) * (rank >= 0)[:, None]
    absolute = torch.stack(
        [
            torch.log2(1.0 + rank.clamp_min(0)) / 4 - 1,
            torch.log2(1.0 + head.clamp_min(0)) / 2 - 1,
            torch.log2(1.0 + layer.clamp_min(0)) / 2 - 1,
        ],
        dim=1,
    )
    return torch.cat(
        [
            model_features(metadata, loss).expand(len(slot), -1),
            _relative_position(layer, metadata.layers),
            _relative_position(head, metadata.heads),
            _relative_position(rank, sizes.get(kind, 1)),
            absolute,
            exact_rank,
        ],
        dim=1,
    ).float()


def layer_and_head_of_features(features: Tensor) -> tuple[Tensor, Tensor]:
    """Reads layer and head back from the features of units: int64 [N] each, 0 where a unit has none."""
    start = MODEL_FEATURES + 3 * (1 + 2 * len(FREQUENCIES))
    head, layer = (2.0 ** (2 * (features[:, start + i].double() + 1)) - 1 for i in (1, 2))
    return layer.round().long(), head.round().long()


def query_heads_per_group(features: Tensor) -> int:
    """Query heads per KV head of the donor whose units have these `features` [N, FEATURES]."""
    return round(float(2.0 ** (features[0, 2] - features[0, 3]).double()))


def model_condition(metadata: Metadata, loss: float | None) -> Tensor:
    """The features of a whole model, for its context: [FEATURES]."""
    return unit_features("vocab", MODEL_ADDRESS, metadata, loss)[0]
