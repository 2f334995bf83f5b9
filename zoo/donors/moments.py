"""The range and the moments of the values of a tensor that comes in parts.

They do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 15  # values that are summed together: torch sums so few in one thread
BLOCKS = 8  # are converted to float64 at a time, 2 MB
PATTERNS = 1 << 16  # bit patterns of a 16-bit float


@dataclass(frozen=True)
class Moments:
    """Computed in float64. None where one is undefined; NaN or infinite where a value is."""

    mean: float | None = None
    std: float | None = None  # with divisor n
    kurtosis: float | None = None  # 3 for a normal distribution
    low: float | None = None  # the least value
    high: float | None = None

    @property
    def are_finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return all(end is None or math.isfinite(end) for end in (self.low, self.high))


class TwoPassMoments:
    """The moments of values that come twice: all parts for the mean, then all again for the central moments."""

    passes = 2

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[float] = []
        self.squares: list[float] = []
        self.fourths: list[float] = []
        self.low, self.high = math.inf, -math.inf

    def add(self, values: Tensor) -> None:
        """Takes a part, flat. In the first pass its size is a multiple of BLOCK, unless it is the last."""
        low, high = _range(values)
        if math.isnan(low):
            self.low = self.high = math.nan  # min and max keep it, as their first argument
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.count += values.numel()
        for block in _blocks(values):
            self.sums += block.sum(1).tolist()

    def add_again(self, values: Tensor) -> None:
        mean = _total(self.sums) / self.count
        for block in _blocks(values):
            square = block.sub_(mean).square_()
            self.squares += square.sum(1).tolist()
            self.fourths += square.square_().sum(1).tolist()

    def result(self) -> Moments:
        if not self.count:
            return Moments()
        mean, variance, fourth = (_total(sums) / self.count for sums in (self.sums, self.squares, self.fourths))
        return _moments(mean, variance, fourth, self.low, self.high)


class CountMoments:
    """The moments of 16-bit floats from how often each bit pattern occurs, in one pass."""

    passes = 1

    def __init__(self, dtype: torch.dtype, scratch: np.ndarray) -> None:
        """scratch: from `scratch_memory`, which is used by one tensor after the other."""
        self.dtype, self.scratch = dtype, scratch
        self.counts = np.zeros(PATTERNS, np.int64)

    def add(self, values: Tensor) -> None:
        """Takes a part, flat."""
        for part in values.view(torch.uint16).split(len(self.scratch)):
            patterns = self.scratch[: part.numel()]
            np.copyto(patterns, part.numpy())
            self.counts += np.bincount(patterns, minlength=PATTERNS)

    def add_again(self, values: Tensor) -> None:
        raise AssertionError("one pass is enough")

    def result(self) -> Moments:
        (found,) = np.nonzero(self.counts)
        if not len(found):
            return Moments()
        values = torch.from_numpy(found.astype(np.uint16)).view(self.dtype).double()
        counts = torch.from_numpy(self.counts[found]).double()
        count = int(self.counts.sum())

        def expected(of_values: Tensor) -> float:
            return _total([total for block in _blocks(counts * of_values) for total in block.sum(1).tolist()]) / count

        mean = expected(values)
        squares = (values - mean).square()
        return _moments(mean, expected(squares), expected(squares.square()), *_range(values))


def _moments(mean: float, variance: float, fourth: float, low: float, high: float) -> Moments:
    # Only float64 holds values beyond 1e77, whose fourth power overflows; their kurtosis is undefined.
    kurtosis = fourth / variance**2 if 0 < variance < 1e150 and math.isfinite(fourth) else None
    return Moments(mean, math.sqrt(variance), kurtosis, low, high)


def moments_for(dtype: torch.dtype, count: int, scratch: np.ndarray) -> TwoPassMoments | CountMoments:
    """The faster way for `count` values of a dtype on disk."""
    is_short = dtype in (torch.bfloat16, torch.float16)
    return CountMoments(dtype, scratch) if is_short and count >= PATTERNS else TwoPassMoments()


def scratch_memory() -> np.ndarray:
    """Memory in which bit patterns are widened before they are counted, 2 MB."""
    return np.empty(BLOCKS * BLOCK, np.int64)


def _total(sums: list[float]) -> float:
    """The sum of numbers, rounded once, whatever their order; infinite or NaN where they are too large."""
    try:
        return math.fsum(sums)
    except (OverflowError, ValueError):
        return sum(sums)


def _range(values: Tensor) -> tuple[float, float]:
    """The least and the greatest value; NaN for both where one is NaN."""
    # torch has no aminmax for float8 and for unsigned integers.
    is_native = values.dtype.itemsize > 1 and values.dtype.is_floating_point
    low, high = torch.aminmax(values if is_native else values.double())
    return low.item(), high.item()


def _blocks(values: Tensor) -> Iterator[Tensor]:
    """The values in float64, [blocks, BLOCK] for at most BLOCKS at a time, and those after the last block [1, values].

    The memory is used again for the next ones.
    """
    buffer = torch.empty(min(BLOCKS * BLOCK, values.numel()), dtype=torch.float64)
    whole = values.numel() // BLOCK * BLOCK
    for part in (*values[:whole].split(BLOCKS * BLOCK), values[whole:]):
        if part.numel():
            yield buffer[: part.numel()].copy_(part).view(-1, min(BLOCK, part.numel()))
