"""Eigenvectors, rotations and orders that depend on the matrix alone, not on the machine or the version of LAPACK.

An eigenvector is unique up to its sign, and vectors of equal eigenvalues up to a rotation. LAPACK leaves both to
rounding errors, which differ between processors. Here they follow a rule: signs make the largest entry positive, and
vectors of near-equal eigenvalues are rotated as close as possible to a fixed set of random vectors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.streams import stream

# Our choice: two eigenvalues are near-equal if they differ by less than this share of the larger one, or less than
# ROUNDING of the largest of all. Rounding errors in float64 then turn other eigenvectors by about 1e-6 at most.
NEAR_EQUAL = 1e-8
ROUNDING = 1e-12  # share of the largest value: what rounding errors in float64 can add up to, with a margin
MIN_GRAM_BLOCK = 128  # columns of a block in `add_gram`: smaller products are slower than the work that they save
FLOAT32_SUM = 1 << 20  # values whose norm in float32 has an error of 1e-5
TIED = 1e-6  # relative difference of two entries that are too close to decide a sign


def symmetric_eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [n], descending, and eigenvectors [n, n] in columns of a symmetric matrix [n, n] float64.

    Rounding errors in the matrix change neither the signs nor the basis of near-equal eigenvalues.
    """
    values, vectors = (t.flip(-1) for t in torch.linalg.eigh(matrix))
    vectors = fix_signs(vectors)
    for group in near_equal_groups(values):
        if group.stop - group.start > 1:
            vectors[:, group] = closest_basis(vectors[:, group])
    return values, vectors


def near_equal_groups(values: Tensor, share: float = NEAR_EQUAL) -> list[slice]:
    """The runs of near-equal values in a descending vector [n], as slices that cover it.

    share: the largest difference between neighbours in a run, relative to the larger one."""
    size = values.abs()
    tolerance = share * torch.maximum(size[:-1], size[1:]) + ROUNDING * size.max()
    ends = ((values[:-1] - values[1:]) > tolerance).nonzero().flatten().add(1).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], [*ends, len(values)], strict=True)]


def closest_basis(vectors: Tensor) -> Tensor:
    """Another basis of the space that linearly independent columns [n, k] span: they are turned by an orthogonal matrix
    to be as close as possible to fixed random vectors. Orthonormal columns stay orthonormal.

    The result is the same for every rotation of the columns.
    """
    return vectors @ rotation_to_reference(vectors)


def rotation_to_reference(vectors: Tensor) -> Tensor:
    """The orthogonal matrix [k, k] that turns columns [n, k] as close as possible to fixed random vectors."""
    u, _, vt = torch.linalg.svd(vectors.mT @ reference_vectors(*vectors.shape).to(vectors))
    return u @ vt


def closest_rotation(product: Tensor) -> Tensor:
    """The matrix with orthonormal columns [n, k], k <= n, that is closest to `product` [n, k] (orthogonal Procrustes).

    Where the product has a lower rank, the rest is as close as possible to fixed random vectors.
    """
    u, s, vt = torch.linalg.svd(product, full_matrices=False)
    rank = int((s > NEAR_EQUAL * s.max()).sum())
    found = u[:, :rank] @ vt[:rank]
    if rank < len(s):
        free = reference_vectors(*product.shape).to(product)
        free = free - u[:, :rank] @ (u[:, :rank].mT @ free)
        free = free - (free @ vt[:rank].mT) @ vt[:rank]
        left, _, right = torch.linalg.svd(free, full_matrices=False)
        found = found + left[:, : len(s) - rank] @ right[: len(s) - rank]
    return found


def fix_signs(vectors: Tensor) -> Tensor:
    """Flips columns [n, k] so that the largest entry of each is positive.

    Where entries of both signs tie for the largest, the product with a fixed random vector is positive instead.
    """
    size = vectors.abs()
    largest, place = size.max(0, keepdim=True)
    leader = vectors.gather(0, place)
    has_rival = ((size > (1 - TIED) * largest) & (vectors * leader < 0)).any(0)
    along_reference = (reference_vectors(len(vectors), 1).to(vectors) * vectors).sum(0)
    return vectors * torch.where(torch.where(has_rival, along_reference, leader[0]) < 0, -1.0, 1.0)


def skew_signs(values: Tensor, dim: int, noise: Tensor | float = 0.0) -> Tensor:
    """The sign, 1 or -1, of the third moment of `values` along `dim`, which is removed.

    Where the moment is zero up to rounding errors (values that are symmetric about zero), it is the sign of their
    product with a fixed random vector. noise: the size of the errors of all values, besides rounding. Where values are
    no larger, the sign is 1.
    """
    along_reference = values.movedim(dim, -1) @ reference_vectors(values.shape[dim], 1)[:, 0].to(values)
    squares = values.square()
    rms = squares.mean(dim).sqrt()
    cubes = torch.pow(values, 3, out=squares)  # new memory would take longer than the powers
    moment = cubes.sum(dim)
    uncertain = moment.abs() <= cubes.abs_().sum(dim) * (TIED + noise / rms.clamp_min(1e-300))
    sign = torch.where(torch.where(uncertain, along_reference, moment) < 0, -1.0, 1.0).to(values.dtype)
    return torch.where(rms <= noise, torch.ones_like(sign), sign)


def descending_order(values: Tensor) -> Tensor:
    """The indices that sort `values` [..., n] float64 in descending order. Values that differ by rounding errors only
    keep their order."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    ordered = values.gather(-1, order)
    is_lower = (ordered[..., :-1] - ordered[..., 1:]) > ROUNDING * ordered[..., :-1].abs()
    rank = torch.nn.functional.pad(is_lower.long().cumsum(-1), (1, 0))
    return torch.empty_like(rank).scatter(-1, order, rank).argsort(dim=-1, stable=True)


def reference_vectors(size: int, count: int) -> Tensor:
    """Fixed random vectors [size, count] float64 in columns, normal, the same on every machine."""
    generator = stream(0, "reference-vectors")
    return torch.randn(count, size, generator=generator, dtype=torch.float64, device="cpu").mT


def frobenius_norm(values: Tensor) -> float:
    """The square root of the sum of squares of values of any shape.

    Above FLOAT32_SUM values it is added up in float64, a part at a time: the error of torch's own norm in float32 is
    one in a thousand at 2^24 values, and grows with their number."""
    if values.numel() <= FLOAT32_SUM:
        return float(values.norm())
    return math.sqrt(sum(part.double().square().sum().item() for part in values.flatten().split(FLOAT32_SUM)))


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Adds rowsᵀ rows, of rows [n, d], to the upper triangle of `total` [d, d]. Below it, entries are undefined.

    Blocks of columns save three eighths of the work of a whole product."""
    width = len(total)
    size = max(MIN_GRAM_BLOCK, -(-width // 4))
    for start in range(0, width, size):
        total[start : start + size, start:].addmm_(rows[:, start : start + size].mT, rows[:, start:])
