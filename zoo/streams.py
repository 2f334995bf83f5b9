"""Random streams: a function of (seed, name) alone, so that order, sharding and processes change nothing."""

from __future__ import annotations

import hashlib

import torch


def stream_seed(seed: int, name: str) -> int:
    """A 63-bit seed for the stream `name` of a run seeded with `seed` (BLAKE2b of both)."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(seed: int, name: str) -> torch.Generator:
    """A CPU generator for the stream `name`. Draws are made on the CPU and moved, so that every device sees the
    same bytes."""
    return torch.Generator("cpu").manual_seed(stream_seed(seed, name))
