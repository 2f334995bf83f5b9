"""Writes benchmarks/results/generator.md from the committed runs and measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.facts import read_facts
from benchmarks.generator import ablations, audit, runs, tasks, text_ablations
from benchmarks.generator.tasks import LONGER, Part
from benchmarks.generator.text_audit import costs_of_others, mixture_is_better
from benchmarks.head_start import benchmark
from benchmarks.head_start import rows as run_rows
from benchmarks.head_start import tasks as head_start
from benchmarks.head_start.results import BenchmarkResults, Entries, format_interval, paired_difference
from benchmarks.head_start.tasks import BUDGETS, Comparison
from benchmarks.pages import cells
from benchmarks.paths import RESULTS
from headstart.report.scores import REFERENCE, score
from zoo.checkpoints.atomic import replace_file

PAGE = RESULTS / "generator.md"
NOISE = 0.02  # nats; below it, a difference of one seed says nothing
UNTOLD = ("no text", "noise", "mean latents")
VERDICTS = ("below", "not distinguishable", "above")
RATES = {task: ", ".join(f"{lr:g}" for lr in lrs) for task, lrs in tasks.GENERATOR_LRS.items()}
INTRODUCTION = f"""# The generator

Written by `python -m benchmarks.generator`. The generator is trained on a zoo, with default settings and one seed,
and writes weights for five shapes that no donor has. `autoencoder` decodes the latents of a donor, `diffusion`
generates latents from the target's config and the first 100 kB of its training text. Donors, shapes, texts and
budgets are those of [tables.md](tables.md).

- **A**: the donors' own text. **B**: texts that neither donors nor generator saw. **S**: specialists of three texts,
  the target has the fourth.
- **best other**: the lowest final loss of all other methods, chosen after the fact.
- **control**: the widest donor, trained for as many FLOPs as the generator, carried to the target by the two methods
  that were best at this shape; the better of these, chosen after the fact. `deeper` and `wider` are grown from the
  best donor that fits inside them. Where nothing is shown, the control is not measured yet.
- **difference**: `diffusion` minus the lower of the two, paired by seed, with its 95 % interval. S has one seed; there
  a difference within {NOISE:g} nats counts as not distinguishable.
- Learning rates are tuned on the first seed: {RATES["A"]} for the generator on A, and
  {RATES["B"]} on B and S; a star marks a rate at the edge.
"""


@dataclass(frozen=True)
class Row:
    """The best of each kind of method at one shape on one text with one budget."""

    comparison: Comparison
    own: Entries
    others: Entries
    controls: Entries
    default: Mapping[str, Any] | None  # the tuned default

    def best(self, entries: Entries) -> str | None:
        """The label of the lowest final loss."""
        done = {n: e["final_loss"]["mean"] for n, e in entries.items() if e["final_loss"]["mean"] is not None}
        return min(done, key=lambda name: done[name]) if done else None

    def difference(self) -> dict[str, Any]:
        """The interval of `diffusion` minus the best other method or control; {} without one."""
        both = self.others | self.controls
        name = self.best(both)
        return paired_difference(self.own["diffusion"], both[name]) if name else {}

    def verdict(self) -> str:
        return verdict_of(self.difference())


def verdict_of(difference: Mapping[str, Any]) -> str:
    """One of VERDICTS for an interval of a difference; "" without one."""
    if not difference:
        return ""
    low, high = difference["ci95"] or (difference["mean"] - NOISE, difference["mean"] + NOISE)
    return VERDICTS[0] if high < 0 else VERDICTS[2] if low > 0 else VERDICTS[1]


def write() -> None:
    """Writes the page."""
    replace_file(PAGE, page().encode())


def all_rows(carried: BenchmarkResults) -> list[Row]:
    """The rows of all parts. carried: the runs of all other methods on A and B."""
    rows = run_rows.read(runs.ROWS)
    return [row for part in tasks.parts() if not part.kind for row in part_rows(part, rows, carried)]


def page() -> str:
    found = all_rows(BenchmarkResults.from_rows(run_rows.read(benchmark.RUNS), benchmark.read_facts()))
    facts = read_facts(audit.FACTS)
    sections = [
        INTRODUCTION,
        "## Summary\n\n" + summary_table(found),
        *(loss_section(found, task, budget) for task in ("A", "B", "S") for budget in BUDGETS),
        "## Before training\n\n" + start_table(found),
        *audit_sections(facts),
        ablations.section(),
        text_ablations.section(),
    ]
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def part_rows(part: Part, rows: list[dict[str, Any]], carried: BenchmarkResults) -> Iterator[Row]:
    """One row for each shape and budget that the generator was trained at."""
    for budget in BUDGETS:
        committed = {c.target: e for c, e in carried.comparisons_of(part.task, part.text, budget).items()}
        for comparison in part.comparisons(budget):
            own = entries(rows, comparison, part.task)
            if "diffusion" not in own:
                continue
            all_methods = committed.get(comparison.target) or entries(rows, comparison, f"{part.task}-carried")
            others = {n: e for n, e in all_methods.items() if n not in tasks.GENERATORS}
            controls = {n: e for n, e in entries(rows, comparison, f"{part.task}{LONGER}").items() if n != REFERENCE}
            yield Row(comparison, own, others, controls, all_methods.get(REFERENCE))


def entries(rows: list[dict[str, Any]], comparison: Comparison, task: str) -> Entries:
    """{method: what `headstart compare` reports of it} of the same target under another name of the task."""
    same = ("target", "text", "budget")
    own = [r for r in rows if r["task"] == task and all(r[key] == getattr(comparison, key) for key in same)]
    if not own:
        return {}
    found = [run_rows.to_run(r) for r in own]
    found.sort(key=lambda run: run["method"] != REFERENCE)
    return score(found, comparison.steps, head_start.SEEDS[: head_start.TUNING_SEEDS])[1]


def summary_table(found: list[Row]) -> str:
    """How often `diffusion` ends below the best of all others."""
    lines = []
    for task in ("A", "B", "S"):
        for budget in BUDGETS:
            verdicts = [r.verdict() for r in found if (r.comparison.task, r.comparison.budget) == (task, budget)]
            if verdicts:
                counts = [str(verdicts.count(v)) for v in VERDICTS]
                lines.append([task, str(BUDGETS[budget]), str(len(verdicts)), *counts])
    return cells.table(["task", "steps", "cases", *VERDICTS], lines)


def loss_section(found: list[Row], task: str, budget: str) -> str:
    """Final losses of one task and budget; "" without runs."""
    rows = [r for r in found if (r.comparison.task, r.comparison.budget) == (task, budget)]
    if not rows:
        return ""
    lines = []
    for r in rows:
        name = f"{r.comparison.target}, {r.comparison.text}"
        lines.append(
            [
                name, final_cell(r.default), best_cell(r, r.others), best_cell(r, r.controls),
                final_cell(r.own.get("autoencoder")), final_cell(r.own["diffusion"]),
                cells.difference_cell(r.difference()), r.verdict() or cells.MISSING,
            ]
        )  # fmt: skip
    heads = ["target", "default, tuned", "best other", "control", "`autoencoder`", "`diffusion`", "difference", ""]
    return f"## {task} after {BUDGETS[budget]} steps\n\n" + cells.table(heads, lines)


def final_cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["final_loss"]["mean"] is None:
        return cells.MISSING
    rate = cells.rate_cell(entry)
    loss = entry["final_loss"]
    return f"{loss['mean']:.3f} ({rate})" if loss["ci95"] is None else f"{format_interval(loss)} ({rate})"


def best_cell(row: Row, found: Entries) -> str:
    name = row.best(found)
    return cells.MISSING if name is None else f"{found[name]['final_loss']['mean']:.3f} `{short_name(name)}`"


def short_name(label: str) -> str:
    """A label without the name of its donor: the table says which method, the rows which donor."""
    return ":".join(piece for piece in label.split(":") if not piece.startswith("donor="))


def start_table(found: list[Row]) -> str:
    """Losses at step 0, beside what the tuned default needs 200 steps for."""
    lines = []
    for r in found:
        if r.comparison.budget != "long":
            continue
        default = r.default["final_loss"]["mean"] if r.default else None
        starts = [start_loss(r.own.get(name)) for name in tasks.GENERATORS]
        other = [start_loss(e) for e in (r.others | r.controls).values() if e["curves"]]
        known = [loss for loss in other if loss is not None]
        below = cells.MISSING if default is None or starts[1] is None else "yes" if starts[1] < default else "no"
        name = f"{r.comparison.task} {r.comparison.target}, {r.comparison.text}"
        numbers = [default, min(known, default=None), *starts]
        lines.append([name, *(cells.MISSING if n is None else f"{n:.3f}" for n in numbers), below])
    heads = ["target", "default after 200 steps", "best other or control", "`autoencoder`", "`diffusion`", "below"]
    return cells.table(heads, lines)


def start_loss(entry: Mapping[str, Any] | None) -> float | None:
    """The mean loss at step 0."""
    if entry is None or not entry["curves"]:
        return None
    starts = [curve["losses"][0] for curve in entry["curves"]]
    return sum(starts) / len(starts)


def audit_sections(facts: Mapping[str, Any]) -> Iterator[str]:
    """What the parts of each generator do, what it stores and what it costs."""
    if not facts:
        return
    yield (
        "## What its parts do\n\nLoss at step 0 on held-out text. **denoiser zeroed**: the latents stay noise. **mean "
        "latents**: those of the zoo's mean. **mixers zeroed**: every basis has the same weight in all blocks. **told "
        "wrong**: the sampler, or in brackets the field, reads another width or depth, or asks for a model 1 nat worse."
        " **seeds apart**: relative distance of what two seeds write. **nearest donor**: relative distance in the "
        f"donor's coordinates; donors of A lie {facts[next(iter(facts))]['donors apart']:.2f} from one another."
        "\n\n" + parts_table(facts)
    )
    yield "## Text\n\nThe same shape, and the loss on the target's text.\n\n" + text_table(facts)
    if table := own_text_table(facts):
        yield (
            "The same on the texts of each zoo: the loss of what is told the text, and how much higher it is told "
            "**another** text (the mean of the others), **the best other** one, or **no text**; with **noise** instead "
            "of latents, or with the zoo's **mean latents**. Means over the shapes, and in brackets their range.\n\n"
            + table
        )
        yield (
            "Half of one text and half of another. **told both**: a sample with half of each. **interpolated**: the "
            "mean of the latents of the two. **below**: at how many shapes the better of these is below both.\n\n"
            + half_text_table(facts)
        )
    yield (
        "## Size, cost and speed\n\nCPU seconds of one thread. **targets**: how many targets a default start would "
        "have to be trained for 200 steps to cost as many FLOPs.\n\n" + cost_table(facts)
    )


def parts_table(facts: Mapping[str, Any]) -> str:
    lines = []
    for zoo, about in facts.items():
        for shape, f in about["shapes"].items():
            wrong = [f"{f[f'{w} told wrong']:.2f} ({f[f'{w} told wrong (field)']:.2f})" for w in ("width", "depth")]
            parts = [f"{f[key]:.2f}" for key in ("denoiser zeroed", "mean latents", "mixers zeroed")]
            sampled = f"{min(f['sampled']):.2f} to {max(f['sampled']):.2f}"
            apart = f"{min(f['seeds apart']):.2f} to {max(f['seeds apart']):.2f}"
            nearest = f"{min(f['nearest']):.2f} to {max(f['nearest']):.2f}"
            quality = f"{f['quality told wrong']:.2f}"
            lines.append([f"{zoo}, {shape}", sampled, *parts, *wrong, quality, apart, nearest])
    heads = ["zoo, shape", "three seeds", "denoiser zeroed", "mean latents", "mixers zeroed", "width told wrong"]
    return cells.table([*heads, "depth told wrong", "quality told wrong", "seeds apart", "nearest donor"], lines)


def text_table(facts: Mapping[str, Any]) -> str:
    lines = []
    for zoo, about in facts.items():
        for shape, f in about["shapes"].items():
            others = ", ".join(f"{name} {loss:.2f}" for name, loss in f["other texts"].items())
            own = f"{f['sampled'][0]:.2f}"
            lines.append([f"{zoo}, {shape}", about["text"], own, f"{f['no text']:.2f}", others])
    return cells.table(["zoo, shape", "text", "told it", "told no text", "told another"], lines)


def own_text_table(facts: Mapping[str, Any]) -> str:
    """Told the right text against told another one; "" where no zoo has several texts."""
    lines = []
    for zoo, about in facts.items():
        found = [f.get("texts", {}) for f in about["shapes"].values()]
        for text in found[0].get("own", {}):
            costs = [costs_of_others(f["own"][text], text) for f in found]
            if costs[0]:
                right = mean([f["own"][text][text] for f in found])
                best, every = [min(c) for c in costs], [mean(c) for c in costs]
                without = [mean([f["untold"][text][what] for f in found]) - right for what in UNTOLD]
                lines.append(
                    [
                        zoo, text, f"{right:.2f}", f"{mean(every):.2f} ({min(every):.2f} to {max(every):.2f})",
                        f"{mean(best):.2f} ({min(best):.2f} to {max(best):.2f})",
                        *(f"{cost:.2f}" for cost in without),
                    ]
                )  # fmt: skip
    return cells.table(["zoo", "text", "told it", "another", "the best other", *UNTOLD], lines) if lines else ""


def half_text_table(facts: Mapping[str, Any]) -> str:
    lines = []
    for zoo, about in facts.items():
        found = [f.get("texts", {}).get("halves", {}) for f in about["shapes"].values()]
        for pair in found[0]:
            told = {name: [halves[pair][name] for halves in found] for name in found[0][pair]}
            below = sum(mixture_is_better(halves[pair]) for halves in found)
            numbers = [f"{mean(losses):.2f}" for losses in told.values()]
            lines.append([zoo, pair, *numbers, f"{below} of {len(found)}"])
    return cells.table(["zoo", "texts", "told both", "interpolated", "told the first", "the second", "below"], lines)


def stored_numbers(sizes: Mapping[str, int]) -> int:
    """What a pipeline stores for generating, by `audit.sizes`."""
    return sizes["field"] + sizes["denoiser"]


def cost_table(facts: Mapping[str, Any]) -> str:
    lines = []
    for zoo, about in facts.items():
        size, cost = about["sizes"], about["cost"]
        stored = stored_numbers(size)
        target = 6 * 5e5 * BUDGETS["long"] * head_start.BATCH_SIZE * head_start.SEQUENCE
        lines.append(
            [
                zoo, f"{stored:,}", f"{size['donors']:,}", f"{stored / size['donors']:.2f}",
                f"{sum(cost['seconds']):.0f}", f"{cost['flops']:.2g}", f"{cost['donor_flops']:.2g}",
                f"{cost['flops'] / target:.0f}", f"{about['speed'] / 1e6:.1f} M",
            ]
        )  # fmt: skip
    heads = ["zoo", "numbers stored", "weights of donors", "ratio", "CPU seconds", "FLOPs", "FLOPs of the donors"]
    return cells.table([*heads, "targets", "parameters per second"], lines)
