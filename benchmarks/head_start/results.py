"""Scores of every method in every complete comparison, from the rows of its runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.head_start import rows as run_rows
from benchmarks.head_start import tasks
from benchmarks.head_start.tasks import Comparison
from headstart.report.scores import REFERENCE, interval, score, speedup, steps_reaching

Rows = Sequence[dict[str, Any]]
Facts = Mapping[str, Any]
Entries = dict[str, dict[str, Any]]  # method: what `headstart compare` reports of it
AUDIT_NAMES = ("cost", "peers", "novelty")


@dataclass(frozen=True)
class BenchmarkResults:
    """Everything that the pages show; every complete comparison is scored once."""

    rows: Rows
    facts: Facts
    entries: Mapping[Comparison, Entries]

    @classmethod
    def from_rows(cls, rows: Rows, facts: Facts) -> BenchmarkResults:
        """Drops audits that were made with other donors or models than those in `facts`."""
        current = {
            name: part for name, part in facts.items() if name not in AUDIT_NAMES or has_current_donors(part, facts)
        }
        return cls(rows, current, {c: score_comparison(rows, c) for c in complete_comparisons(rows, facts)})

    def comparisons_of(self, task: str, text: str, budget: str) -> dict[Comparison, Entries]:
        """The comparisons of all methods on one task, text and budget."""
        return {
            c: e
            for c, e in self.entries.items()
            if (c.task, c.text, c.budget) == (task, text, budget) and not c.methods
        }


def complete_comparisons(rows: Rows, facts: Facts) -> list[Comparison]:
    """The comparisons that have exactly the runs of their last call, made with the current donors."""
    done = facts.get("comparisons", {})
    return [
        c
        for c in tasks.comparisons()
        if c.name in done
        and run_rows.runs_digest(r["file"] for r in run_rows.of_comparison(rows, c)) == done[c.name]["runs"]
        and has_current_donors(done[c.name], facts, c.zoo)
    ]


def has_current_donors(part: Facts, facts: Facts, zoo: str = "embedded") -> bool:
    """Whether a comparison or an audit was made with the donors and models that `facts` describes."""
    return part["made_from"] == facts["made_from"][zoo]


def score_comparison(rows: Rows, comparison: Comparison) -> Entries:
    """{method: what `headstart compare` reports of it}, from the rows."""
    tuning = None if comparison.budget == "ladder" else tasks.SEEDS[: tasks.TUNING_SEEDS]
    runs = [run_rows.to_run(r) for r in run_rows.of_comparison(rows, comparison)]
    runs.sort(key=lambda run: run["method"] != REFERENCE)
    return score(runs, comparison.steps, tuning)[1]


def rank_methods(comparisons: Iterable[Entries]) -> list[str]:
    """Methods with a result in most comparisons first; among these the lowest mean difference to the default first. So
    a method that refuses hard targets does not rank above one that accepts them."""
    comparisons = list(comparisons)
    names = dict.fromkeys([*tasks.row_labels(), *(name for e in comparisons for name in e)])
    differences = {
        name: [
            e[name]["difference"]["mean"]
            for e in comparisons
            if name in e and e[name]["difference"]["mean"] is not None
        ]
        for name in names
        if name != REFERENCE
    }
    return sorted(
        differences, key=lambda name: (-len(differences[name]), fmean(differences[name]) if differences[name] else 0.0)
    )


def paired_difference(entry: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Interval of the difference of final losses, paired by seed. {} where one of the two has no result."""
    if not entry["curves"] or not other["curves"]:
        return {}
    ends = [curve["losses"][-1] for curve in other["curves"]]
    return interval([own["losses"][-1] - end for own, end in zip(entry["curves"], ends, strict=True)])


def paired_speedup(entry: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """{steps, ratio} to the final loss of the other, paired by seed. {} where one of the two has no result."""
    if not entry["curves"] or not other["curves"]:
        return {}
    ends = [curve["losses"][-1] for curve in other["curves"]]
    steps = steps_reaching(entry["curves"], ends)
    return {"steps": steps, "ratio": speedup(steps_reaching(other["curves"], ends), steps)}


def half_width(stats: Mapping[str, Any]) -> float:
    """Half the width of the 95 % interval; 0 without one."""
    return stats["ci95"][1] - stats["mean"] if stats["ci95"] else 0.0


def format_interval(stats: Mapping[str, Any], sign: str = "", digits: int = 3) -> str:
    """`2.435 ± 0.066`; with sign `+`, for a difference, `+0.012 ± 0.186`."""
    return f"{stats['mean']:{sign}.{digits}f} ± {half_width(stats):.{digits}f}"
