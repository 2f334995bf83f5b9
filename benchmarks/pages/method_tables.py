"""Tables of the methods: what each does and needs, what it costs and gives; some of them for the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.generator.page import Row as GeneratorRow
from benchmarks.generator.page import all_rows
from benchmarks.head_start import tasks
from benchmarks.head_start.results import (
    BenchmarkResults,
    Entries,
    format_interval,
    paired_difference,
    rank_methods,
)
from benchmarks.pages import cells
from benchmarks.pages.speed_tables import read_convolutions
from headstart import samplers
from headstart.report.scores import REFERENCE

GENERATOR = "diffusion"
README_METHODS = (
    REFERENCE, GENERATOR, "sliced", "row-column", "retrieval", "matrix-normal", "normal"
)  # fmt: skip


def all_methods_table(results: BenchmarkResults) -> str:
    """What each class says of itself."""
    rows = []
    for name, (module, _) in samplers.METHODS.items():
        cls = samplers.get(name)
        rows.append([f"`{name}`", cls.summary, needs_cell(name), cls.reference, f"`{module.replace('.', '/')}.py`"])
    return cells.table(["method", "what it does", "needs", "source", "file"], rows)


def gains_table(results: BenchmarkResults) -> str:
    """Cost and gain of every method on the unseen shapes of A, long budget; conv-covariance on its own task."""
    done = results.comparisons_of("A", "reference", "long")
    if not done:
        return ""
    cost = results.facts.get("cost", {}).get("methods", {})
    methods = {*tasks.language_model_methods(), *tasks.EARLIER_VERSIONS}
    rows = []
    for name in [REFERENCE, *(name for name in rank_methods(done.values()) if name in methods)]:
        label = f"{name}, tuned: loss" if name == REFERENCE else name
        rows.append([label, needs_cell(name), *_cost_cells(cost.get(name, {})), *_gain_cells(name, done)])
    rows.append(_convolution_row(len(done)))
    heads = ["method", "needs", "fit, s", "sample, M parameters/s (of `randn`)", *(c.target for c in done)]
    return cells.table(heads, rows)


def readme_table(results: BenchmarkResults) -> str:
    """The gains of some methods, the generator first."""
    done = results.comparisons_of("A", "reference", "long")
    if not done:
        return ""
    generated = {row.comparison.target: row for row in all_rows(results) if is_same_task(row, done)}
    with_generator = {c.target: _with_generator(e, generated.get(c.target)) for c, e in done.items()}
    rows = [
        [f"{name}: loss" if name == REFERENCE else name, *(_gain_cell(e, name, 2) for e in with_generator.values())]
        for name in README_METHODS
        if name != GENERATOR or generated
    ]
    return cells.table(["method", *with_generator], rows)


def is_same_task(row: GeneratorRow, done: Mapping[tasks.Comparison, Entries]) -> bool:
    """Whether a row of the generator is on the task, text and budget of these comparisons."""
    return any(
        (row.comparison.task, row.comparison.text, row.comparison.budget) == (c.task, c.text, c.budget) for c in done
    )


def _with_generator(entries: Entries, row: GeneratorRow | None) -> Entries:
    """The entries, with the generator's minus the tuned default of these."""
    if row is None:
        return entries
    own = dict(row.own[GENERATOR])
    own["difference"] = paired_difference(own, entries[REFERENCE]) or own["difference"]
    return {**entries, GENERATOR: own}


def _gain_cells(name: str, done: Mapping[tasks.Comparison, Entries]) -> list[str]:
    return [_gain_cell(entries, name) for entries in done.values()]


def _gain_cell(entries: Entries, name: str, digits: int = 3) -> str:
    """For the default its final loss, with `digits` digits; for another method its final loss minus the default's."""
    if name not in entries:
        return cells.MISSING
    stats = entries[name]["final_loss" if name == REFERENCE else "difference"]
    if stats["mean"] is None:
        return "diverged"
    return format_interval(stats, digits=digits) if name == REFERENCE else format_interval(stats, "+", 2)


def _cost_cells(cost: Mapping[str, Any]) -> Sequence[str]:
    """Cells of the time that fitting takes and of the speed of sampling."""
    if "fit_seconds" not in cost:
        return cells.MISSING, cells.MISSING
    rate = f"{cost['parameters_per_second'] / 1e6:.2g} ({cost['of_randn']:.2g})"
    return f"{cost['fit_seconds']:.2f}", rate


def _convolution_row(targets: int) -> list[str]:
    measured = read_convolutions()
    own, untuned, tuned = (
        measured["methods"][key]["mean"] for key in ("conv-covariance", "default, scale 1", "default")
    )
    result = f"on digits: loss {own:.3f}, default {untuned:.3f}, with its scale tuned {tuned:.3f}"
    return [
        "conv-covariance", needs_cell("conv-covariance"), *_cost_cells(measured["cost"]), result, *[""] * (targets - 1)
    ]  # fmt: skip


def needs_cell(name: str) -> str:
    return ", ".join(samplers.get(tasks.method_of_label(name)).needs) or cells.MISSING
