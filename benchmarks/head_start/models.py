"""The zoos of the benchmark, and autoencoder and pipeline trained on each, in a work folder; each is trained once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.head_start.tasks import DIFFUSION_STEPS, LEARNED_DONORS, OTHER_DONORS, donor_recipes
from zoo.checkpoints.atomic import replace_file

RECORDS = {"autoencoder": "report.json", "model": "headstart.json"}  # what a finished training holds


def work_paths(work: Path, zoo: str, steps: int = DIFFUSION_STEPS) -> dict[str, Path]:
    """{zoo, autoencoder, model}: folders of the donors and of our models trained on them."""
    folder = work / zoo
    model = "diffusion" if steps == DIFFUSION_STEPS else f"diffusion-{steps}"
    return {"zoo": folder / "zoo", "autoencoder": folder / "autoencoder", "model": folder / model}


def prepare_models(work: Path, zoo: str, data: Path | None, steps: int = DIFFUSION_STEPS) -> dict[str, Path]:
    """The `work_paths`, with donors, and autoencoder and diffusion trained on them; what an earlier call made is kept.

    Both learn from the donors' own text, which the embedded zoo names. The real donors name none, so that they write
    the text themselves: the given one would hold what is later held out."""
    from zoo.add import add
    from zoo.training.embedded_zoo import train_zoo

    to = work_paths(work, zoo, steps)
    if zoo == "embedded":
        train_zoo(to["zoo"], donor_recipes())
        return train_models(to, to["zoo"], {}, steps)
    if data is None:
        raise SystemExit("the real donors are in the data folder; give it with --data DIR")
    learned = work / zoo / "learned"
    add([str(data / "models" / name) for name in LEARNED_DONORS], learned, quiet=True)
    add([str(data / "models" / name) for name in LEARNED_DONORS + OTHER_DONORS], to["zoo"], quiet=True)
    return train_models(to, learned, {}, steps)


def train_models(
    to: dict[str, Path], donors: Path, corpora: Mapping[str, str], steps: int = DIFFUSION_STEPS
) -> dict[str, Path]:
    """Trains what is missing of `to` on the zoo `donors`, with default settings; returns `to`."""
    from autoencoder.training import AutoencoderTrainConfig, train_autoencoder
    from diffusion.training import DiffusionTrainConfig, train_diffusion

    coder, model = to["autoencoder"], to["model"]
    config = DiffusionTrainConfig(steps=steps, corpora=corpora)
    same: dict[str, Any] = {"resume": True, "device": "cpu"}
    _timed(coder, lambda: train_autoencoder(AutoencoderTrainConfig(corpora=corpora), donors, coder, **same))
    _timed(model, lambda: train_diffusion(config, donors, coder, model, **same))
    return to


def _timed(folder: Path, train: Callable[[], Any]) -> None:
    """Trains into `folder` and writes the CPU seconds beside it; an interrupted training adds to them."""
    if any((folder / name).exists() for name in RECORDS.values()):
        return
    file, began = _seconds_file(folder), time.process_time()
    before = float(file.read_text()) if file.exists() else 0.0
    try:
        train()
    finally:
        replace_file(file, f"{before + time.process_time() - began:.0f}\n".encode())


def _seconds_file(trained: Path) -> Path:
    return trained.with_name(f"seconds-{trained.name}.txt")


def training_seconds(paths: Mapping[str, Path]) -> list[float] | None:
    """CPU seconds that the trainings of autoencoder and diffusion took, or None where they are not known."""
    files = [_seconds_file(paths[key]) for key in RECORDS]
    return [float(file.read_text()) for file in files] if all(file.is_file() for file in files) else None


def total_seconds(work: Path, zoo: str) -> float | None:
    """CPU seconds of both trainings on a zoo, or None where they are not known."""
    seconds = training_seconds(work_paths(work, zoo))
    return None if seconds is None else sum(seconds)
