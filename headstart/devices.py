"""Names of devices and dtypes, as torch understands them."""

from __future__ import annotations

import torch

from headstart.config import DTYPE_NAMES
from zoo.errors import UserError, unknown


def torch_device(name: str) -> str:
    """The device for `auto`, `cpu`, `cuda` or `mps`. `auto` is cuda where torch sees it, else cpu: Apple's mps lacks
    float64, so it is used only when it is named. Raises UserError where the device does not exist here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use cpu or auto")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no Apple GPU here; use cpu or auto")
    return name


def torch_dtype(name: str) -> torch.dtype:
    """The dtype for float32, bfloat16 or float16, with or without `torch.` before it. Raises UserError for others."""
    short = name.removeprefix("torch.")
    if short not in DTYPE_NAMES:
        raise unknown("dtype", short, DTYPE_NAMES)
    return getattr(torch, short)
