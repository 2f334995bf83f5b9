"""Singular values of weight matrices: all or the top ones, against iid noise, and how heavy their tail is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zoo.statistics.power_law import MIN_DISTINCT_VALUES, fit_power_law
from zoo.streams import stream

ROWS_PER_CHUNK = 1 << 14  # of a matrix that are float64 at a time
DENSE_RATIO = 16  # times the rank: matrices with a side below that are about as cheap to decompose whole
KRYLOV_BLOCK_SIZES = (16, 32)  # vectors that the Krylov basis grows by: an eighth of the rank, within these
CONVERGENCE_TOLERANCE = 3e-4  # relative change over half a rank of basis vectors; what is left is at most twice as much
FLOAT32_RANGE = 1e-4  # float32 says nothing about singular values below this share of the largest
TRACY_WIDOM_QUANTILE = 3.2724  # the law's 99.9 % point for real matrices (Johnstone 2001)


def singular_values(matrix: Tensor) -> Tensor:
    """matrix [m, n], any float dtype, on any device -> all min(m, n) singular values, descending, float64, on that
    device. They are roots of the eigenvalues of the Gram matrix of the smaller side in float64, so that those below
    1e-8 of the largest are rounding."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=matrix.device)
    for rows in tall.split(ROWS_PER_CHUNK):
        wide = rows.double()
        gram += wide.mT @ wide
    return _singular_values_of_gram(gram)


def top_singular_values(matrix: Tensor, rank: int) -> Tensor:
    """matrix [m, n], any float dtype, on any device -> the min(rank, m, n) largest singular values, descending,
    float64, on that device, to a relative 1e-3 and the same every time.

    Block Lanczos on W^T W in float32, started at random and orthogonalised in full: a Krylov basis V, as in Musco &
    Musco (1504.05477) but grown until the values have settled, and then the singular values of W V in float64. They
    approach from below. Small matrices, and those that fall by more than four decades within the rank, are decomposed
    whole. Beside the matrix two float32 copies and at most n / 2 basis vectors are held."""
    side = min(matrix.shape)
    if rank * DENSE_RATIO > side:
        return singular_values(matrix)[:rank]
    # Products of a row-major matrix with a few columns are twice as fast as with its transpose, so both are kept.
    forth = (matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT).float().contiguous()
    back = forth.mT.contiguous()
    block = min(max(rank // 8, KRYLOV_BLOCK_SIZES[0]), KRYLOV_BLOCK_SIZES[1])
    most = side // 2 // block * block
    basis, images = forth.new_empty(most, side), forth.new_empty(most, forth.shape[0])
    gram = torch.zeros(most, most, dtype=torch.float64, device=matrix.device)
    grown = torch.randn(side, block, generator=stream(0, "top-singular-values")).to(matrix.device)
    done, checked, settled = 0, 0, None
    for size in range(block, most + 1, block):
        # Once leaves what rounding adds to directions that are there already. Where the matrix has nothing new (equal
        # values, low rank) the rounding itself is a random direction, and the second time makes it a good one.
        for _ in range(2):
            grown = torch.linalg.qr(grown - basis[:done].mT @ (basis[:done] @ grown)).Q
        image = forth @ grown
        basis[done:size], images[done:size] = grown.mT, image.mT
        grown = back @ image
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
    """Between which the singular values of a large matrix of iid entries lie: std (sqrt(larger side) -+ sqrt(smaller
    side))."""
    small, large = sorted((math.sqrt(rows), math.sqrt(columns)))
    return std * (large - small), std * (large + small)


def tracy_widom_edge(rows: int, columns: int, std: float) -> float:
    """What the largest singular value of iid normal entries exceeds once in a thousand matrices: centre and width of
    Johnstone (2001, Annals of Statistics 29), which are good from ten rows and columns on."""
    small, large = sorted((rows, columns))
    centre = math.sqrt(max(large - 1, 1)) + math.sqrt(small)
    width = centre * (1 / math.sqrt(max(large - 1, 1)) + 1 / math.sqrt(small)) ** (1 / 3)
    return std * math.sqrt(centre**2 + TRACY_WIDOM_QUANTILE * width)


def spectrum_summary(matrix: Tensor, values: Tensor | None = None) -> dict[str, Any]:
    """What the singular values s of a matrix [m, n] say, in JSON values (`values`: all of them, if they are known):

    rank_max        min(m, n)
    norm            of Frobenius, sqrt(sum s^2)
    top             the largest of s
    stable_rank     (norm / top)^2
    edge            top over the upper Marchenko-Pastur edge of iid noise of the same norm: 1 for such noise
    outliers        how many of s no such noise would reach (Tracy-Widom law, one matrix in a thousand). Few strong
                    directions raise the norm, and so hide weak ones: the count is cautious
    alpha, xmin, distance, tail     the power law of the eigenvalues s^2 of W^T W (density ~ s^2 to the -alpha), with
                    the eigenvalue it starts at, its Kolmogorov-Smirnov distance and how many lie in it. This is the
                    alpha of WeightWatcher (2.0 to 6 in the models that it calls well trained, 1901.08276)
    alpha_density_of_singular_values    2 alpha - 1, the exponent of the density of s
    alpha_weighted  alpha log10(top^2)

    Zero directions are no part of the tail. What a constant zero matrix, or one of fewer than ten distinct nonzero
    singular values, cannot say is None."""
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
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()
