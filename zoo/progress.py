"""State of a training run on disk: tensors and a step number, written whole or not at all, never a pickle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.errors import UserError


def save_state(path: Path, tensors: dict[str, Tensor], step: int, recipe: str) -> None:
    """Writes `tensors` with the step and the recipe that they belong to, to a temporary name and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    save_file(
        {k: t.detach().cpu().contiguous() for k, t in tensors.items()}, temporary, {"step": str(step), "recipe": recipe}
    )
    os.replace(temporary, path)


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
