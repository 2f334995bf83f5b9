"""The five claims of BENCHMARKS.md. Every number in them is computed from the rows and facts."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.head_start import tasks
from benchmarks.head_start.results import BenchmarkResults, Entries, format_interval, paired_difference
from benchmarks.novelty.audits import SHAPES
from benchmarks.novelty.verdict import count_novel
from benchmarks.pages.audit_tables import default_losses, sampled_labels
from headstart import samplers

LINE = 100
RETRIEVAL = tasks.RETRIEVAL
TRANSFER_FAMILIES = ("selection", "pruning", "growth", "mean-field")
MARGINAL_FAMILIES = ("parametric", "empirical")
TEXTS = (("A", "reference"), ("B", "source"), ("B", "shakespeare"))


@dataclass(frozen=True)
class Differences:
    """Differences of final losses with their intervals; negative is better."""

    values: Sequence[dict[str, Any]]

    @property
    def below(self) -> int:
        """How many lie below zero with their whole 95 % interval."""
        return sum(d["ci95"][1] < 0 for d in self.values)

    @property
    def above(self) -> int:
        return sum(d["ci95"][0] > 0 for d in self.values)

    @property
    def unresolved(self) -> int:
        return len(self.values) - self.below - self.above

    def gain(self) -> str:
        """`0.49 to 0.86`: the smallest and the largest gain."""
        means = [-d["mean"] for d in self.values]
        return f"{min(means):.2f} to {max(means):.2f}"

    def weakest(self) -> str:
        """The smallest gain, as a difference with its interval."""
        return format_interval(max(self.values, key=lambda d: d["mean"]), "+", 2)


def is_transfer(label: str) -> bool:
    """Whether a method carries a trained donor over: cut, grown, or passed through the autoencoder."""
    name = tasks.method_of_label(label)
    return name == "autoencoder" or samplers.get(name).family in TRANSFER_FAMILIES


def is_marginal(label: str) -> bool:
    """Whether a method draws entries one by one from the distribution of donors' entries."""
    return label != "matrix-normal" and samplers.get(tasks.method_of_label(label)).family in MARGINAL_FAMILIES


def to_default(comparisons: Iterable[Entries], labels: Iterable[str]) -> Differences:
    labels = list(labels)
    return Differences([e[n]["difference"] for e in comparisons for n in labels if n in e and e[n]["curves"]])


def best_transfer(entries: Entries) -> str:
    done = [name for name in entries if is_transfer(name) and entries[name]["curves"]]
    return min(done, key=lambda name: entries[name]["final_loss"]["mean"])


def retrieval_against_best(comparisons: Iterable[Entries]) -> Differences:
    return Differences([paired_difference(e[RETRIEVAL], e[best_transfer(e)]) for e in comparisons if RETRIEVAL in e])


def claims(results: BenchmarkResults) -> str:
    """Five numbered paragraphs with their evidence; "" before all comparisons are there."""
    if any(not results.comparisons_of(task, text, budget) for task, text in TEXTS for budget in tasks.BUDGETS):
        return ""
    makers = (_donors_claim, _retrieval_claim, _real_donors_claim, _statistics_claim, _novelty_claim)
    paragraphs = [make(results) for make in makers]
    return "\n\n".join(_wrap(f"{i}. {text}") for i, text in enumerate(paragraphs, 1))


def _wrap(text: str) -> str:
    """Lines of a list item; an interval stays on one line."""
    lines = textwrap.fill(text.replace(" ± ", "_±_"), LINE, subsequent_indent="   ", break_on_hyphens=False)
    return lines.replace("_±_", " ± ")


def _of_text(results: BenchmarkResults, text: tuple[str, str], budget: str) -> list[Entries]:
    return list(results.comparisons_of(*text, budget).values())


def _donors_claim(results: BenchmarkResults) -> str:
    labels = [label for label in tasks.row_labels() if is_transfer(label)]
    embedded = [e for text in TEXTS for budget in tasks.BUDGETS for e in _of_text(results, text, budget)]
    all_cases = to_default(embedded, labels)
    long = {text: to_default(_of_text(results, text, "long"), labels) for text in TEXTS}
    short = to_default(_of_text(results, TEXTS[0], "short"), labels)
    own, source, shakespeare = (long[text] for text in TEXTS)
    facts = results.facts
    heads = next(
        facts["comparisons"][c.name]
        for c in results.comparisons_of("A", "reference", "long")
        if c.target == tasks.MAIN_TARGET
    )
    spent = 6 * heads["parameters"] * heads["steps"] * heads["batch_size"] * heads["sequence"]
    all_donors = sum(6 * d["parameters"] * d["tokens"] for d in facts["zoos"]["embedded"])
    return (
        "**A trained donor is a head start on every shape and text.** Methods that cut or grow a donor, or pass it "
        f"through our autoencoder, end below the tuned default in {all_cases.below} of {len(all_cases.values)} cases, "
        f"with the whole 95 % interval. After {tasks.BUDGETS['long']} steps they gain {own.gain()} nats on the "
        f"donors' own text (weakest: {own.weakest()}), {source.gain()} on source code (weakest: {source.weakest()}) "
        f"and {shakespeare.gain()} on Shakespeare (weakest: {shakespeare.weakest()}). The gain shrinks with training: "
        f"after {tasks.BUDGETS['short']} steps it is {short.gain()} on the donors' own text. It has been paid for "
        f"before: training the fourteen donors took {all_donors / spent:.0f} times the FLOPs of "
        f"{tasks.BUDGETS['long']} steps on `{tasks.MAIN_TARGET}`."
    )


def _retrieval_claim(results: BenchmarkResults) -> str:
    everywhere = [e for text in TEXTS for budget in tasks.BUDGETS for e in _of_text(results, text, budget)]
    all_cases, rivals = to_default(everywhere, [RETRIEVAL]), retrieval_against_best(everywhere)
    long = _of_text(results, TEXTS[0], "long")
    coder = fmean(paired_difference(e[RETRIEVAL], e["autoencoder-v1"])["mean"] for e in long)
    own = to_default(long, [RETRIEVAL])
    return (
        "**Retrieval has this head start too, and does not beat the best transfer method.** These runs are of the "
        "earlier pipeline, in which a trained network chose the blocks; the method of today chooses by a formula. "
        f"It ends below the tuned default in {all_cases.below} of {len(all_cases.values)} cases; on the donors' own "
        f"text it gains {own.gain()} nats after {tasks.BUDGETS['long']} steps (weakest: {own.weakest()}), "
        f"{abs(coder):.2f} {'less' if coder > 0 else 'more'} than one donor passed through our autoencoder. Beside the "
        f"best transfer method of each comparison, chosen after the fact, it is worse in {rivals.above} cases, better "
        f"in {rivals.below} and not distinguishable in {rivals.unresolved}; better on {_better_shapes(results)}."
    )


def _better_shapes(results: BenchmarkResults) -> str:
    """`gqa` (4) and `deeper` (1): the shapes on which retrieval is better than the best transfer method."""
    found = Counter(
        c.target
        for text in TEXTS
        for budget in tasks.BUDGETS
        for c, e in results.comparisons_of(*text, budget).items()
        if retrieval_against_best([e]).below
    )
    return " and ".join(f"`{target}` ({n})" for target, n in found.most_common())


def _real_donors_claim(results: BenchmarkResults) -> str:
    done = {c.target: e for c, e in results.comparisons_of("C", "stories", "long").items()}
    labels = [*(label for zoo in ("embedded", "real") for label in tasks.row_labels(zoo) if is_transfer(label))]

    def gains(*targets: str) -> Differences:
        return to_default([done[target] for target in targets], dict.fromkeys(labels))

    def retrieval(target: str) -> str:
        return format_interval(done[target][RETRIEVAL]["difference"], "+", 2)

    behind = paired_difference(done["between"][RETRIEVAL], done["between"][best_transfer(done["between"])])
    return (
        "**Real donors are a head start as well, and there retrieval is behind.** Small Llamas trained on stories, "
        f"cut or grown to two shapes with their tokenizer, gain {gains('between', 'narrower').gain()} nats after "
        f"{tasks.BUDGETS['long']} steps (weakest: {gains('between', 'narrower').weakest()}), and "
        f"{gains('bytes').gain()} on a target with other tokens (weakest: {gains('bytes').weakest()}). GPT-2s that "
        f"never saw a story gain {gains('gpt2').gain()} (weakest: {gains('gpt2').weakest()}). Retrieval ends at "
        f"{retrieval('between')} on `between` ({format_interval(behind, '+', 2)} beside the best transfer method), "
        f"{retrieval('bytes')} on `bytes` and {retrieval('narrower')} on `narrower`. It refuses the GPT-2 target."
    )


def _statistics_claim(results: BenchmarkResults) -> str:
    labels = [label for label in tasks.language_model_methods() if is_marginal(label)]

    def count(labels: Iterable[str], *texts: tuple[str, str]) -> Differences:
        return to_default(
            [e for text in texts for budget in tasks.BUDGETS for e in _of_text(results, text, budget)], labels
        )

    own, other, real = count(labels, TEXTS[0]), count(labels, *TEXTS[1:]), count(labels, ("C", "stories"))
    matrix, depth = count(["matrix-normal"], *TEXTS), count(["truncated-normal"], *TEXTS)
    depth_long = to_default([e for text in TEXTS for e in _of_text(results, text, "long")], ["truncated-normal"])
    return (
        f"**Statistics of donors' weights are hardly a head start.** The {len(labels)} methods that draw entries one "
        "by one from the distribution of a donor's entries are better than the tuned default in "
        f"{own.below} of {len(own.values)} cases on the donors' own text and worse in {own.above}; on the other texts "
        f"better in {other.below} of {len(other.values)} and worse in {other.above}. On real donors they are better in "
        f"{real.below} of {len(real.values)} and worse in {real.above}. `matrix-normal`, which adds covariances of "
        f"rows and columns, is better in {matrix.below} of {len(matrix.values)} (gains {matrix.gain()} nats). A "
        f"truncated normal scaled by depth, which needs no donor, is better in {depth.below} of {len(depth.values)}, "
        f"{depth_long.below} of them after {tasks.BUDGETS['long']} steps."
    )


def _novelty_claim(results: BenchmarkResults) -> str:
    audit, losses = results.facts["novelty"], default_losses(results)
    counts = {
        (shape, label): count_novel(audit, label, shape, losses[f"{shape} short"], losses[f"{shape} long"])
        for shape in SHAPES
        for label in sampled_labels(audit, shape)
    }
    samples = sum(s["n"] for s in counts.values())
    both = sum(s["both"]["1"] for s in counts.values())
    own = [counts[shape, RETRIEVAL] for shape in SHAPES]
    donors, noisy = audit["donors"]["median"], counts["seen", "a donor with 20% noise"]
    return (
        "**What performs is not new, and what is new does not perform.** A sample is novel if it is farther from every "
        f"donor than donors are from one another ({donors:.2f}), and performs if it is as good after "
        f"{audit['steps']} steps as the tuned default after {tasks.BUDGETS['long']}. Of {samples} samples of "
        f"{len({label for _, label in counts})} methods and controls {both} do both. All "
        f"{sum(s['performant'] for s in own)} samples of retrieval perform and {sum(s['novel']['1'] for s in own)} "
        f"are novel: they lie {own[0]['distance']:.2f} from the nearest donor at a shape that donors have and "
        f"{own[1]['distance']:.2f} at one that they do not. A donor with 20 % noise lies at {noisy['distance']:.2f}. "
        "Retrieval arranges parts of its donors; that is its head start."
    )
