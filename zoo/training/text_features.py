"""What a text is like, in a few numbers: frequencies of hashed n-grams of its bytes, projected at random.

Texts of one kind have near features, whatever their length. No model and no tokenizer is needed."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

BUCKETS = 1024
ORDERS = (1, 2)  # lengths of the n-grams; with 3, features of one text lay farther apart
SIZE = 48  # numbers per text
MOST_BYTES = 200_000  # of a text that are read


def text_features(text: bytes) -> Tensor:
    """The features of a text, float32 [SIZE]. An empty text has zeros.

    The square roots of frequencies make the distance of two texts Hellinger's distance of their n-grams, which the
    random projection keeps (Johnson-Lindenstrauss)."""
    data = np.frombuffer(text[:MOST_BYTES], dtype=np.uint8).astype(np.int64)
    parts = []
    for order in ORDERS:
        if len(data) < order:
            return torch.zeros(SIZE)
        codes = np.zeros(len(data) - order + 1, dtype=np.int64)
        for i in range(order):
            codes = codes * 257 + data[i : len(data) - order + 1 + i] + 1
        hashed = (codes * 0x9E3779B1 + order) % 0x7FFFFFFF % BUCKETS
        counts = np.bincount(hashed, minlength=BUCKETS).astype(np.float64)
        parts.append(np.sqrt(counts / counts.sum()))
    stacked = torch.from_numpy(np.concatenate(parts)).float()
    return stacked @ _projection()


@cache
def _projection() -> Tensor:
    rng = torch.Generator().manual_seed(0x7E97)
    return torch.randn(len(ORDERS) * BUCKETS, SIZE, generator=rng) / SIZE**0.5
