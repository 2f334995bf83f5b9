"""How far a generated checkpoint is from the donors it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.donors.donor import Donor
from zoo.donors.model_checkpoint import ModelCheckpoint
from zoo.donors.zoo import Zoo
from zoo.linear_algebra import frobenius_norm

OTHER_COORDINATES = "not measured: the weights are in canonical form, so distances to stored weights mean nothing"
MEASURED_PARAMETERS = 50_000_000  # largest target whose distances to the donors are measured


def nearest_donor(folder: Path, zoo: Zoo | None, names: Sequence[str]) -> tuple[dict[str, Any] | None, str]:
    """Median over the matrices W of a checkpoint of min |W - D| / |W|. D are the donors' matrices of the same role and
    shape. Returns ({distance, matrices, of}, what it is), or (None, why it was not measured).

    Weights are compared as stored, not in canonical form, so a donor in other coordinates counts as far."""
    if zoo is None or not names:
        return None, "uses no donor"
    generated = ModelCheckpoint.open(folder)
    if generated.parameters > MEASURED_PARAMETERS:
        return None, f"not measured above {MEASURED_PARAMETERS:,} parameters"
    distances = _relative_distances(generated, [zoo.donor(name) for name in names])
    if not distances:
        return None, "no donor has a matrix of the same role and shape"
    matrices = sum(len(spec.shape) == 2 for spec in generated.blueprint.specs)
    found = {"distance": float(np.median(distances)), "matrices": len(distances), "of": matrices}
    return found, "median relative distance to the nearest donor matrix of the same role and shape, as stored"


def _relative_distances(generated: ModelCheckpoint, donors: Sequence[Donor]) -> list[float]:
    distances = []
    for spec in generated.blueprint.specs:
        if len(spec.shape) != 2:
            continue
        key = (spec.role, spec.shape)
        similar = [(d, other.name) for d in donors for other in d.blueprint.specs if (other.role, other.shape) == key]
        if similar:
            weight = generated.read(spec.name, torch.float32)
            nearest = min(frobenius_norm(weight - d.read(name, torch.float32)) for d, name in similar)
            distances.append(nearest / max(frobenius_norm(weight), 1e-12))
    return distances
