"""Tables of the comparisons: what was compared, how large the head start is, beside which rivals, from which donor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from benchmarks.head_start import rows as run_rows
from benchmarks.head_start import tasks
from benchmarks.head_start.results import (
    BenchmarkResults,
    Entries,
    format_interval,
    paired_difference,
    paired_speedup,
    rank_methods,
)
from benchmarks.pages import cells
from headstart import samplers
from headstart.report.scores import REFERENCE
from zoo.targets.blueprint import Blueprint

OUR_METHODS = ("diffusion", tasks.RETRIEVAL)  # they are not rivals of one another


def run_counts(results: BenchmarkResults) -> str:
    """How many runs of what, and which versions made them."""
    done = [r for c in results.entries for r in run_rows.of_comparison(results.rows, c)]
    if not done:
        return ""
    commits: dict[str, set[str]] = {}
    for r in done:
        commit, _, versions = r["made"].partition(", ")
        commits.setdefault(versions, set()).add(commit)
    methods = {r["method"].partition(":")[0] for r in done}
    families = len({samplers.get(tasks.method_of_label(name)).family for name in methods})
    rates = ", ".join(f"{lr:g}" for lr in tasks.LRS["long"])
    lines = [
        f"- rows: {len(done):,}, of {len({r['file'] for r in done}):,} different runs",
        f"- methods: {len(methods)}, of {families} families; besides, options that lift a refusal, and retrieval "
        "under wrong metadata",
        f"- seeds: {', '.join(map(str, tasks.SEEDS))}",
        f"- learning rates: {rates}; with {tasks.BUDGETS['short']} steps {tasks.LRS['short'][-1]:g} too; more for the "
        "largest stable one",
        f"- batch: {tasks.BATCH_SIZE} x {tasks.SEQUENCE} tokens a step",
        *(f"- {versions}, at commits {', '.join(sorted(found))}" for versions, found in commits.items()),
    ]
    return "\n".join(lines)


def overview_table(results: BenchmarkResults) -> str:
    """What was compared on what."""
    facts, rows = results.facts, []
    for c in results.entries:
        about = facts["comparisons"][c.name]
        flops = 6 * about["parameters"] * about["steps"] * about["batch_size"] * about["sequence"]
        rows.append(
            [
                f"{c.task} {c.target}, {c.budget}", _shape(about["target"]), f"{about['parameters']:,}",
                f"{c.text} ({c.tokenizer})", str(about["steps"]), f"{flops:.2g}",
                f"{len(facts['zoos'][c.zoo])} {c.zoo}",
            ]
        )  # fmt: skip
    return cells.table(["comparison", "target", "parameters", "text", "steps", "FLOPs", "donors"], rows)


def _shape(config: dict[str, Any]) -> str:
    m = Blueprint.from_config(config).metadata
    assert m is not None
    return (
        f"{m.layers} layers, {m.width} wide, {m.heads} heads ({m.kv_heads} kv) of {m.head_dim}, FFN {m.ffn}, "
        f"{m.vocab} tokens{', tied' if m.tied else ''}{'' if m.architecture == 'llama' else ', ' + m.architecture}"
    )


def training_costs(results: BenchmarkResults) -> str:
    """What training the donors and our models of them took."""
    lines = []
    for zoo, donors in results.facts["zoos"].items() if results.entries else ():
        known = all(d["tokens"] for d in donors)
        flops = f"{sum(6 * d['parameters'] * d['tokens'] for d in donors):.2g} FLOPs" if known else "unknown"
        seconds = results.facts["trained"].get(zoo)
        more = "" if seconds is None else f"; autoencoder and diffusion: {seconds:.0f} seconds of a core"
        lines.append(f"- {zoo} zoo, all {len(donors)} donors: {flops}{more}")
    return "\n".join(lines)


def head_start_table(task: str, text: str, budget: str) -> Callable[[BenchmarkResults], str]:
    """Makes a table with a row per method and a column per target."""

    def make(results: BenchmarkResults) -> str:
        chosen = results.comparisons_of(task, text, budget)
        about = {c: results.facts["comparisons"][c.name] for c in chosen}
        if not chosen:
            return ""
        rows = [
            [f"{REFERENCE}, tuned", *(cells.default_cell(e[REFERENCE]) for e in chosen.values())],
            ["best donor, not trained further", *(cells.best_donor_cell(about[c]) for c in chosen)],
        ]
        measured = {name for c, e in chosen.items() for name in (*e, *about[c]["refused"])}
        for name in (name for name in rank_methods(chosen.values()) if name in measured):
            rows.append(
                [name, *(cells.method_cell(e.get(name), about[c]["refused"].get(name)) for c, e in chosen.items())]
            )
        return cells.table(["method", *(c.target for c in chosen)], rows)

    return make


def rivals_table(results: BenchmarkResults) -> str:
    """Retrieval beside the best method that needs no donor, and beside the best method that takes one donor."""
    rows = []
    for c, e in results.entries.items():
        if c.budget == "ladder" or c.methods or tasks.RETRIEVAL not in e:
            continue
        row = [cells.comparison_name(c)]
        for donors in (False, True):
            best = best_rival(e, donors)
            own_gain = "" if best == REFERENCE else f" ({cells.difference_cell(e[best]['difference'])})"
            row += [best + own_gain, cells.difference_cell(paired_difference(e[tasks.RETRIEVAL], e[best]))]
            if not donors:
                row.append(cells.fewer_cell(paired_speedup(e[tasks.RETRIEVAL], e[best])))
        rows.append(row)
    heads = ["comparison", "best without donors", "retrieval minus it", "fewer steps", "best with donors"]
    return cells.table([*heads, "retrieval minus it"], rows)


def best_rival(entries: Entries, donors: bool) -> str:
    """The method of lowest final loss that needs donors, or that needs none, without OUR_METHODS."""
    losses = {
        name: e["final_loss"]["mean"]
        for name, e in entries.items()
        if (method := tasks.method_of_label(name)) not in OUR_METHODS and bool(samplers.get(method).needs) == donors
    }
    return min(losses, key=lambda name: math.inf if losses[name] is None else losses[name])


def donor_choice_table(results: BenchmarkResults) -> str:
    """One method from every donor of the zoo, with retrieval beside it."""
    done = {c.budget: c for c in results.entries if (c.task, c.target) == ("A", tasks.DONOR_CHOICE_TARGET)}
    if "donors" not in done or "long" not in done or tasks.RETRIEVAL not in results.entries[done["long"]]:
        return ""
    entries, retrieval = results.entries[done["donors"]], results.entries[done["long"]][tasks.RETRIEVAL]
    untrained = results.facts["comparisons"][done["donors"].name]["as_they_are"]
    rows = []
    for name in rank_methods([entries]):
        if name not in entries or entries[name]["final_loss"]["mean"] is None:
            continue
        e, donor = entries[name], name.partition("donor=")[2]
        final = f"{format_interval(e['final_loss'])} ({cells.rate_cell(e)})"
        beside = cells.difference_cell(paired_difference(retrieval, e))
        rows.append([donor, f"{untrained[donor]:.3f}", final, beside])
    return cells.table(["donor", "its loss before", "final loss (learning rate)", "retrieval minus it"], rows)
