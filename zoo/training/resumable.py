"""State of a training run on disk: tensors and a step number, written whole or not at all, never a pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from zoo.checkpoints.writer import writing
from zoo.donors.store import Zoo
from zoo.errors import UserError

STATE_FILE = "training.safetensors"  # of an unfinished run
STAGING_FOLDER = ".finished"  # where a finished run is put together
NOTE_EVERY = 50  # steps


def save_state(path: Path, tensors: dict[str, Tensor], step: int, recipe: str) -> None:
    """Writes `tensors` with the step and the recipe that they belong to, to a temporary name and renamed."""
    temporary = path.with_name(path.name + ".part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(tensors, temporary, step, recipe)
        os.replace(temporary, path)


def _save(tensors: dict[str, Tensor], path: Path, step: int, recipe: str) -> None:
    save_file(
        {k: t.detach().cpu().contiguous() for k, t in tensors.items()}, path, {"step": str(step), "recipe": recipe}
    )


def load_state(path: Path, recipe: str) -> tuple[dict[str, Tensor], int]:
    """The inverse of `save_state`. Raises UserError where the state is damaged or belongs to another recipe."""
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            if metadata.get("recipe") != recipe:
                raise UserError(
                    f"{path}: is the state of a run with other settings or another zoo; remove it or use them"
                )
            return {k: f.get_tensor(k) for k in f.keys()}, int(metadata["step"])  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be resumed from ({error}); remove it to start again") from error


def training_tensors(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """The parameters of a model and the moments of its optimizer, by name."""
    moments = optimizer.state_dict()["state"]
    return {f"model.{name}": p for name, p in model.named_parameters()} | {
        f"moment.{i}.{name}": t for i, entry in moments.items() for name, t in entry.items()
    }


@torch.no_grad()
def restore_training(tensors: dict[str, Tensor], model: nn.Module, optimizer: Any) -> None:
    """The inverse of `training_tensors`, in place; other tensors are ignored."""
    for name, p in model.named_parameters():
        p.copy_(tensors[f"model.{name}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("moment."):
            _, index, name = key.split(".", 2)
            moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C only raises a flag, which the yielded function reads: a step is whole or not at all. A second
    Ctrl-C interrupts at once. Outside the main thread, where no handler can be set, nothing changes."""
    asked = False

    def handler(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def resumable_steps(
    start: int,
    total: int,
    every: int,
    save: Callable[[int], None],
    label: str,
    quiet: bool = False,
    note: Callable[[], str] | None = None,
) -> Generator[int, None, None]:
    """The steps of a run from `start` on, with a progress bar and `note` beside it. `save(step)` is called every so
    many steps, before the step, and when Ctrl-C was pressed; then KeyboardInterrupt is raised. Iterate inside
    `contextlib.closing`, so that an error between two steps gives the signal back at once."""
    bar = tqdm(total=total, initial=start, desc=label, unit="step", disable=quiet)
    with interruptible() as interrupted, bar:
        for step in range(start, total):
            if interrupted() or (step % every == 0 and step > start):
                save(step)
                if interrupted():
                    raise KeyboardInterrupt
            yield step
            bar.update()
            if note is not None and (step + 1) % NOTE_EVERY == 0:
                bar.set_postfix_str(note())


def publish(staged: Path, out: Path, last: str) -> None:
    """Moves everything in `staged` into `out`, the file `last` at the end: where it is, the rest is."""
    for path in sorted(staged.iterdir(), key=lambda p: (p.name == last, p.name)):
        target = out / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    staged.rmdir()


def run_identity(recipe: Any, zoo: Zoo, *more: str) -> str:
    """A hash of what a run is a function of: its recipe (a dataclass), the donors of its zoo, and more."""
    known = [asdict(recipe), sorted(d.sha256 for d in zoo.donors), *more]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def claim_folder(out: Path, resume: bool, done: str) -> str | None:
    """Makes `out` a run's folder and returns the identity in its file `done` ({"identity": …}), None where it is not
    done. Raises UserError for a file, or for a folder that holds something and is not to be resumed."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder with --out")
    if out.exists() and any(out.iterdir()):
        if not resume:
            raise UserError(f"{out}: exists and is not empty; give another --out, or --resume to continue")
        if (out / done).is_file():
            return str(json.loads((out / done).read_text()).get("identity"))
        if not (out / STATE_FILE).is_file() and not (out / STAGING_FOLDER).is_dir():
            raise UserError(f"{out}: holds no run to resume; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    return None
