"""The state of an unfinished training run on disk, and steps that Ctrl-C can interrupt.

A state is tensors and a step number in one safetensors file. It is written whole or not at all."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from zoo.checkpoints.atomic import replacement_file
from zoo.checkpoints.headers import read_header
from zoo.errors import UserError
from zoo.sandbox import library_errors

STATE_FILE = "training.safetensors"
ADAM_STATE = {"step", "exp_avg", "exp_avg_sq"}  # what AdamW keeps of each parameter
NOTE_EVERY = 50  # steps between two updates of the note beside the progress bar


def save_state(path: Path, tensors: dict[str, Tensor], step: int, identity: str) -> None:
    """Writes `tensors` with the next step and the identity of their run, in place of an older state."""
    with replacement_file(path) as partial:
        on_cpu = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
        save_file(on_cpu, partial, {"step": str(step), "recipe": identity})


def load_state(path: Path, identity: str, steps: int) -> tuple[dict[str, Tensor], int]:
    """The inverse of `save_state`. Raises UserError if the state is damaged or belongs to another run of `steps`."""
    read_header(path)  # checks that it is a regular file, and all that its header states
    with library_errors(f"{path}: a run cannot be resumed from it", "remove it to start again"):
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            if metadata.get("recipe") != identity:
                raise UserError(
                    f"{path}: is the state of a run with other settings or another zoo; remove it, or use its settings"
                )
            tensors, step = {k: f.get_tensor(k) for k in f.keys()}, int(metadata["step"])  # noqa: SIM118
        if not 0 <= step <= steps:
            raise ValueError(f"its step {step} is not one of {steps}")
    return tensors, step


def training_tensors(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """The parameters of a model and the moments of its optimizer, by name."""
    moments = optimizer.state_dict()["state"]
    return {f"model.{name}": p for name, p in model.named_parameters()} | {
        f"moment.{i}.{name}": t for i, entry in moments.items() for name, t in entry.items()
    }


@torch.no_grad()
def restore_training(tensors: dict[str, Tensor], model: nn.Module, optimizer: Any) -> None:
    """The inverse of `training_tensors`, in place; other tensors are ignored. ValueError for another model's state."""
    for name, p in model.named_parameters():
        p.copy_(stored_tensor(tensors, f"model.{name}", p))
    moments: dict[int, dict[str, Tensor]] = {}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for key in tensors:
        if key.startswith("moment."):
            _, index, name = key.split(".", 2)
            like = torch.zeros(()) if name == "step" else trained[int(index)]
            moments.setdefault(int(index), {})[name] = stored_tensor(tensors, key, like)
    if any(found.keys() != ADAM_STATE for found in moments.values()):
        raise ValueError("it lacks moments of the optimizer")
    if not all(0 <= float(found["step"]) < 1e9 for found in moments.values()):  # Adam takes powers of it
        raise ValueError("the optimizer counts an impossible number of steps")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def stored_tensor(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """The tensor of a state called `name`. ValueError where it is missing or has another shape or dtype than `like`."""
    if name not in tensors:
        raise ValueError(f"it lacks the tensor {name!r}")
    tensor = tensors[name]
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(f"{name!r} is {tensor.dtype} {list(tensor.shape)}, not {like.dtype} {list(like.shape)}")
    return tensor


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C or SIGTERM only sets a flag, which the yielded function returns: no step is cut in two.
    A second one interrupts at once. Outside the main thread no handler can be set, and nothing changes."""
    interrupted = False

    def handler(number: int, frame: object) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: interrupted
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def resumable_steps(
    start: int,
    total: int,
    every: int,
    save: Callable[[int], None],
    label: str,
    quiet: bool = False,
    note: Callable[[], str] = lambda: "",
) -> Generator[int, None, None]:
    """Yields the numbers of the steps from `start` on, with a progress bar and `note` beside it. `save(step)` is
    called before every `every`-th step. After Ctrl-C or SIGTERM it is called once more, then comes KeyboardInterrupt.

    Iterate inside `contextlib.closing`, so that an error between two steps resets the signal handler at once."""
    bar = tqdm(total=total, initial=start, desc=label, unit="step", disable=quiet)
    with interruptible() as interrupted, bar:
        for step in range(start, total):
            if interrupted() or (step % every == 0 and step > start):
                save(step)
                if interrupted():
                    raise KeyboardInterrupt
            yield step
            bar.update()
            if (step + 1) % NOTE_EVERY == 0:
                bar.set_postfix_str(note())
