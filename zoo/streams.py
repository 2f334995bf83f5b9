"""Random streams that depend on a seed and a name alone, not on the order of use or the number of processes."""

from __future__ import annotations

import hashlib

import torch


def stream_seed(seed: int, name: str) -> int:
    """A 63-bit seed for the stream `name` of a run seeded with `seed` (BLAKE2b of both)."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(seed: int, name: str, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator for the stream `name`. Draw on its device: `torch.randn(…, generator=g, device=g.device)`.

    Choices (indices, masks) are drawn on the CPU, so that every device makes the same ones. The entries of tensors are
    drawn on a CUDA device where a method computes there, and are other numbers than those of the CPU. Apple's mps draws
    on the CPU, because it lacks float64.
    """
    place = torch.device(device)
    return torch.Generator(place if place.type == "cuda" else "cpu").manual_seed(stream_seed(seed, name))
