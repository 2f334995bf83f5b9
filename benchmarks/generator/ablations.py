"""What each part of the generator's training is worth: one seed, a quarter of the default steps, the zoo of A.

python -m benchmarks.generator.ablations --work DIR [--only NAME …]
    trains one autoencoder for each variant into DIR/ablations and measures the loss at step 0 at the five shapes; the
    first call takes two hours of one core. An interrupted call continues.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from autoencoder import objective, training
from autoencoder.config import AutoencoderTrainConfig
from autoencoder.donors import SHARE, TrainingDonor
from autoencoder.field import Latents, WeightField
from autoencoder.loading import load_autoencoder
from benchmarks.facts import read_facts, write_facts
from benchmarks.generator.inputs import training_and_held_out
from benchmarks.generator.models import shape_of, zoo_folder
from benchmarks.head_start.tasks import UNSEEN_TARGETS
from benchmarks.pages import cells
from benchmarks.paths import RESULTS
from benchmarks.peers import logah
from zoo.donors.zoo import Zoo
from zoo.tensors import Metadata
from zoo.training.corpora import reference_corpus

FACTS = RESULTS / "generator_ablations.json"
STEPS = 1000  # of the third stage
ZOO = "embedded"


@dataclass(frozen=True)
class Variant:
    """A training that differs from the default in one thing."""

    about: str
    changes: dict[str, Any] = field(default_factory=dict)  # of AutoencoderTrainConfig
    random_start: bool = False  # bases and maps do not come from donors
    share: float = SHARE  # of the donors' weights that bases and maps may hold
    hypernetwork: bool = False  # a low-rank one that reads no donor, with as many numbers as the default


VARIANTS = {
    "default": Variant(f"{STEPS} steps of behaviour"),
    "no zoo": Variant("random bases, no reconstruction: behaviour only", {"reconstruction": 1}, random_start=True),
    "no reconstruction": Variant("bases from donors, no reconstruction", {"reconstruction": 1}),
    "no behaviour": Variant("reconstruction only", {"warmup": 0, "steps": 1}),
    "no second stage": Variant("behaviour of everything at once", {"warmup": 0}),
    "quarter size": Variant("a quarter of the bases' and maps' numbers", share=SHARE / 4),
    "half size": Variant("half of these numbers", share=SHARE / 2),
    "double size": Variant("twice these numbers", share=SHARE * 2),
    "250 steps": Variant("a quarter of the steps", {"steps": STEPS // 4}),
    "500 steps": Variant("half of the steps", {"steps": STEPS // 2}),
    "4000 steps": Variant("four times the steps, the default of `headstart train`", {"steps": 4 * STEPS}),
    "distilled": Variant("the donors' logits instead of their text", {"distill": True}),
    "low-rank hypernetwork": Variant("after LoGAH (2405.16287): behaviour only, from no donor", hypernetwork=True),
    "no mixing": Variant("latents of two donors are never mixed", {"mixing": 0.0}),
    "no diversity": Variant("no penalty keeps the latents apart", {"diversity": 0.0}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[])
    a = parser.parse_args()
    chosen = {name: variant for name, variant in VARIANTS.items() if not a.only or name in a.only}
    measure_missing(FACTS, chosen, lambda name, variant: measure(name, variant, a.work))


def measure_missing(path: Path, variants: Mapping[str, Variant], measure: Callable[[str, Variant], Any]) -> None:
    """Measures the variants that a file of figures lacks, and writes each figure when it is there."""
    for name, variant in variants.items():
        facts = read_facts(path)
        if name not in facts:
            facts[name] = measure(name, variant)
            print(name, facts[name], flush=True)
            write_facts(path, facts)


def measure(name: str, variant: Variant, work: Path) -> dict[str, Any]:
    """{stored, losses: {shape: mean over donors of the loss at step 0}, mean latents: {shape: loss}}."""
    zoo = zoo_folder(work, ZOO, None)
    training_text, windows = training_and_held_out(reference_corpus())
    donors, _ = training.read_training_donors(Zoo.open(zoo), True)
    if variant.hypernetwork:
        numbers = int(read_facts(FACTS)["default"]["stored"])
        field: WeightField = logah.train(Zoo.open(zoo), training_text, numbers, logah.LogahTrainConfig(steps=STEPS))
        latents = [logah.no_latents(field.sizes, d.shape.layers) for d in donors]
    else:
        out = work / "ablations" / name.replace(" ", "-")
        config = replace(AutoencoderTrainConfig(steps=STEPS), **variant.changes)
        with changed(variant):
            training.train_autoencoder(config, zoo, out, resume=True, device="cpu")
        model = load_autoencoder(str(out))
        field = model.field
        with torch.no_grad():
            latents = [objective.encode_donor(model, d) for d in donors]
    return {"stored": sum(p.numel() for p in field.parameters())} | start_losses(field, latents, donors, windows)


@torch.no_grad()
def start_losses(
    field: WeightField, latents: Sequence[Latents], donors: Sequence[TrainingDonor], windows: Tensor
) -> dict[str, dict[str, float]]:
    """{losses, mean latents}: the loss of what a field writes at each unseen shape."""
    skeletons = objective.Skeletons(donors)
    deep = max(len(z.blocks) for z in latents)
    blocks = torch.stack([z.at_depth(deep).blocks for z in latents]).mean(0)
    mean = Latents(torch.stack([z.model for z in latents]).mean(0), blocks)
    found: dict[str, dict[str, float]] = {"losses": {}, "mean latents": {}}
    for target, config in UNSEEN_TARGETS.items():
        shape = shape_of(config)

        def loss(z: Latents, shape: Metadata = shape) -> float:
            return float(objective.written_loss(field, z, donors[0], shape, skeletons, windows))

        found["losses"][target] = sum(loss(z) for z in latents) / len(latents)
        found["mean latents"][target] = loss(mean)
    return found


@contextlib.contextmanager
def changed(variant: Variant) -> Iterator[None]:
    """Inside, trainings have the variant's start, size and objective."""
    with contextlib.ExitStack() as stack:
        if variant.random_start:
            stack.enter_context(mock.patch.object(training, "start_field", lambda *args: None))
        if variant.share != SHARE:
            stack.enter_context(mock.patch("autoencoder.donors.SHARE", variant.share))
        yield


def section() -> str:
    """The table of the page; "" before anything is measured."""
    facts = read_facts(FACTS)
    if not facts:
        return ""
    shapes = list(UNSEEN_TARGETS)
    lines = []
    for name, variant in VARIANTS.items():
        if name in facts:
            f = facts[name]
            losses = [f"{f['losses'][s]:.2f} ({f['mean latents'][s]:.2f})" for s in shapes]
            lines.append([name, variant.about, f"{f['stored'] / 1e6:.2f} M", *losses])
    table = cells.table(["variant", "what differs", "numbers", *shapes], lines)
    return (
        "## Ablations\n\nThe loss at step 0 of `autoencoder` on A, the mean over all donors, and in brackets that of "
        f"the zoo's mean latents. One seed, {STEPS} steps of behaviour where nothing else is said.\n\n{table}"
    )


if __name__ == "__main__":
    main()
