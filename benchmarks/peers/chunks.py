"""D2NWG's chunks: layers flattened and cut to one size, and the conditions that say where a chunk lies.

Letters: N chunks, C chunk size, F features of a condition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers.conditions import MODEL_FEATURES, PERIODS, model_features
from zoo.targets.blueprint import Blueprint
from zoo.tensors import TensorSpec

FEATURES = MODEL_FEATURES + 3 + 2 * 7 + 2 * len(PERIODS)


def flattened_groups(blueprint: Blueprint) -> list[tuple[int, int | None, list[TensorSpec]]]:
    """[(kind, layer, tensors)] of the groups that are flattened together: the tensors stored before the blocks (kind 0:
    the embedding), each block (kind 1), and the tensors after them (kind 2: final norm, head)."""
    found: list[tuple[int, int | None, list[TensorSpec]]] = []
    seen = False
    for spec in blueprint.specs:
        seen = seen or spec.layer is not None
        key = (1, spec.layer) if spec.layer is not None else (2 if seen else 0, None)
        if not found or found[-1][:2] != key:
            found.append((*key, []))
        found[-1][2].append(spec)
    return found


def chunk_counts(blueprint: Blueprint, size: int) -> list[int]:
    """The number of chunks of every group."""
    return [-(-sum(spec.numel for spec in specs) // size) for _, _, specs in flattened_groups(blueprint)]


def to_chunks(blueprint: Blueprint, tensors: Mapping[str, Tensor], size: int) -> Tensor:
    """[N, C]: every group flattened and zero-padded to whole chunks. The inverse is `uncut`."""
    parts = []
    for _, _, specs in flattened_groups(blueprint):
        flat = torch.cat([tensors[spec.name].flatten() for spec in specs])
        parts.append(F.pad(flat, (0, -len(flat) % size)).view(-1, size))
    return torch.cat(parts)


def from_chunks(blueprint: Blueprint, chunks: Tensor) -> dict[str, Tensor]:
    """Chunks [N, C] -> tensors by name."""
    out, start = {}, 0
    for _, _, specs in flattened_groups(blueprint):
        sizes = [spec.numel for spec in specs]
        count = -(-sum(sizes) // chunks.shape[1])
        flat = chunks[start : start + count].flatten()[: sum(sizes)]
        for spec, part in zip(specs, flat.split(sizes), strict=True):
            out[spec.name] = part.reshape(spec.shape)
        start += count
    return out


def chunk_conditions(blueprint: Blueprint, size: int, loss: float | None, last_seen: int | None = None) -> Tensor:
    """[N, F]: the model's metadata and where each chunk lies: kind of its group, relative depth, place in the group as
    a share and as a number (at most `last_seen`). Our choice: the metadata take the place of a dataset's embedding."""
    assert blueprint.metadata is not None
    model, rows = model_features(blueprint.metadata, loss), []
    for kind, layer, specs in flattened_groups(blueprint):
        count = -(-sum(spec.numel for spec in specs) // size)
        index = torch.arange(count)
        depth = torch.full((count,), 0.5 if layer is None else layer / max(1, blueprint.metadata.layers - 1))
        clamped = index if last_seen is None else index.clamp(max=last_seen)
        turns = 2 * math.pi * clamped[:, None] / torch.tensor(PERIODS)
        which = torch.eye(3)[kind].expand(count, 3)
        shares = (_wave_features(depth), _wave_features(index / max(1, count - 1)))
        rows.append(torch.cat([model.expand(count, -1), which, *shares, turns.sin(), turns.cos()], dim=1))
    return torch.cat(rows)


def _wave_features(share: Tensor) -> Tensor:
    """[N] in [0, 1] -> [N, 7]"""
    waves = [f(math.pi * w * share) for w in (1.0, 2.0, 4.0) for f in (torch.sin, torch.cos)]
    return torch.stack([2 * share - 1, *waves], dim=1)
