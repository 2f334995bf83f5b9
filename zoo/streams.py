"""Random streams that depend on a seed and a name alone, not on the order of use or the number of processes."""

from __future__ import annotations

import hashlib

import torch


def stream_seed(seed: int, name: str) -> int:
    """A 63-bit seed for the stream `name` of a run seeded with `seed` (BLAKE2b of both)."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(seed: int, name: str) -> torch.Generator:
    """A CPU generator for the stream `name`. Draw on the CPU and move the result: every device gets the same."""
    return torch.Generator("cpu").manual_seed(stream_seed(seed, name))
