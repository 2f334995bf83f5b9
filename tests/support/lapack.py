"""LAPACK as it may be on another machine: other signs, and another basis of near-equal values."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from torch import Tensor

Eigh = namedtuple("Eigh", "eigenvalues eigenvectors")
Svd = namedtuple("Svd", "U S Vh")


def use_other_lapack(monkeypatch: Any, seed: int = 0, share: float = 1e-9) -> list[int]:
    """Patches torch.linalg.eigh and svd: their vectors get random signs, and those of values that are equal to `share`
    of the largest are rotated at random. Returns a list of the sizes of such groups, which grows with each call."""
    generator = torch.Generator().manual_seed(seed)
    real_eigh, real_svd, sizes = torch.linalg.eigh, torch.linalg.svd, []

    def random_rotation(n: int) -> Tensor:
        """[n, n] orthogonal; a random sign for n = 1."""
        q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
        return q * r.diagonal().sign()

    def free_rotation(values: Tensor) -> Tensor:
        """[n, n], orthogonal, which mixes only vectors of near-equal values [n]."""
        limit, groups, start = share * float(values.abs().max()), [], 0
        for end in range(1, len(values) + 1):
            if end == len(values) or abs(float(values[end] - values[end - 1])) > limit:
                groups.append(random_rotation(end - start))
                sizes.append(end - start)
                start = end
        return torch.block_diag(*groups)

    def eigh(matrix: Tensor) -> Eigh:
        values, vectors = real_eigh(matrix)
        return Eigh(values, vectors @ free_rotation(values).to(vectors))

    def svd(matrix: Tensor, full_matrices: bool = True) -> Svd:
        if matrix.ndim > 2:
            return Svd(*map(torch.stack, zip(*(svd(m, full_matrices) for m in matrix), strict=True)))
        u, s, vt = (t.clone() for t in real_svd(matrix, full_matrices=full_matrices))
        turn, rank = free_rotation(s).to(u), int((s > share * s.max()).sum())
        u[:, : len(s)], vt[: len(s)] = u[:, : len(s)] @ turn, turn.mT @ vt[: len(s)]
        u[:, rank:] = u[:, rank:] @ random_rotation(u.shape[1] - rank).to(u)
        vt[rank:] = random_rotation(len(vt) - rank).to(u) @ vt[rank:]
        return Svd(u, s, vt)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    monkeypatch.setattr(torch.linalg, "svd", svd)
    return sizes
