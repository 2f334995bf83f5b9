"""What the largest singular values of a matrix cost and how near they come, beside full decompositions.

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


def noise(side: int, seed: int = 0) -> Tensor:
    return torch.randn(side, side, generator=torch.Generator().manual_seed(seed))


def heavy(side: int) -> Tensor:
    """Rows of noise whose scale falls as a power of their number: so do the singular values."""
    return noise(side) * torch.arange(1.0, side + 1)[:, None] ** -0.7


def spiked(side: int) -> Tensor:
    """Noise and a matrix of rank side / 32, about twice as strong in each of its directions."""
    rank = side // 32
    return noise(side) + noise(side, 1)[:, :rank] @ noise(side, 2)[:rank] * 4 / side**0.5


MATRICES: dict[str, Callable[[int], Tensor]] = {
    "iid normal (a flat edge)": noise,
    "heavy-tailed": heavy,
    "low rank and noise": spiked,
}


OTHERS = {"svd": "torch.linalg.svd", "svdvals": "torch.linalg.svdvals", "all": "singular_values"}


def measure(side: int, rank: int) -> list[dict[str, Any]]:
    """[{matrix, seconds: {svd, svdvals, all, top}, error}]: error is the largest relative one of the top values."""
    rows = []
    for name, make in MATRICES.items():
        matrix = make(side)
        expected, whole = seconds(lambda m=matrix: singular_values(m))  # type: ignore[misc]
        found, top = seconds(lambda m=matrix: top_singular_values(m, rank))  # type: ignore[misc]
        _, values = seconds(lambda m=matrix: torch.linalg.svdvals(m))  # type: ignore[misc]
        _, full = seconds(lambda m=matrix: torch.linalg.svd(m, full_matrices=False))  # type: ignore[misc]
        error = ((found - expected[:rank]).abs() / expected[:rank]).max().item()
        took = {"svd": full, "svdvals": values, "all": whole, "top": top}
        rows.append({"matrix": name, "seconds": took, "error": error})
    return rows


def seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and its processor time: what else the machine does counts less than on a clock."""
    start = time.process_time()
    return work(), time.process_time() - start


def table(rows: list[dict[str, Any]]) -> str:
    """Cost of the top values, and how many times as much the others cost."""
    heads = ("matrix", "top, seconds", *(f"`{name}`" for name in OTHERS.values()), "largest relative error")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        took = row["seconds"]
        times = " | ".join(f"{took[other] / took['top']:.1f}×" for other in OTHERS)
        lines.append(f"| {row['matrix']} | {took['top']:.1f} | {times} | {row['error']:.0e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.linalg.svd(noise(64))  # what loads on the first call counts for nobody
    rows = measure(given.side, given.rank)
    print(table(rows))
    if given.json:
        content = {"side": given.side, "rank": given.rank, "torch": torch.__version__, "rows": rows}
        given.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
