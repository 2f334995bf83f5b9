"""One skeleton for every training run in a folder: claim the folder, restore, loop, checkpoint, publish."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor

from zoo.checkpoints.atomic import disk_errors, is_unused, sync, sync_tree, work_folder
from zoo.checkpoints.files import read_json
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.limits import MAX_RECORD
from zoo.sampler import SAME_MACHINE
from zoo.sandbox import library_errors
from zoo.training.resumable import STATE_FILE, load_state, resumable_steps, save_state

REPRODUCIBLE = f"{SAME_MACHINE}; on other machines other weights, because training amplifies rounding errors"
STAGING_FOLDER = ".finished"  # inside the run's folder: where the finished files are put together


@dataclass(frozen=True)
class Run:
    """One training run. `record_file` is written last: a folder that holds it is complete."""

    out: Path
    identity: str  # a hash of all that the result depends on
    steps: int
    save_every: int  # steps
    record_file: str  # JSON, with the identity under the key `identity`
    label: str  # of the progress bar, and in messages
    resume: bool = False
    quiet: bool = False


class Trainer(Protocol):
    """What is trained, and how. The skeleton needs no more of it."""

    accelerator: Accelerator

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name."""

    def restore(self, state: dict[str, Tensor], step: int) -> None:
        """The inverse of `state`, taken before `step`."""

    def train_step(self, step: int) -> None:
        """Makes one update. A function of the state and the number of the step, counted from 0."""

    def progress_note(self) -> str:
        """The text beside the progress bar."""

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the trained model to `folder` and returns its record."""


def train_in_folder(run: Run, prepare: Callable[[], Trainer]) -> Path:
    """Trains in `run.out` and returns that folder. `prepare` is called only if there is something to train.

    Ctrl-C and every `save_every` steps save the state; with `resume` a run continues from it to the same bytes. Every
    process makes the same steps, so their number does not change the result; the main one writes.

    Raises UserError if the folder is in use (without `resume`), or holds a run with another identity."""
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("RANK", "0")) == 0:  # the process that writes
            stack.enter_context(work_folder(run.out, lambda: finished_identity(run)))
        finished = finished_identity(run)
        if finished is not None and finished != run.identity:
            raise UserError(
                f"{run.out}: holds a finished {run.label} run with other settings or another zoo; give another --out"
            )
        if finished is None:
            _train(run, prepare)
        else:  # a process that was killed at the very end left them
            (run.out / STATE_FILE).unlink(missing_ok=True)
            shutil.rmtree(run.out / STAGING_FOLDER, ignore_errors=True)
    return run.out


def _train(run: Run, prepare: Callable[[], Trainer]) -> None:
    """Restores, trains and publishes a run that is not finished."""
    trainer = prepare()
    is_main, state_file, start = trainer.accelerator.is_main_process, run.out / STATE_FILE, 0
    if state_file.is_file():
        state, start = load_state(state_file, run.identity, run.steps)
        with library_errors(f"{state_file}: a run cannot be resumed from it", "remove it to start again"):
            trainer.restore(state, start)

    def save(step: int) -> None:
        if is_main:
            save_state(state_file, trainer.state(), step, run.identity)

    quiet = run.quiet or not is_main
    steps = resumable_steps(start, run.steps, run.save_every, save, run.label, quiet, trainer.progress_note)
    with contextlib.closing(steps):
        for step in steps:
            trainer.train_step(step)
    if is_main:
        _publish(run, trainer)
        state_file.unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()


def run_identity(config: Any, zoo: Zoo, *more: str) -> str:
    """A hash of what a run is a function of: its config (a dataclass), the donors of its zoo, and more."""
    known = [asdict(config), sorted(d.sha256 for d in zoo.donors), *more]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def finished_identity(run: Run) -> str | None:
    """The identity in the record of a finished run in the run's folder, None where no run is finished there.

    Raises UserError for a file, for a folder in use (without `resume`), and for one that holds no run."""
    out = run.out
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder with --out")
    if is_unused(out):
        return None
    if not run.resume:
        raise UserError(f"{out}: exists and is not empty; give another --out, or --resume to continue")
    if (out / run.record_file).is_file():
        return str(read_json(out / run.record_file, MAX_RECORD).get("identity"))
    if not (out / STATE_FILE).is_file() and not (out / STAGING_FOLDER).is_dir():
        raise UserError(f"{out}: holds no run to resume; give another --out")
    return None


def _publish(run: Run, trainer: Trainer) -> None:
    """Writes the result aside, then moves it into the run's folder, the record last."""
    staging = run.out / STAGING_FOLDER
    with disk_errors(run.out):
        shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed here
        record = trainer.save(staging) | {"reproducible": REPRODUCIBLE}
        (staging / run.record_file).write_text(json.dumps(record, indent=2) + "\n")
        sync_tree(staging)
        for path in sorted(staging.iterdir(), key=lambda p: (p.name == run.record_file, p.name)):
            target = run.out / path.name
            if target.is_dir():
                shutil.rmtree(target)
            if path.name == run.record_file:
                sync(run.out)  # everything else is on the disk before the record that declares it complete
            os.replace(path, target)
        sync(run.out)
        staging.rmdir()
