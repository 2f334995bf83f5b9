"""Singular values of weight matrices: all or the largest, compared with noise, and the weight of their tail."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zoo.linear_algebra import add_gram
from zoo.statistics.power_law import MIN_DISTINCT_VALUES, fit_power_law
from zoo.streams import stream

VALUES_PER_CHUNK = 1 << 23  # values that are converted to float64 at a time
DENSE_RATIO = 16  # matrices with a side below this times the rank are decomposed completely, which is as fast
KRYLOV_BLOCK_SIZES = (16, 32)  # the Krylov basis grows by an eighth of the rank, within these bounds
CONVERGENCE_TOLERANCE = 3e-4  # relative change over half a rank of basis vectors; the error is at most twice that
FLOAT32_RANGE = 1e-4  # float32 cannot resolve singular values below this share of the largest
TRACY_WIDOM_QUANTILE = 3.2724  # 99.9 % quantile for real matrices (Johnstone 2001)


def singular_values(matrix: Tensor) -> Tensor:
    """All min(m, n) singular values of a matrix [m, n], descending, float64, on its device.

    Any float dtype. They are square roots of the eigenvalues of the smaller Gram matrix in float64, so values below
    1e-8 of the largest are rounding errors."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    side = tall.shape[1]
    gram = torch.zeros(side, side, dtype=torch.float64, device=matrix.device)
    for rows in tall.split(max(1, VALUES_PER_CHUNK // side)):
        add_gram(gram, rows.double())
    return _singular_values_of_gram(gram)


def top_singular_values(matrix: Tensor, rank: int) -> Tensor:
    """The min(rank, m, n) largest singular values of a matrix [m, n], descending, float64, on its device.

    Any float dtype. The relative error is at most 1e-3, and the result is deterministic.

    Block Lanczos on W^T W in float32, with a random start and full orthogonalisation: a Krylov basis V, as in Musco
    & Musco (1504.05477), that grows until the values have converged from below; then the singular values of W V in
    float64. Small matrices, and those that fall by more than four decades within the rank, are decomposed
    completely. Memory beside the matrix: two float32 copies and at most n / 2 basis vectors."""
    side = min(matrix.shape)
    if rank * DENSE_RATIO > side:
        return singular_values(matrix)[:rank]
    # A product of a row-major matrix with a few columns is twice as fast as with its transpose, so both are stored.
    forward = (matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT).float().contiguous()
    backward = forward.mT.contiguous()
    block = min(max(rank // 8, KRYLOV_BLOCK_SIZES[0]), KRYLOV_BLOCK_SIZES[1])
    most = side // 2 // block * block
    basis, images = forward.new_empty(most, side), forward.new_empty(most, forward.shape[0])
    gram = torch.zeros(most, most, dtype=torch.float64, device=matrix.device)
    grown = torch.randn(side, block, generator=stream(0, "top-singular-values")).to(matrix.device)
    done, checked, settled = 0, 0, None
    for size in range(block, most + 1, block):
        # One pass leaves rounding errors along the basis. If the matrix has no new direction (equal values, low rank),
        # the rest is rounding error, a random direction, and the second pass makes it orthogonal to the basis.
        for _ in range(2):
            grown = torch.linalg.qr(grown - basis[:done].mT @ (basis[:done] @ grown)).Q
        image = forward @ grown
        basis[done:size], images[done:size] = grown.mT, image.mT
        grown = backward @ image
        done = size
        if done < 2 * rank or done - checked < rank / 2:
            continue
        wide = images[:done].double()
        gram[:done, checked:done] = wide @ wide[checked:].mT
        gram[checked:done, :checked] = gram[:checked, checked:done].mT
        checked, last, settled = done, settled, _singular_values_of_gram(gram[:done, :done])[:rank]
        if settled[-1] <= FLOAT32_RANGE * settled[0]:
            break
        if last is not None and bool(((settled - last) <= CONVERGENCE_TOLERANCE * settled).all()):
            return settled
    return singular_values(matrix)[:rank]


def marchenko_pastur(rows: int, columns: int, std: float) -> tuple[float, float]:
    """The interval of the singular values of a large matrix of independent entries: std (sqrt(larger side) -+
    sqrt(smaller side))."""
    small, large = sorted((math.sqrt(rows), math.sqrt(columns)))
    return std * (large - small), std * (large + small)


def tracy_widom_edge(rows: int, columns: int, std: float) -> float:
    """The value that the largest singular value of independent normal entries exceeds in one of a thousand matrices.

    Centre and width are those of Johnstone (2001, Annals of Statistics 29), which hold from ten rows and columns on."""
    small, large = sorted((rows, columns))
    centre = math.sqrt(max(large - 1, 1)) + math.sqrt(small)
    width = centre * (1 / math.sqrt(max(large - 1, 1)) + 1 / math.sqrt(small)) ** (1 / 3)
    return std * math.sqrt(centre**2 + TRACY_WIDOM_QUANTILE * width)


def spectrum_summary(matrix: Tensor, values: Tensor | None = None) -> dict[str, Any]:
    """Statistics of the singular values s of a matrix [m, n], in JSON values. values: all of s, if they are known.

    rank_max        min(m, n)
    norm            Frobenius norm, sqrt(sum s^2)
    top             the largest of s
    stable_rank     (norm / top)^2
    edge            top divided by the upper Marchenko-Pastur edge of noise of the same norm: 1 for such noise
    outliers        how many of s such noise would not reach (Tracy-Widom law, one matrix in a thousand). A few strong
                    directions raise the norm and hide weak ones, so the count is conservative
    alpha, xmin, distance, tail     the power law of the eigenvalues s^2 of W^T W (density ~ s^2 to the -alpha): its
                    exponent, smallest eigenvalue, Kolmogorov-Smirnov distance and number of eigenvalues. This is
                    WeightWatcher's alpha, 2 to 6 in models that it calls well trained (1901.08276)
    alpha_density_of_singular_values    2 alpha - 1, the exponent of the density of s
    alpha_weighted  alpha log10(top^2)

    Zero eigenvalues are not part of the tail. Values are None if they are undefined: for a zero matrix, or for fewer
    than ten distinct nonzero singular values."""
    rows, columns = matrix.shape
    s = (singular_values(matrix) if values is None else values).cpu()
    top, norm = s[0].item(), s.norm().item()
    std = norm / math.sqrt(rows * columns)
    eigenvalues = s.square()
    eigenvalues = eigenvalues[eigenvalues > eigenvalues[0] * max(rows, columns) * torch.finfo(torch.float64).eps]
    law = fit_power_law(eigenvalues.numpy()) if len(eigenvalues.unique()) >= MIN_DISTINCT_VALUES else None
    return {
        "rank_max": len(s),
        "norm": norm,
        "top": top,
        "stable_rank": (norm / top) ** 2 if top else None,
        "edge": top / marchenko_pastur(rows, columns, std)[1] if top else None,
        "outliers": int((s > tracy_widom_edge(rows, columns, std)).sum()),
        "alpha": law.alpha if law else None,
        "xmin": law.xmin if law else None,
        "distance": law.distance if law else None,
        "tail": law.tail if law else None,
        "alpha_density_of_singular_values": 2 * law.alpha - 1 if law else None,
        "alpha_weighted": law.alpha * 2 * math.log10(top) if law else None,
    }


def _singular_values_of_gram(gram: Tensor) -> Tensor:
    """Square roots of the eigenvalues of a Gram matrix, descending. Only its upper triangle is read."""
    return torch.linalg.eigvalsh(gram.mT).flip(0).clamp(min=0).sqrt()
