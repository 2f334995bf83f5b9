"""Tables of how methods train: cost, largest stable learning rate, gradients, activations; and the page of details."""

from __future__ import annotations

import math
import re
from statistics import fmean
from typing import Any

from benchmarks.head_start import rows as run_rows
from benchmarks.head_start import tasks
from benchmarks.head_start.results import (
    BenchmarkResults,
    Entries,
    Rows,
    format_interval,
    paired_speedup,
    rank_methods,
)
from benchmarks.pages import cells
from headstart.report.scores import REFERENCE

STABLE_WITHIN = (0.1, 0.25)  # nats above the loss at a method's best rate, up to which a rate counts as stable


def stability_table(results: BenchmarkResults) -> str:
    """The cost of an initialisation, and how training from it goes: on the main target of A, long budget."""
    done = {c.budget: c for c in results.entries if (c.task, c.target) == ("A", tasks.MAIN_TARGET)}
    if "long" not in done:
        return ""
    long, costs = results.entries[done["long"]], results.facts.get("cost", {}).get("methods", {})
    ladder = run_rows.of_comparison(results.rows, done["ladder"]) if "ladder" in done else []
    rows = []
    for name in [REFERENCE, *rank_methods([long])]:
        cost = costs.get(name, {})
        spent = [f"{cost[key]:{spec}}" if key in cost else cells.MISSING for key, spec in _COST_FORMATS.items()]
        if name in long and long[name]["lr"] is not None:
            stable = "; ".join(largest_stable_lr([r for r in ladder if r["method"] == name], w) for w in STABLE_WITHIN)
            rows.append([name, *spent, *_training_cells(long[name], stable)])
        elif "target" in cost:
            rows.append([f"{name}, on {cost['target']}", *spent, *[cells.MISSING] * 8])
    heads = [
        "method", "seconds", "MiB", "donors", "their training, FLOPs", "step 0", "learning rate",
        f"largest stable rate within {'; '.join(f'{within:g}' for within in STABLE_WITHIN)}", "gradient spikes",
        "largest gradient", "activation RMS, first block to last but one: start, end",
    ]  # fmt: skip
    return cells.table(heads, rows)


_COST_FORMATS = {"cpu_seconds": ".1f", "mib": ".0f"}


def _training_cells(entry: dict[str, Any], stable: str) -> list[str]:
    flops = "unknown" if entry["donor_cost"] is None else f"{entry['donor_cost']:.2g}" if entry["donor_cost"] else "0"
    return [
        str(len(entry["donors"])), flops, f"{entry['step0_loss']:.2f}", cells.rate_cell(entry), stable,
        f"{entry['grad_spikes']:.1f}", f"{entry['max_grad_norm']:.1f}", _activation_growth(entry),
    ]  # fmt: skip


def _activation_growth(entry: dict[str, Any]) -> str:
    """transformers returns the last state behind the final norm, so the last block reported is the one before."""
    rms = entry["activation_rms"]
    return ", ".join(f"{rms[when][1]:.2g} to {rms[when][-2]:.2g}" for when in ("start", "end"))


def largest_stable_lr(runs: Rows, within: float) -> str:
    """From a method's runs at many learning rates: the largest rate up to which every seed ends finite and at most
    `within` nats above what the method's best rate gives that seed. For the default: at the scale of the lowest mean
    loss."""
    if not runs:
        return cells.MISSING
    finals: dict[float, dict[float, dict[int, float]]] = {}
    for r in runs:
        ends = finals.setdefault(r["scale"], {}).setdefault(r["lr"], {})
        ends[r["seed"]] = math.inf if r["diverged"] is not None else r["losses"][-1]
    means = {(scale, lr): fmean(ends.values()) for scale, by_lr in finals.items() for lr, ends in by_lr.items()}
    scale, best = min(means, key=lambda key: means[key])
    if not math.isfinite(means[scale, best]):
        return "none"
    lowest, largest = finals[scale][best], best
    for lr in sorted(lr for lr in finals[scale] if lr > best):
        if any(loss > lowest[seed] + within for seed, loss in finals[scale][lr].items()):
            break
        largest = lr
    return f"{largest:g}" + (" or more" if largest == max(tasks.LRS["ladder"]) else "")


def details_page(results: BenchmarkResults) -> str:
    """Per comparison: learning rates, three thresholds, gradients, activations, and why methods refused."""
    parts = [
        "# The comparisons one by one",
        "",
        "Written by `python -m benchmarks.head_start --details`. A star marks the smallest or largest value tried.",
    ]
    for c, e in results.entries.items():
        if c.budget == "ladder":
            continue
        refused = results.facts["comparisons"][c.name]["refused"]
        parts += ["", f"## {c.task} {c.target}, {c.text}, {c.budget}: {c.steps} steps", "", _details_table(e)]
        parts += ["", *(f"- {name} refused: {_without_folders(why)}" for name, why in refused.items())]
    return "\n".join(parts) + "\n"


def _details_table(entries: Entries) -> str:
    levels = next((m["thresholds"] for m in entries.values() if m["thresholds"]), {})
    heads = [
        "method", "lr", "step 0", "final loss",
        *(f"times fewer steps to {level['loss']:.3f} (default's at {float(at):.0%})" for at, level in levels.items()),
        f"times fewer steps to the final loss of {tasks.RETRIEVAL}", "spikes", "largest gradient", "diverged",
        "activation RMS by layer at the start", "at the end",
    ]  # fmt: skip
    rows = []
    for name in [REFERENCE, *rank_methods([entries])]:
        if name not in entries:
            continue
        m = entries[name]
        if not m["curves"]:
            nothing = [cells.MISSING] * (len(levels) + 3)
            rows.append([name, "–", "–", "diverged", *nothing, str(len(m["diverged"])), "–", "–"])
            continue
        rms, faster = m["activation_rms"], paired_speedup(m, entries.get(tasks.RETRIEVAL, {"curves": []}))
        rows.append(
            [
                name, cells.rate_cell(m), f"{m['step0_loss']:.2f}", format_interval(m["final_loss"]),
                *(cells.speedup_cell(m, at) for at in levels), cells.fewer_cell(faster),
                f"{m['grad_spikes']:.1f}", f"{m['max_grad_norm']:.1f}", str(len(m["diverged"])),
                *(" ".join(f"{x:.2g}" for x in rms[when]) for when in ("start", "end")),
            ]
        )  # fmt: skip
    return cells.table(heads, rows)


def _without_folders(text: str) -> str:
    """Without the folders of the machine that made the runs."""
    return re.sub(r"(?<![\w.])/[^\s:,;]*/", "", text)
