"""What starts from a real donor are worth after 50 and 200 steps: results/real_trainings.md.

    python -m benchmarks.real.trainings --models MODELS --data DATA [--work DIR] [--seeds N] [--workers N]

A target of 34 million weights in SmolLM2's vocabulary, and one of 39 million that keeps the donor's width and loses
layers, train on WikiText for 200 steps of 4 windows of 256 tokens. It resumes: every finished run is kept in the work
folder, and a run takes about ten minutes of one core. MODELS and DATA as in `benchmarks.real.starts`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.facts import read_facts, write_facts
from benchmarks.pages import cells
from benchmarks.paths import RESULTS
from benchmarks.real.models import TARGETS, RealTarget, target_folder, training_text
from headstart.compare.compare import compare
from headstart.config import CompareConfig
from headstart.report.scores import REFERENCE
from zoo.add import add
from zoo.donors.layout import MANIFEST

FACTS, PAGE = RESULTS / "real_trainings.json", RESULTS / "real_trainings.md"
DONOR = "smollm2"
STEPS, BATCH_SIZE, SEQUENCE, WINDOWS = 200, 4, 256, 32
LRS, SCALES, SEEDS = (1e-3, 4e-3), (1.0, 2.0), (0, 1, 2)
BEFORE = 50  # steps after which losses are shown as well
METHODS: dict[str, tuple[RealTarget, tuple[str, ...]]] = {
    "smaller": (
        next(target for target in TARGETS[DONOR] if target.name == "smaller"),
        (
            "normal", "weight-selection", "pruning", "pruning:compensate=true", "subcloning", "sliced",
            "sliced:axes=weights", "row-column",
        ),
    ),
    "shallow": (RealTarget("shallow", "576 wide, 3 of 30 layers", {"layers": 3}), ("pruning",)),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/real"))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread; they change no result")
    given = parser.parse_args()
    zoo = given.work / "zoo"
    if not (zoo / MANIFEST).exists():
        add([str(given.models / DONOR)], zoo, quiet=True)
    facts = read_facts(FACTS)
    for name, (target, methods) in METHODS.items():
        results = compare(
            CompareConfig(
                target=target_folder(given.models, DONOR, target, given.work),
                methods=methods,
                corpus=training_text(given.data, given.work),
                out=given.work / "trainings" / name,
                zoo=zoo,
                steps=STEPS,
                seeds=SEEDS[: given.seeds],
                lrs=LRS,
                default_scales=SCALES,
                tuning_seeds=1,
                batch_size=BATCH_SIZE,
                sequence=SEQUENCE,
                windows=WINDOWS,
                keep_going=True,
                device="cpu",
                workers=given.workers,
            ),
            command="python -m benchmarks.real.trainings",
        )
        facts[name] = {"methods": results["methods"], "refused": results.get("refused", {})}
        write_facts(FACTS, facts)
    PAGE.write_text(page(facts))


def page(facts: dict[str, Any]) -> str:
    """The page. facts: target -> {methods: what `headstart compare` reports of each, refused: its messages}."""
    sections = []
    for name, (target, _) in METHODS.items():
        if name in facts:
            rows = [method_row(label, entry) for label, entry in facts[name]["methods"].items()]
            refused = facts[name]["refused"].items()
            rows += [[f"`{label}`", f"refused: {why}", *[cells.MISSING] * 4] for label, why in refused]
            heads = ["method", "lr", "seeds", "step 0", f"{BEFORE} steps", f"{STEPS} steps"]
            sections.append(f"## {name}: {target.about}\n\n{cells.table(heads, rows)}")
    rates = " and ".join(f"{lr:g}" for lr in LRS)
    return f"""# Training from a real donor

Written by `python -m benchmarks.real.trainings`. Each method fills a target from SmolLM2 135M. All train on WikiText
for {STEPS} steps of {BATCH_SIZE} windows of {SEQUENCE} tokens, with one schedule; losses are nats per token of held-out
text. The learning rate is the better of {rates} on the first seed, that of the default also over its scales
{list(SCALES)}. Methods that take a text read the beginning of the corpus. After {BEFORE} steps the rate is still high.

{(chr(10) * 2).join(sections)}
"""


def method_row(label: str, entry: dict[str, Any]) -> list[str]:
    curves = entry["curves"]
    scale = f", scale {entry['scale']:g}" if label == REFERENCE else ""
    points = [[loss_at(curve, step) for curve in curves] for step in (0, BEFORE, STEPS)]
    return [f"`{label}`", f"{entry['lr']:g}{scale}", str(len(curves)), *(f"{sum(p) / len(p):.3f}" for p in points)]


def loss_at(curve: dict[str, Any], step: int) -> float:
    """The loss of a curve at a step, interpolated between measurements."""
    import numpy as np

    return float(np.interp(step, curve["steps"], curve["losses"]))


if __name__ == "__main__":
    main()
