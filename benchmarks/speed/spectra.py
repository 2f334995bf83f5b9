"""Cost and error of the largest singular values of a matrix, beside full decompositions.

python -m benchmarks.speed.spectra [--side 4096] [--rank 256] [--json FILE]     one thread, its processor time
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import paths
from zoo.statistics.spectra import singular_values, top_singular_values

RESULTS = paths.RESULTS / "spectra.json"


def iid_normal(side: int, seed: int = 0) -> Tensor:
    return torch.randn(side, side, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(side: int) -> Tensor:
    """Rows of noise whose scale falls as a power of the row's number, as the singular values then do."""
    return iid_normal(side) * torch.arange(1.0, side + 1)[:, None] ** -0.7


def low_rank_plus_noise(side: int) -> Tensor:
    """Noise and a matrix of rank side / 32, about twice as strong in each of its directions."""
    rank = side // 32
    return iid_normal(side) + iid_normal(side, 1)[:, :rank] @ iid_normal(side, 2)[:rank] * 4 / side**0.5


MATRICES: dict[str, Callable[[int], Tensor]] = {
    "iid normal (a flat edge)": iid_normal,
    "heavy-tailed": heavy_tailed,
    "low rank and noise": low_rank_plus_noise,
}


RIVALS = {"svd": "torch.linalg.svd", "svdvals": "torch.linalg.svdvals", "all": "singular_values"}


def measure(side: int, rank: int) -> list[dict[str, Any]]:
    """[{matrix, seconds: {svd, svdvals, all, top}, error}]: error is the largest relative one of the top values."""
    rows = []
    for name, make in MATRICES.items():
        matrix = make(side)
        expected, whole = timed(lambda m=matrix: singular_values(m))  # type: ignore[misc]
        found, top = timed(lambda m=matrix: top_singular_values(m, rank))  # type: ignore[misc]
        _, values = timed(lambda m=matrix: torch.linalg.svdvals(m))  # type: ignore[misc]
        _, full = timed(lambda m=matrix: torch.linalg.svd(m, full_matrices=False))  # type: ignore[misc]
        error = ((found - expected[:rank]).abs() / expected[:rank]).max().item()
        took = {"svd": full, "svdvals": values, "all": whole, "top": top}
        rows.append({"matrix": name, "seconds": took, "error": error})
    return rows


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of `work` and its processor time, which other processes change less than the clock."""
    start = time.process_time()
    return work(), time.process_time() - start


def table(rows: list[dict[str, Any]]) -> str:
    """Cost of the top values, and of the others as a multiple of it."""
    heads = ("matrix", "top, seconds", *(f"`{name}`" for name in RIVALS.values()), "largest relative error")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        took = row["seconds"]
        times = " | ".join(f"{took[other] / took['top']:.1f}×" for other in RIVALS)
        lines.append(f"| {row['matrix']} | {took['top']:.1f} | {times} | {row['error']:.0e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.linalg.svd(iid_normal(64))  # loads what the first call loads
    rows = measure(given.side, given.rank)
    print(table(rows))
    if given.json:
        content = {"side": given.side, "rank": given.rank, "torch": torch.__version__, "rows": rows}
        given.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
