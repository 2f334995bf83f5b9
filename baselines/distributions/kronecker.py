"""The matrix normal distribution W = M + A Z Bᵀ: covariance U = A Aᵀ of rows and V = B Bᵀ of columns.

Letters: n samples, p rows, q columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

MAX_FULL_SIDE = 4096  # a longer side has a diagonal covariance: a full one would need more memory than a model
MIN_RELATIVE_VARIANCE = 1e-8  # smallest variance of a coordinate, relative to the mean variance, so that division works

Samples = Callable[[], Iterable[Tensor]]  # each call iterates over the samples [p, q], with the mean removed


def shrink_covariance(covariance: Tensor, n: float, toward: str = "diagonal", amount: float | None = None) -> Tensor:
    """Shrinks the sample covariance of n vectors, [p, p], toward its diagonal or toward a multiple of the identity.

    amount: the weight of the shrinkage target; None for the optimum of normal vectors (oracle approximating shrinkage,
    0907.4698), for the diagonal computed from correlations. A diagonal covariance [p] keeps its values.
    """
    variance = covariance.diagonal() if covariance.ndim == 2 else covariance
    variance = variance.clamp_min(MIN_RELATIVE_VARIANCE * float(variance.mean()))
    if covariance.ndim == 1:
        return variance
    spread = variance.sqrt() if toward == "diagonal" else variance.mean().sqrt().expand_as(variance)
    unit = covariance / spread / spread[:, None]
    p, trace, square = len(unit), float(unit.trace()), float(unit.square().sum())
    if amount is None:
        denominator = (n + 1 - 2 / p) * (square - trace**2 / p)
        amount = 1.0 if denominator <= 0 else min(1.0, ((1 - 2 / p) * square + trace**2) / denominator)
    eye = torch.eye(p, dtype=unit.dtype, device=unit.device)
    return ((1 - amount) * unit + max(amount, MIN_RELATIVE_VARIANCE) * eye) * spread * spread[:, None]


def covariance_factor(covariance: Tensor) -> Tensor:
    """A with A Aᵀ = covariance: [p, p], or the standard deviations [p] of a diagonal one."""
    return torch.linalg.cholesky(covariance) if covariance.ndim == 2 else covariance.sqrt()


def apply_factor(root: Tensor, x: Tensor) -> Tensor:
    """A [p, p] or [p], x [p, m] -> A x."""
    return root @ x if root.ndim == 2 else root[:, None] * x


def apply_inverse_factor(root: Tensor, x: Tensor) -> Tensor:
    """A [p, p] or [p], x [p, m] -> A⁻¹ x."""
    return torch.linalg.solve_triangular(root, x, upper=False) if root.ndim == 2 else x / root[:, None]


def flip_flop(
    samples: Samples,
    counts: Tensor,
    columns: int,
    toward: str = "diagonal",
    amount: float | None = None,
    steps: int = 20,
    tolerance: float = 1e-4,
    diagonal_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """Maximum likelihood (U, V) by alternation: U = Σ x V⁻¹ xᵀ / (n q), V = Σ xᵀ U⁻¹ x / (n p), each shrunk, tr U = p.

    Returns float64 [p, p] and [q, q], or the diagonal of a side longer than MAX_FULL_SIDE. counts [p]: in how many
    samples each row is known (less one where a mean was removed). An unknown row of a sample is zero, and a row with
    count 0 gets the mean variance. diagonal_rows: make U diagonal, which is required where rows are unknown.
    """
    counts = counts.double()
    p, known = len(counts), counts > 0
    n = float(counts.max())
    full_rows, full_columns = p <= MAX_FULL_SIDE and not diagonal_rows, columns <= MAX_FULL_SIDE
    row = torch.ones(p, dtype=torch.float64, device=counts.device)
    column = torch.ones(columns, dtype=torch.float64, device=counts.device)
    for _ in range(steps):
        before = row, column
        root = covariance_factor(column)
        total = _scatter_matrix((x.mT for x in samples()), root, full_rows)
        if full_rows:
            row = shrink_covariance(total / (n * columns), n * columns, toward, amount)
        else:
            row = total / (counts.clamp_min(1) * columns)
            row = torch.where(known, row, row[known].mean())
            row = shrink_covariance(row, n * columns)
        row = row * p / (row.trace() if full_rows else row.sum())
        root = covariance_factor(row)
        total = _scatter_matrix(samples(), root, full_columns)
        column = shrink_covariance(total / counts.sum(), float(counts.sum()), toward, amount)
        moved = [
            float((new - old).norm() / new.norm()) if new.shape == old.shape else 1.0
            for new, old in zip((row, column), before, strict=True)
        ]
        if max(moved) < tolerance:
            break
    return row, column


def rescale_to_unit_rms(row: Tensor, column: Tensor, counts: Tensor) -> Tensor:
    """V, scaled so that draws have a mean square of one in the known rows, like samples divided by their RMS.

    For many normal samples the likelihood already gives that. With few samples, or rows of very different directions
    (frequent tokens and tokens that never occur), it can be wrong by orders of magnitude.
    """
    variances = [c.diagonal() if c.ndim == 2 else c for c in (row, column)]
    weights = counts.double()
    return column / ((weights * variances[0]).sum() / weights.sum() * variances[1].mean())


def _scatter_matrix(samples: Iterable[Tensor], root: Tensor, full: bool) -> Tensor:
    """Σ yᵀ y with y = root⁻¹ x, over samples x [k, m]: [m, m], or its diagonal [m]."""
    total: Tensor | None = None
    for x in samples:
        y = apply_inverse_factor(root, x)
        part = y.mT @ y if full else y.square().sum(0)
        total = part if total is None else total + part
    assert total is not None
    return total


def color_noise(row_root: Tensor, column_root: Tensor, z: Tensor) -> Tensor:
    """A [p, p] or [p], B [q, q] or [q], z [p, q] standard normal -> A z Bᵀ."""
    return apply_factor(column_root, apply_factor(row_root, z).mT).mT
