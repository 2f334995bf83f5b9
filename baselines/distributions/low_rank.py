"""Covariances of many variables as low rank plus diagonal, fitted by factor analysis.

Letters: p variables, r rank, m vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zoo.streams import stream

RANK = 256  # factors of a covariance; the part of the variance beyond them is on the diagonal
PROBES = 32  # random vectors that estimate the norm of a sample covariance to a few per cent
MIN_RESIDUAL = 1e-8  # smallest part of a variance that is on the diagonal, so that division works

Products = Callable[[Tensor], tuple[Tensor, Tensor]]  # B [p, k] -> the diagonal [p] of S, and S B [p, k]


@dataclass(frozen=True)
class LowRank:
    """The covariance A Aᵀ with A = S (I + Q (G - I) Qᵀ): S and G diagonal, Q [p, r] with orthonormal columns."""

    scale: Tensor  # [p]: the diagonal of S
    axes: Tensor  # [p, r]: Q
    gains: Tensor  # [r]: the diagonal of G

    @staticmethod
    def of(diagonal: Tensor, loadings: Tensor) -> LowRank:
        """diagonal [p] + loadings loadingsᵀ, loadings [p, r]."""
        scale = diagonal.sqrt()
        white = loadings / scale[:, None]
        squares, vectors = torch.linalg.eigh(white.mT @ white)
        kept = squares > 1e-14 * squares.max()
        axes = white @ (vectors[:, kept] / squares[kept].sqrt())
        return LowRank(scale, axes, (1 + squares[kept]).sqrt())

    def __len__(self) -> int:
        return len(self.scale)

    def to(self, *target: torch.device | torch.dtype | str) -> LowRank:
        """With tensors of another dtype or device."""
        return LowRank(*(t.to(*target) for t in (self.scale, self.axes, self.gains)))  # type: ignore[call-overload]

    def variances(self) -> Tensor:
        """The diagonal [p] of the covariance."""
        return self.scale.square() * (1 + self.axes.square() @ (self.gains.square() - 1))

    def scaled(self, factor: Tensor | float) -> LowRank:
        """The covariance times a factor."""
        return replace(self, scale=self.scale * torch.as_tensor(factor).sqrt())

    def times(self, x: Tensor) -> Tensor:
        """A x, for x [p, m]."""
        return self.scale[:, None] * (x + self.axes @ ((self.gains - 1)[:, None] * (self.axes.mT @ x)))

    def divide(self, x: Tensor) -> Tensor:
        """A⁻¹ x, for x [p, m]."""
        x = x / self.scale[:, None]
        return x + self.axes @ ((1 / self.gains - 1)[:, None] * (self.axes.mT @ x))

    def log_determinant(self) -> Tensor:
        return 2 * (self.scale.log().sum() + self.gains.log().sum())

    def relative_change(self, before: LowRank) -> float:
        """The Frobenius norm of the difference to another covariance, relative to the norm of this one."""
        parts = [(c.scale.square(), c.scale[:, None] * c.axes * (c.gains.square() - 1).sqrt()) for c in (self, before)]

        def product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
            cross = a[0] @ b[1].square().sum(1) + b[0] @ a[1].square().sum(1)
            return a[0] @ b[0] + cross + (a[1].mT @ b[1]).square().sum()

        own, mixed, other = (product(parts[i], parts[j]) for i, j in ((0, 0), (0, 1), (1, 1)))
        return float(((own - 2 * mixed + other).clamp_min(0) / own).sqrt())


class FactorAnalysis:
    """Fits S ≈ D + L Lᵀ, D diagonal and L [p, r], to a sample covariance S of which only products are computed.

    Each step makes one pass over the samples. It takes the loadings of most likelihood in the subspace that the last
    step found (Lawley's equations), then makes one step of the EM algorithm (Rubin and Thayer 1982,
    doi:10.1007/BF02293851), which also moves the subspace as a power iteration does. No step lowers the likelihood.
    The variances of the fit are those of S. In memory are a few matrices [p, r] in float64.
    """

    def __init__(self, size: int, rank: int = RANK, device: torch.device | str = "cpu") -> None:
        def random(count: int) -> Tensor:
            return torch.randn(size, min(size, count), generator=generator, dtype=torch.float64, device="cpu").to(
                device
            )

        generator = stream(0, "factor-analysis")
        self.subspace = random(rank)  # [p, r]: what the loadings are combinations of
        self._probes = torch.linalg.qr(random(size if rank >= size else PROBES)).Q
        self.variances: Tensor | None = None  # the diagonal of S
        self.diagonal = self.loadings = torch.empty(0, device=device)  # D and L
        self.square = 0.0  # the estimated sum of squares of S in units of the spread

    def step(self, products: Products, spread: Callable[[Tensor], Tensor]) -> None:
        """Fits to products of a sample covariance. The first call makes three passes over the samples, others one.

        spread: the variances [p] -> the units [p] of the variables in `square`, the square root of a variance."""
        if self.variances is None:
            self.diagonal = _positive(products(self.subspace[:, :0])[0])
            self.variances = self.diagonal
            self.subspace = products(self._whitened_basis())[1]
        q, before = self._whitened_basis(), spread(self.variances)
        variances, images = products(torch.cat([q, self._probes / before[:, None]], dim=1))
        self.variances = _positive(variances)
        now = spread(self.variances)
        self.subspace, seen = images[:, : q.shape[1]], images[:, q.shape[1] :] / now[:, None]
        # The spread of S is known after the pass only. At the end it differs from the last one by a factor at most.
        scale = float(before.norm() / now.norm())
        self.square = float((scale * seen).square().sum()) * len(seen) / seen.shape[1]
        h = q.mT @ self.subspace
        theta, vectors = torch.linalg.eigh((h + h.mT) / 2)
        theta = theta.clamp_min(1)
        # L = D^(1/2) Q V (θ - 1)^(1/2) has the factors z | y ~ N(β y, 1 / θ), and S βᵀ are the next loadings.
        self.loadings = self.subspace @ (vectors * ((theta - 1).sqrt() / theta))
        residual = self.variances - self.loadings.square().sum(1)
        self.diagonal = torch.maximum(residual, MIN_RESIDUAL * self.variances)

    def shrunk(self, spread: Tensor, amount: float) -> LowRank:
        """(1 - amount) (D + L Lᵀ) + amount times the diagonal matrix of squared spreads [p]."""
        diagonal = (1 - amount) * self.diagonal + max(amount, MIN_RESIDUAL) * spread.square()
        return LowRank.of(diagonal, (1 - amount) ** 0.5 * self.loadings)

    def rescale(self, factor: float) -> None:
        """Multiplies the covariance by a factor, which the next samples then have as well."""
        assert self.variances is not None
        self.diagonal, self.variances = self.diagonal * factor, self.variances * factor
        self.loadings = self.loadings * factor**0.5

    def _whitened_basis(self) -> Tensor:
        """D^(-1/2) Q [p, r], with Q an orthonormal basis of the subspace in units of D^(1/2)."""
        deviations = self.diagonal.sqrt()[:, None]
        return torch.linalg.qr(self.subspace / deviations).Q / deviations


def _positive(variances: Tensor) -> Tensor:
    return variances.clamp_min(MIN_RESIDUAL * float(variances.mean()))
