"""The condition of a peer's chunks: the metadata of a model, as features in about [-2, 2]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.tensors import Metadata

PERIODS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 512.0)  # Fourier features of a number, which separate neighbours
MODEL_FEATURES = 10  # eight for the shape of a model, two for its quality


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
