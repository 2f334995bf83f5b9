"""The zoos, generators and controls of the generator's benchmark, trained into a work folder once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.generator.tasks import GROWN, LONGER, TEXTS, WITHOUT
from benchmarks.head_start.models import RECORDS, train_models, work_paths
from benchmarks.head_start.tasks import UNSEEN_TARGETS, corpus_file, donor_recipes
from zoo.add import add
from zoo.checkpoints.atomic import new_folder
from zoo.donors.donor import Donor
from zoo.donors.layout import MANIFEST, donor_folder
from zoo.donors.zoo import Zoo
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.training.corpora import EMBEDDED_TEXTS, corpus_name, split_held_out
from zoo.training.embedded_zoo import train_zoo
from zoo.training.loop import TrainingConfig, evaluate, reproducible, train_steps
from zoo.training.recipes import SPECIALISTS
from zoo.units.aligned import is_last_checkpoint, recorded_loss
from zoo.vocabulary import byte_tokens, save_byte_tokenizer

BATCH_SIZE, SEQUENCE = 16, 64  # of a control's training, as the specialists and the generator have
LONGER_LRS = (1e-3, 3e-3)  # of a control's training; the better for the widest donor is kept
WINDOWS = 128  # held-out windows


def zoo_folder(work: Path, zoo: str, data: Path | None) -> Path:
    """The folder of a zoo; trains what is missing."""
    folder = work / zoo / "zoo"
    if zoo.endswith(LONGER):
        _train_longer(work, zoo.removesuffix(LONGER), folder, data)
    elif zoo.startswith(WITHOUT):
        _leave_out(work, zoo.removeprefix(WITHOUT), folder, data)
    elif not folder.exists():
        train_zoo(folder, donor_recipes())
    return folder


def text_files(work: Path, data: Path | None) -> dict[str, Path]:
    """{name: file} of the texts that do not come with Python."""
    return {name: corpus_file(work, name, data) for name in TEXTS if name not in EMBEDDED_TEXTS}


def _leave_out(work: Path, text: str, folder: Path, data: Path | None) -> None:
    """Adds all specialists but those of `text` to the zoo at `folder`."""
    if (folder / MANIFEST).exists():
        return
    whole = work / SPECIALISTS / "zoo"
    train_zoo(whole, SPECIALISTS, corpora=text_files(work, data))
    kept = [donor for donor in Zoo.open(whole).donors if corpus_name(donor.facts) != text]
    add([str(donor_folder(whole, donor.name)) for donor in kept], folder, quiet=True)


def train_generator(work: Path, zoo: str, data: Path | None) -> dict[str, Path]:
    """{zoo, autoencoder, model}: the folders of a zoo and of the generator trained on it with default settings."""
    donors = zoo_folder(work, zoo, data)
    corpora = {}
    if zoo.startswith(WITHOUT):
        corpora = {n: str(p) for n, p in text_files(work, data).items() if zoo != f"{WITHOUT}{n}"}
    return train_models(work_paths(work, zoo), donors, corpora)


def generator_flops(paths: dict[str, Path]) -> float:
    """The floating-point operations of the two trainings, from their reports."""
    return sum(json.loads((paths[key] / name).read_text())["flops"] for key, name in RECORDS.items())


def _train_longer(work: Path, zoo: str, folder: Path, data: Path | None) -> None:
    """The control: the best donors of a zoo, each trained for as many FLOPs as the generator, in a zoo of their own."""
    if (folder / MANIFEST).exists():
        return
    paths = train_generator(work, zoo, data)
    flops = generator_flops(paths)
    staging = folder.parent / "trained"
    lrs: tuple[float, ...] = LONGER_LRS
    for donor in longest_donors(Zoo.open(paths["zoo"])):
        to = staging / f"{donor.name}{LONGER}"
        if not to.exists():
            training = LongerTraining(_training_texts(work, zoo, data), flops, lrs)
            _train_donor(donor_folder(paths["zoo"], donor.name), donor.parameters, training, to)
        lrs = (json.loads((to / "facts.json").read_text())["lr"],)
    add([str(path) for path in sorted(staging.iterdir())], folder, quiet=True)


def longest_donors(zoo: Zoo) -> list[Donor]:
    """The donors that the control of some target needs, with their last checkpoint."""
    final = last_checkpoints(zoo)
    chosen = {d.name: d for d in (control_donor(final, target) for target in UNSEEN_TARGETS)}
    return list(chosen.values())


def last_checkpoints(zoo: Zoo) -> list[Donor]:
    """The donors without early checkpoints of their runs."""
    return [d for d in zoo.donors if is_last_checkpoint(d.facts)]


def control_donor(donors: Sequence[Donor], target: str) -> Donor:
    """The donor that the control carries to a target: the widest, or, where the target is grown, the one with the
    lowest loss of those that fit inside it."""

    def loss(donor: Donor) -> float:
        found = recorded_loss(donor.facts)
        return float("inf") if found is None else found

    by_loss = sorted(donors, key=lambda d: (loss(d), d.name))
    if target not in GROWN:
        return max(by_loss, key=lambda d: d.blueprint.metadata.width)
    size = shape_of(UNSEEN_TARGETS[target])

    def fits(shape: Metadata) -> bool:
        return shape.width <= size.width and shape.layers <= size.layers

    return next(d for d in by_loss if fits(d.blueprint.metadata))


def shape_of(config: Mapping[str, Any]) -> Metadata:
    """The shape that a config describes."""
    metadata = Blueprint.from_config(dict(config)).metadata
    assert metadata is not None
    return metadata


def _training_texts(work: Path, zoo: str, data: Path | None) -> dict[str, bytes]:
    """The texts that the donors of a zoo learned from, whole, with their held-out parts."""
    if not zoo.startswith(WITHOUT):
        return {"reference": EMBEDDED_TEXTS["reference"]()}
    files = text_files(work, data)
    names = [name for name in TEXTS if zoo != f"{WITHOUT}{name}"]
    return {n: files[n].read_bytes() if n in files else EMBEDDED_TEXTS[n]() for n in names}


@dataclass(frozen=True)
class LongerTraining:
    """How a donor is trained on: texts by name, operations, and the learning rates that are tried."""

    texts: dict[str, bytes]
    flops: float
    lrs: tuple[float, ...]


def _train_donor(folder: Path, parameters: int, training: LongerTraining, to: Path) -> None:
    """Trains a donor on, with the best of some learning rates, and writes it as a checkpoint."""
    texts = training.texts
    parts = {name: tuple(byte_tokens(part) for part in split_held_out(text)) for name, text in texts.items()}
    least = min(len(learned) for learned, _ in parts.values())
    training_text = torch.cat([learned[:least] for learned, _ in parts.values()])
    held_out = torch.cat([held[: least // 9] for _, held in parts.values()])
    steps = round(training.flops / (6 * parameters * BATCH_SIZE * SEQUENCE))
    best: tuple[float, Any, float] | None = None
    for lr in training.lrs:
        model = _load(folder)
        config = TrainingConfig(steps, lr, BATCH_SIZE, SEQUENCE)
        with reproducible():
            for _ in train_steps(model, training_text, config):
                pass
            loss = evaluate(model, held_out, SEQUENCE, limit=WINDOWS)
        print(f"{to.name}: {steps} steps at {lr:g}: {loss:.3f}", flush=True)
        if best is None or loss < best[0]:
            best = loss, model, lr
    assert best is not None
    facts = {"loss": round(best[0], 5), "steps": steps, "lr": best[2], "corpus": " and ".join(sorted(texts))}
    with new_folder(to) as partial:
        best[1].save_pretrained(partial)
        save_byte_tokenizer(partial)
        (partial / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
