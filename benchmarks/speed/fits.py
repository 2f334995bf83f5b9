"""Seconds that each family takes to fit a million values, beside torch.quantile on the same tensor.

python -m benchmarks.speed.fits [--values 1000000] [--repeats 5] [--json FILE]     one thread, the best of the repeats
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from baselines.distributions.auto_fit import AutoFit
from baselines.distributions.empirical import KDE, Histogram
from baselines.distributions.families import FAMILIES

METHODS: dict[str, Callable[[Tensor], object]] = {
    **{name: law.fit for name, law in FAMILIES.items()},
    "histogram": Histogram().fit_values,
    "kde": KDE().fit_values,
    "auto-fit": AutoFit().fit_values,
}


def fastest_seconds(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, after one that is not counted."""
    work()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def measure(n: int, repeats: int) -> list[dict[str, str | float]]:
    """[{method, seconds, ratio}] on n values of a Student-t law of five degrees of freedom."""
    law = {"nu": 5.0, "loc": 0.0, "scale": 0.02, "low": -10.0, "high": 10.0}
    values = FAMILIES["student-t"].sample(law, (n,), torch.Generator().manual_seed(0))
    unit = fastest_seconds(lambda: torch.quantile(values, 0.5), repeats)
    rows: list[dict[str, str | float]] = [{"method": "torch.quantile", "seconds": unit, "ratio": 1.0}]
    for name, fit in METHODS.items():
        fitting = fastest_seconds(lambda fit=fit: fit(values), repeats)  # type: ignore[misc]
        rows.append({"method": name, "seconds": fitting, "ratio": fitting / unit})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=1_000_000, help="at most 16 million, torch.quantile's limit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(given.values, given.repeats)
    print(f"| {given.values:,} values | seconds | times torch.quantile |\n|---|---|---|")
    for row in rows:
        print(f"| {row['method']} | {row['seconds']:.3f} | {row['ratio']:.2f} |")
    if given.json:
        content = {"values": given.values, "repeats": given.repeats, "torch": torch.__version__, "rows": rows}
        given.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
