"""What tells texts apart: trainings on the specialists of three texts that differ in one thing; one seed.

python -m benchmarks.generator.text_ablations --work DIR --data DATA
    trains one autoencoder for each variant into DIR/ablations and measures what the field writes from the donors'
    latents; about six minutes of one core each. An interrupted call continues.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from autoencoder import objective, training
from autoencoder.config import AutoencoderTrainConfig
from autoencoder.loading import load_autoencoder
from benchmarks.facts import read_facts
from benchmarks.generator.ablations import STEPS, Variant, changed, measure_missing
from benchmarks.generator.inputs import training_and_held_out
from benchmarks.generator.models import shape_of, text_files, zoo_folder
from benchmarks.generator.tasks import TEXTS, WITHOUT
from benchmarks.generator.text_audit import costs_of_others
from benchmarks.head_start.tasks import UNSEEN_TARGETS, corpus_file
from benchmarks.pages import cells
from benchmarks.paths import RESULTS
from zoo.donors.zoo import Zoo

FACTS = RESULTS / "generator_text_ablations.json"
LEFT_OUT = "shakespeare"
EACH = 4  # one of so many last checkpoints of a text is measured
VARIANTS = {
    "default": Variant(f"{STEPS} steps of behaviour"),
    "texts unsaid": Variant("latents do not learn to say their text", {"text_weight": 0.0}),
    "no mixing": Variant("latents of two texts are never mixed", {"mixing": 0.0}),
    "no early checkpoints": Variant("they are not trained in the third stage", {"early": 0.0}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    given = parser.parse_args()
    measure_missing(FACTS, VARIANTS, lambda name, variant: measure(name, variant, given.work, given.data))


def measure(name: str, variant: Variant, work: Path, data: Path) -> dict[str, dict[str, float]]:
    """{text: {text of the latents: loss}}: the mean loss at step 0 over donors and unseen shapes."""
    zoo = zoo_folder(work, f"{WITHOUT}{LEFT_OUT}", data)
    corpora = {n: str(path) for n, path in text_files(work, data).items() if n != LEFT_OUT}
    config = AutoencoderTrainConfig(**{"steps": STEPS, "corpora": corpora, **variant.changes})
    out = work / "ablations" / f"texts-{name.replace(' ', '-')}"
    with changed(variant):
        training.train_autoencoder(config, zoo, out, resume=True, device="cpu")
    texts = {t: corpus_file(work, t, data).read_bytes() for t in TEXTS if t != LEFT_OUT}
    windows = {t: training_and_held_out(text)[1] for t, text in texts.items()}
    return losses_by_latents(out, Zoo.open(zoo), windows)


@torch.no_grad()
def losses_by_latents(folder: Path, zoo: Zoo, windows: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """{text: {text of the donors whose latents are decoded: loss}} of an autoencoder on windows [B, T+1] of texts."""
    model = load_autoencoder(str(folder))
    donors, _ = training.read_training_donors(zoo, True)
    skeletons = objective.Skeletons(donors)
    found: dict[str, dict[str, list[float]]] = {t: {told: [] for told in windows} for t in windows}
    for told in windows:
        for donor in [d for d in donors if d.is_final and d.corpus == told][::EACH]:
            latents = objective.encode_donor(model, donor)
            for shape in map(shape_of, UNSEEN_TARGETS.values()):
                for text, held_out in windows.items():
                    loss = objective.written_loss(model.field, latents, donor, shape, skeletons, held_out)
                    found[text][told].append(float(loss))
    return {text: {told: mean(losses) for told, losses in by.items()} for text, by in found.items()}


def section() -> str:
    """The table of the page; "" before anything is measured."""
    facts: dict[str, Any] = read_facts(FACTS)
    lines = []
    for name, variant in VARIANTS.items():
        if name in facts:
            own = mean(losses[text] for text, losses in facts[name].items())
            costs = [costs_of_others(losses, text) for text, losses in facts[name].items()]
            another, best = mean(map(mean, costs)), mean(map(min, costs))
            lines.append([name, variant.about, f"{own:.2f}", f"{another:.2f}", f"{best:.2f}"])
    if not lines:
        return ""
    table = cells.table(["variant", "what differs", "own text", "another", "the best other"], lines)
    return (
        f"The specialists without {LEFT_OUT}: the loss at step 0 of what donors' latents write on their own text, mean "
        "over donors, texts and shapes, and how much higher it is with the latents of **another** text (the mean of "
        f"the others) or **the best other** one.\n\n{table}"
    )


if __name__ == "__main__":
    main()
