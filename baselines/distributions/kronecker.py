"""The matrix normal distribution W = M + A Z Bᵀ: covariance U = A Aᵀ of rows and V = B Bᵀ of columns.

A covariance is a matrix, a diagonal (a vector), or low rank plus diagonal (`LowRank`).

Letters: n samples, p rows, q columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.distributions.low_rank import RANK, FactorAnalysis, LowRank
from zoo.linear_algebra import add_gram

MAX_FULL_SIDE = 4096  # a longer side has a covariance of low rank plus diagonal: a full one takes minutes and gigabytes
MIN_RELATIVE_VARIANCE = 1e-8  # smallest variance of a coordinate, relative to the mean variance, so that division works
CHUNK = 4096  # rows of a sample that are multiplied at a time

Samples = Callable[[], Iterable[Tensor]]  # each call iterates over the samples [p, q], with the mean removed
Covariance = Tensor | LowRank


@dataclass(frozen=True)
class FitRules:
    """How covariances are fitted."""

    toward: str = "diagonal"  # what they are shrunk to: diagonal or identity
    amount: float | None = None  # the weight of that; None: estimated
    steps: int = 20  # at most
    tolerance: float = 1e-4  # relative change of both covariances in a step at which the fit ends
    max_full_side: int = MAX_FULL_SIDE
    rank: int = RANK  # of the covariance of a longer side


def shrink_covariance(covariance: Tensor, n: float, toward: str = "diagonal", amount: float | None = None) -> Tensor:
    """Shrinks the sample covariance of n vectors, [p, p], toward its diagonal or toward a multiple of the identity.

    amount: the weight of the shrinkage target; None for the optimum of normal vectors (oracle approximating shrinkage,
    0907.4698), for the diagonal computed from correlations. A diagonal covariance [p] keeps its values.
    """
    variance = covariance.diagonal() if covariance.ndim == 2 else covariance
    variance = variance.clamp_min(MIN_RELATIVE_VARIANCE * float(variance.mean()))
    if covariance.ndim == 1:
        return variance
    spread = _spread(variance, toward)
    unit = covariance / spread / spread[:, None]
    p = len(unit)
    if amount is None:
        amount = estimated_amount(p, n, float(unit.trace()), float(unit.square().sum()))
    eye = torch.eye(p, dtype=unit.dtype, device=unit.device)
    return ((1 - amount) * unit + max(amount, MIN_RELATIVE_VARIANCE) * eye) * spread * spread[:, None]


def _spread(variance: Tensor, toward: str) -> Tensor:
    """The divisors [p] of coordinates in whose units a covariance is shrunk to the identity."""
    return variance.sqrt() if toward == "diagonal" else variance.mean().sqrt().expand_as(variance)


def estimated_amount(p: int, n: float, trace: float, square: float) -> float:
    """The optimal shrinkage of a sample covariance [p, p] of n vectors to the identity (0907.4698).

    trace: of the covariance; square: the sum of squares of its entries."""
    denominator = (n + 1 - 2 / p) * (square - trace**2 / p)
    return 1.0 if denominator <= 0 else min(1.0, ((1 - 2 / p) * square + trace**2) / denominator)


def covariance_factor(covariance: Covariance) -> Covariance:
    """A with A Aᵀ = covariance: [p, p], the standard deviations [p] of a diagonal one, or a LowRank."""
    if isinstance(covariance, LowRank):
        return covariance
    return torch.linalg.cholesky(covariance) if covariance.ndim == 2 else covariance.sqrt()


def apply_factor(root: Covariance, x: Tensor) -> Tensor:
    """A [p, p] or [p] or LowRank, x [p, m] -> A x."""
    if isinstance(root, LowRank):
        return root.times(x)
    return root @ x if root.ndim == 2 else root[:, None] * x


def apply_inverse_factor(root: Covariance, x: Tensor) -> Tensor:
    """A [p, p] or [p] or LowRank, x [p, m] -> A⁻¹ x."""
    if isinstance(root, LowRank):
        return root.divide(x)
    return torch.linalg.solve_triangular(root, x, upper=False) if root.ndim == 2 else x / root[:, None]


def variances(covariance: Covariance) -> Tensor:
    """The variances [p] of a covariance."""
    if isinstance(covariance, LowRank):
        return covariance.variances()
    return covariance.diagonal() if covariance.ndim == 2 else covariance


def flip_flop(
    samples: Samples, counts: Tensor, columns: int, rules: FitRules | None = None, diagonal_rows: bool = False
) -> tuple[Covariance, Covariance]:
    """Maximum likelihood (U, V) by alternation: U = Σ x V⁻¹ xᵀ / (n q), V = Σ xᵀ U⁻¹ x / (n p), each shrunk, tr U = p.

    Returns float64 [p, p] and [q, q]. A side longer than `rules.max_full_side` has low rank plus diagonal: there, each
    step of the alternation is one of `FactorAnalysis`. Products are computed in the dtype of the samples.

    counts [p]: in how many samples each row is known (less one where a mean was removed). An unknown row of a sample is
    zero, and a row with count 0 gets the mean variance. diagonal_rows: make U diagonal, a vector [p], which is required
    where rows are unknown.
    """
    rules = rules or FitRules()
    counts = counts.double()
    p = len(counts)
    row_side = _Side(p, float(counts.max()) * columns, rules, counts, diagonal_rows)
    column_side = _Side(columns, float(counts.sum()), rules, counts)
    row: Covariance = torch.ones(p, dtype=torch.float64, device=counts.device)
    column: Covariance = torch.ones(columns, dtype=torch.float64, device=counts.device)
    for _ in range(rules.steps):
        before = row, column
        row = row_side.fit(lambda: (x.mT for x in samples()), covariance_factor(column))
        row = row_side.with_mean_variance_one(row)
        column = column_side.fit(samples, covariance_factor(row))
        moved = [_relative_change(new, old) for new, old in zip((row, column), before, strict=True)]
        if max(moved) < rules.tolerance:
            break
    return row, column


class _Side:
    """The fit of one of the two covariances, given the other."""

    def __init__(self, size: int, n: float, rules: FitRules, counts: Tensor, diagonal: bool = False) -> None:
        """n: the number of vectors."""
        self.size, self.n, self.rules, self.counts, self.diagonal = size, n, rules, counts, diagonal
        self.factors: FactorAnalysis | None = None
        if size > rules.max_full_side and not diagonal:
            self.factors = FactorAnalysis(size, rules.rank, counts.device)

    def fit(self, samples: Samples, root: Covariance) -> Covariance:
        """The covariance of the rows of y = root⁻¹ x, for samples x [k, size]."""
        rules = self.rules
        if self.factors is not None:
            return self._fit_factors(self.factors, samples, root)
        total = _scatter_matrix(samples(), root, full=not self.diagonal)
        if not self.diagonal:
            return shrink_covariance(total / self.n, self.n, rules.toward, rules.amount)
        known = self.counts > 0
        row = total / (self.counts.clamp_min(1) * round(self.n / float(self.counts.max())))
        return shrink_covariance(torch.where(known, row, row[known].mean()), self.n)

    def _fit_factors(self, factors: FactorAnalysis, samples: Samples, root: Covariance) -> LowRank:
        def products(b: Tensor) -> tuple[Tensor, Tensor]:
            diagonal, images = torch.zeros(len(b), dtype=b.dtype, device=b.device), torch.zeros_like(b)
            for y in _whitened(samples(), root):
                diagonal += y.square().sum(0)
                images += y.mT @ (y @ b.to(y.dtype))
            return diagonal / self.n, images / self.n

        factors.step(products, lambda variance: _spread(variance, self.rules.toward))
        assert factors.variances is not None
        spread = _spread(factors.variances, self.rules.toward)
        amount = self.rules.amount
        if amount is None:
            amount = estimated_amount(self.size, self.n, float(self.size), factors.square)
        return factors.shrunk(spread, amount)

    def with_mean_variance_one(self, covariance: Covariance) -> Covariance:
        if isinstance(covariance, LowRank):
            assert self.factors is not None
            factor = self.size / float(covariance.variances().sum())
            self.factors.rescale(factor)
            return covariance.scaled(factor)
        return covariance * self.size / (covariance.trace() if covariance.ndim == 2 else covariance.sum())


def _relative_change(new: Covariance, old: Covariance) -> float:
    if isinstance(new, LowRank):
        return new.relative_change(old) if isinstance(old, LowRank) else 1.0
    return float((new - old).norm() / new.norm()) if isinstance(old, Tensor) and new.shape == old.shape else 1.0


def rescale_to_unit_rms(row: Covariance, column: Covariance, counts: Tensor) -> Covariance:
    """V, scaled so that draws have a mean square of one in the known rows, like samples divided by their RMS.

    For many normal samples the likelihood already gives that. With few samples, or rows of very different directions
    (frequent tokens and tokens that never occur), it can be wrong by orders of magnitude.
    """
    weights = counts.double()
    mean_square = (weights * variances(row)).sum() / weights.sum() * variances(column).mean()
    return column.scaled(1 / mean_square) if isinstance(column, LowRank) else column / mean_square


def _whitened(samples: Iterable[Tensor], root: Covariance) -> Iterator[Tensor]:
    """y = root⁻¹ x of samples x [k, m]; a diagonal root needs only CHUNK rows at a time."""
    for x in samples:
        used = root.to(x.dtype)
        if isinstance(used, Tensor) and used.ndim == 1:
            for rows, deviations in zip(x.split(CHUNK), used.split(CHUNK), strict=True):
                yield apply_inverse_factor(deviations, rows)
        else:
            yield apply_inverse_factor(used, x)


def _scatter_matrix(samples: Iterable[Tensor], root: Covariance, full: bool) -> Tensor:
    """Σ yᵀ y with y = root⁻¹ x, over samples x [k, m]: float64 [m, m], or its diagonal [m]."""
    total: Tensor | None = None
    for part in _scatter_parts(samples, root, full):
        total = part if total is None else total + part
    assert total is not None
    return total


def _scatter_parts(samples: Iterable[Tensor], root: Covariance, full: bool) -> Iterator[Tensor]:
    if not full:
        for x in samples:
            used = root.to(x.dtype)
            parts = [apply_inverse_factor(used, columns).square().sum(0) for columns in x.split(CHUNK, 1)]
            yield torch.cat(parts).double()
        return
    for y in _whitened(samples, root):
        if y.dtype == torch.float64:
            yield y.mT @ y
        else:
            part = y.new_zeros(y.shape[1], y.shape[1])
            add_gram(part, y)
            yield (part.triu() + part.triu(1).mT).double()


def color_noise(row_root: Covariance, column_root: Covariance, z: Tensor) -> Tensor:
    """A [p, p] or [p], B [q, q] or [q], or a LowRank, z [p, q] standard normal -> A z Bᵀ."""
    return apply_factor(column_root, apply_factor(row_root, z).mT).mT
