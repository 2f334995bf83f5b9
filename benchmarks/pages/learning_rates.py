"""The learning rates that trained best in the benchmark, as the table that `headstart generate` quotes."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from typing import Any

from benchmarks.generator.tasks import GENERATORS
from benchmarks.head_start import tasks
from benchmarks.head_start.results import BenchmarkResults, Rows
from benchmarks.paths import ROOT
from headstart import samplers
from headstart.generate.next_step import TABLE
from zoo.training.loop import TrainingConfig

BUDGET = "long"  # the comparisons of most steps
WHERE = "benchmarks/results/tables.md"
PATH = ROOT / TABLE


def learning_rates_table(results: BenchmarkResults, generators: Rows = ()) -> str:
    """The table as JSON text. For each method and each family: the median, over targets, of the rate with the lowest
    final loss on the first seed, beside the lowest and the highest of them. generators: rows of the generator's
    benchmark, which has runs of its own."""
    best = _best_rates([*results.rows, *(row for row in generators if row["method"] in GENERATORS)])
    families: dict[str, list[float]] = defaultdict(list)
    family = {method["name"]: method["family"] for method in samplers.described_methods()}
    for label, rates in best.items():
        families[family[tasks.method_of_label(label)]] += rates
    entries = [c for c in results.entries if c.budget == BUDGET]
    sizes = [results.facts["comparisons"][c.name]["parameters"] for c in entries]
    content = {
        "where": WHERE,
        "steps": tasks.BUDGETS[BUDGET],
        "batch": f"{tasks.BATCH_SIZE} x {tasks.SEQUENCE} tokens",
        "parameters": [min(sizes), max(sizes)],
        "warmup": TrainingConfig.warmup,
        "methods": {method: _summary(rates) for method, rates in sorted(best.items()) if method in family},
        "families": {name: _summary(rates) for name, rates in sorted(families.items())},
    }
    return json.dumps(content, indent=2) + "\n"


def _best_rates(rows: Rows) -> dict[str, list[float]]:
    """Method, without options -> the best rate for each target and text."""
    runs: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        plain = row["budget"] == BUDGET and row["scale"] == 1.0 and row["seed"] == 0 and row["diverged"] is None
        if plain and ":" not in row["method"]:
            runs[row["method"], row["task"], row["target"], row["text"]].append(row)
    best: dict[str, list[float]] = defaultdict(list)
    for (method, *_), found in runs.items():
        best[method].append(min(found, key=lambda row: row["losses"][-1])["lr"])
    return best


def _summary(rates: list[float]) -> dict[str, Any]:
    return {"rate": statistics.median_low(rates), "lowest": min(rates), "highest": max(rates), "targets": len(rates)}
