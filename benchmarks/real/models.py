"""The real donors, the targets that are made from them, and the text on which what is written is judged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.vocabulary.pairs import WIKIPEDIA, split_text
from zoo.checkpoints.files import read_json
from zoo.limits import MAX_CONFIG
from zoo.targets.blueprint import Blueprint
from zoo.targets.resizing import resized_config
from zoo.training.loop import next_token_loss, spread_windows
from zoo.vocabulary import encode_text

TEXT = WIKIPEDIA  # its end is held out: no method reads it
WINDOWS, SEQUENCE = 16, 256  # 4,096 predicted tokens


@dataclass(frozen=True)
class RealDonor:
    """A really trained model in a folder of its own, with its tokenizer."""

    name: str  # of its folder
    title: str
    bos: int | None = None  # the token before each window, for a model that learned to expect one


@dataclass(frozen=True)
class RealTarget:
    """A shape that differs from its donor's in some sizes."""

    name: str
    about: str
    sizes: Mapping[str, Any] = field(default_factory=dict)  # of Metadata


DONORS = {
    "smollm2": RealDonor("smollm2", "SmolLM2 135M"),
    "gemma3": RealDonor("gemma3", "Gemma 3 270M", bos=2),
}
SMALLER = {"width": 384, "layers": 16, "heads": 6, "kv_heads": 2, "ffn": 1024}
TARGETS: dict[str, tuple[RealTarget, ...]] = {
    "smollm2": (
        RealTarget("own", "its own shape: 576 wide, 30 layers, 9 heads over 3, tied"),
        RealTarget(
            "smaller", "384 wide, 16 layers, 6 heads over 2, tied",
            SMALLER,
        ),
        RealTarget(
            "untied", "the same with a head of its own",
            {**SMALLER, "tied": False},
        ),
        RealTarget("shallower", "24 of 30 layers", {"layers": 24}),
        RealTarget("gqa", "9 heads, keys and values of their own", {"kv_heads": 9}),
        RealTarget("deeper", "40 layers", {"layers": 40}),
        RealTarget("wider", "1152 wide, 18 heads over 6", {"width": 1152, "heads": 18, "kv_heads": 6, "ffn": 3072}),
    ),
    "gemma3": (
        RealTarget("own", "its own shape: 640 wide, 18 layers, 4 heads over 1, tied"),
        RealTarget(
            "smaller", "384 wide, 12 layers, 2 heads over 1, tied",
            {"width": 384, "layers": 12, "heads": 2, "ffn": 1216},
        ),
        RealTarget("shallower", "15 of 18 layers", {"layers": 15}),
        RealTarget("deeper", "24 layers", {"layers": 24}),
    ),
}  # fmt: skip


def donor_config(models: Path, donor: str) -> dict[str, Any]:
    return read_json(models / donor / "config.json", MAX_CONFIG)


def target_config(models: Path, donor: str, target: RealTarget) -> dict[str, Any]:
    """The donor's config at the target's sizes, in float32."""
    config = donor_config(models, donor)
    shape = Blueprint.from_config(config).metadata
    assert shape is not None
    resized = config if not target.sizes else resized_config(config, replace(shape, **target.sizes))
    return {**resized, "dtype": "float32"}


def target_folder(models: Path, donor: str, target: RealTarget, work: Path) -> Path:
    """A folder with the target's config and the donor's tokenizer, as a user would have it."""
    folder = work / "targets" / f"{donor}-{target.name}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(target_config(models, donor, target), indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((models / donor / name).read_bytes())
    return folder


def training_text(data: Path, work: Path) -> Path:
    """A file with the part of the text that methods may read."""
    path = work / "training.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(split_text(data / "corpora" / TEXT)[0])
    return path


def held_out_windows(data: Path, models: Path, donor: str) -> Tensor:
    """Windows of held-out text in a donor's tokens, int64 [WINDOWS, SEQUENCE + 1]."""
    held_out = split_text(data / "corpora" / TEXT)[1]
    tokens = encode_text(held_out.decode(errors="ignore"), models / donor)
    bos = DONORS[donor].bos
    if bos is None:
        return spread_windows(tokens, WINDOWS, SEQUENCE)
    return F.pad(spread_windows(tokens, WINDOWS, SEQUENCE - 1), (1, 0), value=bos)  # the start takes a place


@torch.no_grad()
def loss_of_folder(folder: Path, windows: Tensor) -> float:
    """Nats per token of a checkpoint on windows int64 [B, S+1], float32."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return sum(float(next_token_loss(model, window)) * len(window) for window in windows.split(2)) / len(windows)
