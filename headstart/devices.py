"""Names of devices and dtypes, as torch understands them."""

from __future__ import annotations

import torch

from headstart.config import DTYPE_ADVICE, DTYPE_NAMES
from zoo.errors import UserError
from zoo.parallel.processes import local_count, local_index


def torch_device(name: str) -> str:
    """The device for `auto`, `cpu`, `cuda` or `mps`.

    `auto` is cuda where torch sees it, else cpu: Apple's mps lacks float64, so it is used only when it is named. Of
    several processes on a machine, each takes a GPU of its own, if there are as many. Raises UserError where the device
    does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use cpu or auto")
    if name == "cuda" and local_count() > 1:
        torch.cuda.set_device(local_index() % torch.cuda.device_count())
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no Apple GPU here; use cpu or auto")
    return name


def torch_dtype(name: str, where: str = "--dtype") -> torch.dtype:
    """The dtype for float32, bfloat16 or float16, with or without `torch.` before it.

    UserError for others. It says `where` the name comes from.
    """
    short = name.removeprefix("torch.")
    if short not in DTYPE_NAMES:
        raise UserError(f"{where}: dtype {short!r} cannot be written; {DTYPE_ADVICE}")
    return getattr(torch, short)
