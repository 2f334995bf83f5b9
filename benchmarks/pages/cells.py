"""Cells of the tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.head_start import tasks
from benchmarks.head_start.results import Facts, format_interval
from headstart.report.comparison_findings import format_step_ratio

MISSING = "–"
BUDGET_NAMES = {budget: f"{steps} steps" for budget, steps in tasks.BUDGETS.items()}


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; "" without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *lines]) if lines else ""


def comparison_name(comparison: tasks.Comparison) -> str:
    """`A heads, reference, 200 steps`"""
    return f"{comparison.task} {comparison.target}, {comparison.text}, {BUDGET_NAMES[comparison.budget]}"


def default_cell(entry: Mapping[str, Any]) -> str:
    """The tuned default: final loss, learning rate, scale, and what scale 1 gives."""
    loss = entry["final_loss"]
    if loss["mean"] is None:
        return "diverged"
    at_scale_one = [end for end in entry["scales"].get("1", {}).values() if end is not None]
    more = f"; {min(at_scale_one):.3f} at scale 1" if at_scale_one else ""
    return f"{format_interval(loss)} ({rate_cell(entry)}, scale {scale_cell(entry)}{more})"


def best_donor_cell(about: Facts) -> str:
    """The lowest loss, without further training, of a donor that has the target's tokens."""
    known = [loss for loss in about["as_they_are"].values() if loss is not None]
    return f"{min(known):.3f}" if known else MISSING


def method_cell(entry: Mapping[str, Any] | None, refused: str | None) -> str:
    """Final loss minus the default's with its interval, and how many times fewer steps to the default's final loss."""
    if entry is None:
        return "refused" if refused else MISSING
    if entry["final_loss"]["mean"] is None:
        return "diverged"
    difference = entry["difference"]
    if difference["mean"] is None:
        return f"{entry['final_loss']['mean']:.3f}; the default diverged"
    return f"{format_interval(difference, '+')}, {speedup_cell(entry)}"


def rate_cell(entry: Mapping[str, Any]) -> str:
    """The learning rate chosen, with a star where it is the smallest or largest that was tried."""
    tried = [float(lr) for lr in entry["lrs"]]
    return f"{entry['lr']:g}" + ("\\*" if entry["lr"] in (min(tried), max(tried)) else "")


def scale_cell(entry: Mapping[str, Any]) -> str:
    """The default's scale, with a star where it is the smallest or largest that was tried."""
    return f"{entry['scale']:g}" + ("\\*" if entry["scale"] in (min(tasks.SCALES), max(tasks.SCALES)) else "")


def speedup_cell(entry: Mapping[str, Any], at: str = "1") -> str:
    """How many times fewer steps to the default's loss at that share of its training."""
    return fewer_cell(entry["thresholds"].get(at))


def fewer_cell(speedup: dict[str, Any] | None) -> str:
    return format_step_ratio(speedup) if speedup else MISSING


def difference_cell(difference: Mapping[str, Any], digits: int = 3) -> str:
    return format_interval(difference, "+", digits) if difference and difference["mean"] is not None else MISSING


def number_cell(value: float | None, spec: str = ".3f") -> str:
    return "not finite" if value is None else f"{value:{spec}}"
