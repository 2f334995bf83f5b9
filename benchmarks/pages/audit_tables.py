"""Tables of the audits: is it new, does the metadata matter, how do published generators do."""

from __future__ import annotations

from typing import Any

from benchmarks.head_start import tasks
from benchmarks.head_start.results import BenchmarkResults, Facts, paired_difference
from benchmarks.novelty.audits import SHAPES, sample_labels
from benchmarks.novelty.verdict import TAUS, count_novel
from benchmarks.pages import cells
from benchmarks.peers.measure import format_table as format_peers_table
from headstart.report.scores import REFERENCE


def default_losses(results: BenchmarkResults) -> dict[str, float]:
    """{`seen short`, `unseen long`, …: the tuned default's final loss}: the bars of the novelty audit."""
    losses = {}
    for c, e in results.entries.items():
        if c.task == "A" and c.target in ("seen", tasks.MAIN_TARGET) and c.budget in tasks.BUDGETS:
            end = e[REFERENCE]["final_loss"]["mean"]
            if end is not None:
                losses[f"{'seen' if c.target == 'seen' else 'unseen'} {c.budget}"] = end
    return losses


def novelty_bars(results: BenchmarkResults) -> str:
    """How far donors are apart, and which losses count as ready and as performant."""
    audit, losses = results.facts.get("novelty"), default_losses(results)
    if audit is None or len(losses) < 4:
        return ""
    apart, short, long = audit["donors"], tasks.BUDGETS["short"], tasks.BUDGETS["long"]

    def at(budget: str) -> str:
        return ", ".join(f"{shape} {losses[f'{shape} {budget}']:.3f}" for shape in SHAPES)

    lines = [
        f"- Distance of a donor to the nearest other donor: {apart['median']:.3f} (median over donors).",
        f"- Distance of a donor to all other donors together: {apart['mosaic']:.3f} (median).",
        f"- Of the tokens that a donor or the donor most like it mispredicts, both mispredict {apart['iou']:.2f}. "
        f"Independent errors would give {apart['expected']:.2f}.",
        f"- In {apart['same']:.2f} of the tokens that both mispredict, the wrong token is the same.",
        f"- Ready: the loss at step 0 is at most the tuned default's after {short} steps ({at('short')}).",
        f"- Performant: the loss after {audit['steps']} steps is at most the tuned default's after {long} "
        f"({at('long')}).",
    ]
    return "\n".join(lines)


def novelty_table(results: BenchmarkResults) -> str:
    audit, losses = results.facts.get("novelty"), default_losses(results)
    if audit is None or len(losses) < 4:
        return ""
    heads = [
        "shape", "samples of", "n (distinct)", "step 0", "trained (rate)", "size", "distance", "to all together",
        "error overlap (if independent; same token)", "ready", "performant",
        *(f"novel, both: τ = {tau:g}" for tau in TAUS),
        "farther than donors from all together, and performant",
    ]  # fmt: skip
    rows = [
        [shape, label, *_novelty_cells(count_novel(audit, label, shape, *(losses[f"{shape} {b}"] for b in _BUDGETS)))]
        for shape in SHAPES
        for label in sampled_labels(audit, shape)
    ]
    return cells.table(heads, rows)


def sampled_labels(audit: Facts, shape: str) -> list[str]:
    """The labels that an audit has samples of at a shape; an earlier version of a method follows the method."""
    found = {s["label"] for s in audit["samples"] if s["shape"] == shape}
    versions = {method: label for label, method in tasks.EARLIER_VERSIONS.items()}
    return [name for label in sample_labels(shape) for name in (label, versions.get(label)) if name in found]


_BUDGETS = ("short", "long")


def _novelty_cells(s: dict[str, Any]) -> list[str]:
    return [
        f"{s['n']} ({s['distinct']})", cells.number_cell(s["loss"], ".2f"),
        f"{cells.number_cell(s['trained'])} ({s['rate']})", f"{s['size']:.2f}", f"{s['distance']:.3f}",
        f"{s['mosaic']:.3f}", f"{s['iou']:.2f} ({s['expected']:.2f}; {s['same']:.2f})", str(s["ready"]),
        str(s["performant"]), *(f"{s['novel'][f'{tau:g}']}, {s['both'][f'{tau:g}']}" for tau in TAUS),
        str(s["beyond"]),
    ]  # fmt: skip


def conditioning_table(results: BenchmarkResults) -> str:
    """Retrieval with the target's true metadata and with wrong metadata, paired by seed."""
    rows = []
    for c, e in results.entries.items():
        own = e.get(tasks.RETRIEVAL)
        if c.budget == "ladder" or own is None or not own["curves"]:
            continue
        row = [cells.comparison_name(c), f"{own['step0_loss']:.2f}", f"{own['final_loss']['mean']:.3f}"]
        for control in tasks.RETRIEVAL_CONTROLS:
            if control not in e or not e[control]["curves"]:
                row += [cells.MISSING, cells.MISSING]
            else:
                difference = paired_difference(e[control], own)
                row += [f"{e[control]['step0_loss']:.2f}", cells.difference_cell(difference)]
        rows.append(row)
    controls = [control.rpartition("=")[2] for control in tasks.RETRIEVAL_CONTROLS]
    heads = [f"{name}: {what}" for name in controls for what in ("step 0", "final minus true")]
    return cells.table(["comparison", "true: step 0", "final", *heads], rows)


def peers_table(results: BenchmarkResults) -> str:
    return format_peers_table(results.facts["peers"]) if "peers" in results.facts else ""
