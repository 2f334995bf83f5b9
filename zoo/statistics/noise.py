"""Tests whether the entries of a matrix are in random places, whatever their distribution; and the kurtosis, which
depends on the distribution only."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from zoo.statistics.spectra import marchenko_pastur, top_singular_values


def unevenness_p_value(matrix: Tensor) -> float:
    """p-value of the rows' shares of large entries (above the median of |w|) of a matrix [m, n], if places are random.

    Chi-square of m counts. The distribution of the entries does not matter."""
    return unevenness_p_values(matrix)[0]


def unevenness_p_values(matrix: Tensor) -> tuple[float, float]:
    """`unevenness_p_value` of the rows and of the columns."""
    sizes = matrix.abs()
    large = sizes.gt_(_lower_median(sizes))  # 0 or 1 in the matrix's dtype, whose sums are exact below 2^24
    rows, columns = large.sum(1).double(), large.sum(0).double()
    share = rows.sum().item() / large.numel()
    if not 0 < share < 1:
        return 1.0, 1.0
    return _p_value(rows, len(columns), share), _p_value(columns, len(rows), share)


def _lower_median(values: Tensor) -> float:
    """The median, of an even number of values the lower one of the two in the middle."""
    if values.device.type != "cpu":
        return values.median().item()
    middle = (values.numel() - 1) // 2
    return np.partition(values.numpy().ravel(), middle)[middle].item()  # several times as fast as torch's


def _p_value(counts: Tensor, n: int, share: float) -> float:
    """p-value of how many of the n entries of each row are large, if each is with probability `share`."""
    statistic = ((counts - n * share) ** 2).sum().item() / (n * share * (1 - share))
    half = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


def edge_excess(matrix: Tensor) -> float:
    """How far the largest squared singular value lies above the Marchenko-Pastur edge of standard normal entries.

    In units of Tracy-Widom's law, which has mean -1.2 and standard deviation 1.3."""
    m, n = matrix.shape
    edge = marchenko_pastur(m, n, 1.0)[1]
    unit = edge * (m**-0.5 + n**-0.5) ** (1 / 3)
    return (top_singular_values(matrix, 1).item() ** 2 - edge**2) / unit


def normal_scores(matrix: Tensor) -> Tensor:
    """Replaces every value by the normal quantile of its rank, float64; equal values get the same score.

    Entries in random places become standard normal noise, however heavy their tails were."""
    values = matrix.flatten()
    ordered = values.sort().values
    rank = (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)).double() / 2
    scores = torch.special.ndtri((rank + 0.5) / (len(values) + 1)).view_as(matrix)
    return scores / scores.std(correction=0)


def kurtosis(matrix: Tensor) -> float:
    """Kurtosis of all entries: 3 for a normal distribution."""
    square = (matrix - matrix.mean()).square_()
    variance = square.mean()
    return (square.square_().mean() / variance**2).item()
