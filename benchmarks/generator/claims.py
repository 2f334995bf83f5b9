"""What BENCHMARKS.md says of the generator. Every number is computed from the runs."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.facts import read_facts
from benchmarks.generator import audit, page, tasks
from benchmarks.generator.page import NOISE, Row
from benchmarks.generator.text_audit import costs_of_others, mixture_is_better
from benchmarks.head_start.results import BenchmarkResults, Entries, paired_difference
from benchmarks.head_start.tasks import BUDGETS
from benchmarks.pages import cells

LINE = 100
TEXTS = {"A": "the donors' own text", "B": "source code and Shakespeare", "S": "the text that its zoo lacks"}


def generator_claims(results: BenchmarkResults) -> str:
    """Paragraphs and a table of counts; "" before there are runs."""
    found = page.all_rows(results)
    if not found:
        return ""
    facts = read_facts(audit.FACTS)
    paragraphs = [start_claim(found), loss_claim(found), *audit_claims(facts), *specialist_claims(facts)]
    wrapped = [textwrap.fill(p, LINE, break_on_hyphens=False) for p in paragraphs]
    return "\n\n".join([wrapped[0], counts_table(found), *wrapped[1:]])


def start_claim(found: Sequence[Row]) -> str:
    """Before training: beside the default after 200 steps."""
    own = [r for r in found if r.comparison.budget == "long" and r.comparison.task == "A" and r.default]
    starts = [page.start_loss(r.own["diffusion"]) or 0.0 for r in own]
    ends = [r.default["final_loss"]["mean"] for r in own if r.default]
    below = sum(a < b for a, b in zip(starts, ends, strict=True))
    return (
        "**The generator writes models that work before they are trained.** `diffusion` reads a config and 100 kB of "
        f"text. At {len(own)} shapes that no donor has, what it writes has a loss of {spread(starts)} nats on "
        f"{TEXTS['A']}. The tuned default has {spread(ends)} after {BUDGETS['long']} steps; the start is below that "
        f"at {below} of {len(own)} shapes."
    )


def loss_claim(found: Sequence[Row]) -> str:
    """What the verdicts are made of."""
    seed = f"; S, one seed: more than {NOISE:g} nats" if has_specialists(found) else ""
    others = " (on S `retrieval` and the two that were best on A)" if has_specialists(found) else ""
    return (
        f"Each case is one shape and text; the other side is chosen afterwards. **Others**: all methods of this page"
        f"{others}. **Control**: the widest donor (or the best that fits inside the target), trained for as many FLOPs "
        "as the generator, and carried by the two methods that are best there. Below and above: the whole 95 % interval"
        f"{seed}. [generator.md](benchmarks/results/generator.md) has every case."
    )


def has_specialists(found: Sequence[Row]) -> bool:
    return any(r.comparison.task == "S" for r in found)


def counts_table(found: Sequence[Row]) -> str:
    """How often `diffusion` is below, not distinguishable from, or above the others and the control."""
    sides: dict[str, Callable[[Row], Entries]] = {"others": lambda r: r.others, "control": lambda r: r.controls}
    lines = []
    for task in TEXTS:
        for budget, steps in BUDGETS.items():
            rows = [r for r in found if (r.comparison.task, r.comparison.budget) == (task, budget)]
            counts = [count(rows, side) for side in sides.values()]
            if rows:
                lines.append([task, str(steps), str(len(rows)), *counts])
    heads = ["task", "steps", "cases", "against others: below / same / above", "against the control"]
    return cells.table(heads, lines)


def count(rows: Sequence[Row], side: Callable[[Row], Entries]) -> str:
    """`4 / 1 / 0`"""
    verdicts = []
    for row in rows:
        best = row.best(side(row))
        if best:
            verdicts.append(page.verdict_of(paired_difference(row.own["diffusion"], side(row)[best])))
    return " / ".join(str(verdicts.count(v)) for v in page.VERDICTS) if verdicts else cells.MISSING


def audit_claims(facts: Mapping[str, Any]) -> list[str]:
    """The parts of the generator of A."""
    about = facts.get("embedded")
    if about is None:
        return []
    shapes = list(about["shapes"].values())
    size, cost = about["sizes"], about["cost"]
    stored = page.stored_numbers(size)

    def loss_of(key: str) -> list[float]:
        return [f[key] - f["sampled"][0] for f in shapes]

    nearest = [d for f in shapes for d in f["nearest"]]
    apart = [d for f in shapes for d in f["seeds apart"]]
    return [
        f"It stores {stored / 1e6:.2f} M numbers for donors of {size['donors'] / 1e6:.2f} M. Noise in place of the "
        f"latents costs {spread(loss_of('denoiser zeroed'))} nats, the zoo's mean latents "
        f"{spread(loss_of('mean latents'))}, equal weights for all bases {spread(loss_of('mixers zeroed'))}: on a zoo "
        f"of one text the field does the work. Two seeds lie {spread(apart)} apart, and {spread(nearest)} from the "
        f"nearest donor (donors from one another: {about['donors apart']:.2f}). Training took "
        f"{sum(cost['seconds']) / 60:.0f} minutes of one core, {cost['flops'] / cost['donor_flops']:.1f} times the "
        "FLOPs of its donors."
    ]


def specialist_claims(facts: Mapping[str, Any]) -> list[str]:
    """What the generators of specialists do on the texts of their donors; none before they are measured."""
    zoos = {zoo: about for zoo, about in facts.items() if zoo.startswith(tasks.WITHOUT)}
    if not zoos:
        return []
    shapes = [f for about in zoos.values() for f in about["shapes"].values()]
    own = [(text, losses) for f in shapes for text, losses in f["texts"]["own"].items()]
    right = [losses[text] for text, losses in own]
    costs = [found for text, losses in own if (found := costs_of_others(losses, text))]
    every, best = [sum(c) / len(c) for c in costs], [min(c) for c in costs]
    halves = [losses for f in shapes for losses in f["texts"]["halves"].values()]
    mixed = sum(mixture_is_better(losses) for losses in halves)
    shares = [page.stored_numbers(z["sizes"]) / z["sizes"]["donors"] for z in zoos.values()]
    noise = [u["noise"] - f["texts"]["own"][t][t] for f in shapes for t, u in f["texts"]["untold"].items()]
    unseen = [f["denoiser zeroed"] - f["sampled"][0] for f in shapes]
    return [
        f"**On a zoo of specialists** ({len(zoos)} of {len(tasks.TEXTS)} generators measured, each of donors on three "
        f"texts) it writes models of {spread(right)} nats on these texts. Told another text they are {spread(every)} "
        f"higher (the mean of the others; median {median(every):.2f}), told the best of the others {spread(best)} "
        f"(median {median(best):.2f}). On half of one text and half of another, mixed "
        f"latents are below both pure ones in {mixed} of {len(halves)} cases. Noise in place of the latents costs "
        f"{spread(noise)}; on the text that no donor saw {spread(unseen)}. They store {max(shares):.2f} of their "
        "donors' weights."
    ]


def spread(values: Sequence[float]) -> str:
    """`1.52 to 1.97`"""
    return f"{min(values):.2f} to {max(values):.2f}"
