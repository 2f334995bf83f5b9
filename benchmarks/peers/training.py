"""Resumable training with a budget of steps or of seconds, shared by both peers."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from autoencoder.loading import local_folder
from benchmarks.peers.weights import COORDINATES
from zoo.checkpoints.atomic import replace_file
from zoo.checkpoints.files import read_json
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.training.resumable import interruptible, load_state, restore_training, save_state, training_tensors

RECORD = "peer.json"  # record of a finished peer, written last
SAVE_SECONDS = 20.0


@dataclass(frozen=True)
class Budget:
    """Exactly one of the two. With `steps`, a run is a function of its seed. With `seconds`, measured by `clock`, it
    takes as many steps as the machine makes (time before an interruption counts), and its schedule follows the clock.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise UserError("a peer is trained for --steps or for --seconds; give exactly one of the two")
        if min(self.steps or 1, self.seconds or 1) <= 0:
            raise UserError("a peer's budget is not positive; give at least one step, or more than 0 seconds")

    def part(self, share: float) -> Budget:
        if self.steps is not None:
            return Budget(steps=max(1, round(share * self.steps)))
        assert self.seconds is not None
        return Budget(seconds=share * self.seconds)

    def spent(self, step: int, elapsed: float) -> float:
        """The share of the budget that is used, at most 1."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.seconds is not None
        return min(1.0, elapsed / self.seconds)


def clock(device: torch.device | str = "cpu") -> float:
    """Seconds of wall-clock. On the CPU with one thread: seconds of that thread's work, which other processes do not
    change."""
    alone = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


@dataclass(frozen=True)
class TrainingOutcome:
    steps: int
    seconds: float
    losses: tuple[float, ...]  # mean over the first and the last tenth of the steps

    def to_json(self) -> dict[str, Any]:
        return {"steps": self.steps, "seconds": self.seconds, "loss": list(self.losses)}


def train_resumable(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[int], Tensor],
    rate: Callable[[float], float],
    budget: Budget,
    state: Path,
    identity: str,
    label: str,
    quiet: bool = True,
    after: Callable[[], None] = lambda: None,
    extra: Callable[[], dict[str, Tensor]] = dict,
    restore: Callable[[Mapping[str, Tensor], int], None] = lambda tensors, step: None,
) -> TrainingOutcome:
    """Trains `model` in place, and continues from `state` if the file exists (UserError if it is of another run).

    loss(step): a function of seed and step; rate(spent): the learning rate; after: runs after every update; extra and
    restore: save and load more tensors of the state. Ctrl-C saves and raises KeyboardInterrupt."""
    step, elapsed = 0, 0.0
    history: list[float] = []
    if state.is_file():
        tensors, step = load_state(state, identity, budget.steps or sys.maxsize)
        restore_training(tensors, model, optimizer)
        restore(tensors, step)
        elapsed, history = float(tensors["elapsed"]), tensors["history"].tolist()

    def save() -> None:
        kept = {"elapsed": torch.tensor(elapsed, dtype=torch.float64), "history": torch.tensor(history)}
        save_state(state, training_tensors(model, optimizer) | extra() | kept, step, identity)

    saved, device = elapsed, next(model.parameters()).device
    with interruptible() as interrupted, tqdm(total=100, desc=label, unit="%", disable=quiet) as bar:
        while (spent := budget.spent(step, elapsed)) < 1.0:
            if interrupted() or elapsed - saved > SAVE_SECONDS:
                saved = elapsed
                save()
                if interrupted():
                    raise KeyboardInterrupt
            began = clock(device)
            for group in optimizer.param_groups:
                group["lr"] = rate(spent)
            value = loss(step)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            after()
            history.append(float(value.detach()))
            step, elapsed = step + 1, elapsed + clock(device) - began
            bar.update(round(100 * budget.spent(step, elapsed)) - bar.n)
    save()
    tenth = max(1, len(history) // 10)
    means = tuple(float(torch.tensor(part).mean()) for part in (history[:tenth], history[-tenth:]))
    return TrainingOutcome(step, elapsed, means)


def peer_identity(peer: str, settings: Mapping[str, Any], zoo: Zoo) -> str:
    """Hash of everything that a run depends on."""
    known = [peer, dict(settings), sorted(d.sha256 for d in zoo.donors)]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def claim_folder(out: Path, resume: bool, identity: str) -> bool:
    """Makes the folder of a run; True if the run is finished. UserError if the folder is not empty and `resume` is
    False, or if it holds a peer of other settings."""
    if out.is_dir() and any(out.iterdir()):
        if not resume:
            raise UserError(f"{out}: is not empty; give another folder, or --resume")
        if (out / RECORD).is_file():
            if read_json(out / RECORD).get("identity") != identity:
                raise UserError(f"{out}: holds a peer of other settings or another zoo; give another folder")
            return True
    out.mkdir(parents=True, exist_ok=True)
    return False


def write_record(out: Path, content: Mapping[str, Any]) -> None:
    replace_file(out / RECORD, (json.dumps(content, indent=1) + "\n").encode())


def open_record(model: str | None, peer: str) -> tuple[Path, dict[str, Any]]:
    """The folder and the record of a trained peer. UserError without one."""
    how = f"train one with `python -m benchmarks.peers.{peer}`"
    if model is None:
        raise UserError(f"{peer}: needs a trained model; give --model DIR ({how})")
    folder = local_folder(model, f"a trained {peer}")
    if not (folder / RECORD).is_file():
        raise UserError(f"{folder}: holds no finished {peer}; {how}")
    content = read_json(folder / RECORD)
    if content.get("peer") != peer:
        raise UserError(f"{folder}: holds {content.get('peer')}, not {peer}; {how}")
    return folder, content


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def widest_within(count: Callable[[int], int], budget: int, step: int, least: int) -> int:
    """The largest multiple of `step` from `least` on whose parameter count is within the budget."""
    if count(least) > budget:
        raise UserError(f"{budget} parameters are too few; the smallest model has {count(least)}, so give more")
    low, high = 1, 2  # in steps above the least; the count grows with the width
    while count(least + high * step) <= budget:
        low, high = high, 2 * high
    low = 0 if count(least + low * step) > budget else low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(least + middle * step) <= budget else (low, middle)
    return least + low * step


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `train` that both peers have."""
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--parameters", type=int, default=2_500_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--coordinates", choices=COORDINATES, default=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, default=argparse.SUPPRESS)
    parser.add_argument("--lr", type=float, default=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true")
