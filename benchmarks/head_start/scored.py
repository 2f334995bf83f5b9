"""From rows to what a comparison says of every method; only comparisons all of whose runs are there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.head_start import rows as store
from benchmarks.head_start import tasks
from benchmarks.head_start.tasks import Comparison
from headstart.compare.scores import REFERENCE, crossings, interval, score, speedup

Rows = Sequence[dict[str, Any]]
Facts = Mapping[str, Any]
Entries = dict[str, dict[str, Any]]
AUDITS = ("cost", "peers", "novelty")


@dataclass(frozen=True)
class Found:
    """All that the page is made of; every comparison is scored once."""

    rows: Rows
    facts: Facts
    entries: Mapping[Comparison, Entries]

    @classmethod
    def of(cls, rows: Rows, facts: Facts) -> Found:
        kept = {name: part for name, part in facts.items() if name not in AUDITS or of_the_same(part, facts)}
        return cls(rows, kept, {c: entries(rows, c) for c in complete(rows, facts)})


def complete(rows: Rows, facts: Facts) -> list[Comparison]:
    """The comparisons all of whose runs are there, those that their last call was made of and no others, of
    the same donors."""
    done = facts.get("comparisons", {})
    return [
        c
        for c in tasks.comparisons()
        if c.name in done
        and store.digest(r["file"] for r in store.of(rows, c)) == done[c.name]["runs"]
        and of_the_same(done[c.name], facts, c.zoo)
    ]


def of_the_same(part: Facts, facts: Facts, zoo: str = "embedded") -> bool:
    """Whether a comparison or an audit was made of the donors and the models that the page tells of."""
    return part["made_from"] == facts["made_from"][zoo]


def entries(rows: Rows, comparison: Comparison) -> Entries:
    """{method: what `headstart compare` says of it}, from the rows."""
    tuning = None if comparison.budget == "ladder" else tasks.SEEDS[: tasks.TUNING]
    runs = [store.run_of(r) for r in store.of(rows, comparison)]
    runs.sort(key=lambda run: run["method"] != REFERENCE)
    return score(runs, comparison.steps, tuning)[1]


def ranked(found: Iterable[Entries]) -> list[str]:
    """Methods: those with a result everywhere first, the one whose losses are lowest beside the default's at the top;
    one that leaves hard targets out is not above one that takes them."""
    found = list(found)
    names = dict.fromkeys([*tasks.names(), *(name for e in found for name in e)])
    gains = {
        name: [e[name]["difference"]["mean"] for e in found if name in e and e[name]["difference"]["mean"] is not None]
        for name in names
        if name != REFERENCE
    }
    return sorted(gains, key=lambda name: (-len(gains[name]), fmean(gains[name]) if gains[name] else 0.0))


def beside(entry: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(difference of final losses, {steps, ratio} to the final loss of the other), both paired by seed. {} for each
    where one of the two has no result."""
    if not entry["curves"] or not other["curves"]:
        return {}, {}
    ends = [curve["losses"][-1] for curve in other["curves"]]
    gap = interval([own["losses"][-1] - end for own, end in zip(entry["curves"], ends, strict=True)])
    steps = crossings(entry["curves"], ends)
    return gap, {"steps": steps, "ratio": speedup(crossings(other["curves"], ends), steps)}


def half(stats: Mapping[str, Any]) -> float:
    return stats["ci95"][1] - stats["mean"] if stats["ci95"] else 0.0


def plus_minus(stats: Mapping[str, Any], sign: str = "", digits: int = 3) -> str:
    """`2.435 ± 0.066`; sign `+`: of a difference, `+0.012 ± 0.186`."""
    return f"{stats['mean']:{sign}.{digits}f} ± {half(stats):.{digits}f}"
