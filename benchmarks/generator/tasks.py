"""The comparisons of the generator's benchmark.

A  donors of one text -> unseen shapes, the donors' own text
B  the same generator on two texts that neither donors nor generator saw
S  four generators, each from the specialists without those of one text, which is then the target's

The donors, targets, budgets and the rows of all other methods on A and B are those of `benchmarks/head_start`. Beside
each generator runs a control: the best donor of its zoo, trained for as many FLOPs as the generator, and carried to the
target's shape by the methods that were best there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.head_start import tasks
from benchmarks.head_start.tasks import BUDGETS, UNSEEN_TARGETS, Comparison

TEXTS = ("reference", "source", "shakespeare", "stories")  # of the specialists
GENERATORS = ("autoencoder", "diffusion")
# Lower than others need on the donors' own text, because what the generator writes is already trained.
GENERATOR_LRS = {"A": (6e-5, 2e-4, 6e-4, 2e-3), "B": (2e-4, 6e-4, 2e-3, 6e-3), "S": (2e-4, 6e-4, 2e-3, 6e-3)}
CARRIED_LRS = (6e-4, 2e-3, 6e-3)
LONGER_LRS = (2e-4, *CARRIED_LRS)
# The methods that were best on A at each shape, by benchmarks/results/tables.md.
CARRIERS = {
    "heads": ("sliced", "subcloning"),
    "gqa": ("row-column", "weight-selection:wider=repeat"),
    "deeper": ("net2wider", "stacking"),
    "narrower": ("sliced", "subcloning"),
    "wider": ("hypercloning", "net2wider"),
}
GROWN = ("deeper", "wider")  # targets whose carriers need a donor that fits inside; the others cut the widest donor
LONGER, WITHOUT = "-longer", "without-"  # in the names of zoos


@dataclass(frozen=True)
class Part:
    """Comparisons of one kind on all shapes: generators, their control, or, on S, methods that carry donors."""

    task: str  # A | B | S, with -longer for the control and -carried for carried methods
    text: str
    zoo: str

    @property
    def kind(self) -> str:
        return self.task.partition("-")[2]

    def methods(self, target: str) -> tuple[str, ...]:
        if self.kind == "":
            return GENERATORS if self.task == "A" else GENERATORS[1:]
        return (*CARRIERS[target], "retrieval") if self.kind == "carried" else CARRIERS[target]

    @property
    def lrs(self) -> tuple[float, ...]:
        return {"longer": LONGER_LRS, "carried": CARRIED_LRS}.get(self.kind) or GENERATOR_LRS[self.task]

    def comparisons(self, budget: str) -> Iterator[Comparison]:
        """One comparison for each of the unseen shapes."""
        for target, config in UNSEEN_TARGETS.items():
            yield Comparison(
                self.task, target, self.text, budget, self.zoo, config, "bytes",
                self.lrs, self.methods(target),
            )  # fmt: skip


def parts() -> list[Part]:
    """All parts, the most important first."""
    found = []
    for task, texts in (("A", ("reference",)), ("B", ("source", "shakespeare"))):
        for kind, zoo in (("", "embedded"), (LONGER, f"embedded{LONGER}")):
            found += [Part(task + kind, text, zoo) for text in texts]
    for text in TEXTS:
        zoo = f"{WITHOUT}{text}"
        found += [Part("S", text, zoo), Part("S-carried", text, zoo), Part(f"S{LONGER}", text, f"{zoo}{LONGER}")]
    return found


def comparisons() -> Iterator[Comparison]:
    """All comparisons, part by part."""
    for part in parts():
        for budget in BUDGETS:
            yield from part.comparisons(budget)


def seeds(comparison: Comparison) -> tuple[int, ...]:
    """The seeds of a comparison. S has 20 targets and one seed."""
    return tasks.SEEDS[:1] if comparison.task.startswith("S") else tasks.SEEDS
