"""Row-column statistics of a real donor by layer and role, and the correlations of the rows of one of its blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.donors.donor import Donor
from zoo.donors.folder import StandaloneDonor
from zoo.statistics.row_column import row_column_study
from zoo.streams import stream
from zoo.tensors import split_parts

TESTS = ("row_spread", "column_spread", "row_correlation")
PATTERN_ROLES = {"attn.q": False, "attn.k": False, "mlp.up": True, "mlp.down": True}  # role -> whether rows are sorted
GROUPS = 16  # rows and columns of a pattern


def measure_statistics(folder: Path) -> dict[str, Any]:
    """{tensors: role, layer and statistics with nulls and p of every matrix, couplings, patterns} of a donor."""
    donor = StandaloneDonor.open(str(folder), quiet=True)
    study = row_column_study(donor)
    columns = ("role", "layer", *(f"{test}{end}" for test in TESTS for end in ("", "_null", "_p")))
    return {
        "tensors": [[entry[column] for column in columns] for entry in study["tensors"]],
        "columns": columns,
        "couplings": [[c["space"], c["layer"], c["a"], c["b"], c["correlation"], c["p"]] for c in study["couplings"]],
        "patterns": measure_patterns(donor),
    }


def measure_patterns(donor: Donor) -> dict[str, Any]:
    """{layer, roles: role -> {own, null}}: `correlation_pattern` of the middle block, and with shuffled entries."""
    metadata = donor.blueprint.metadata
    assert metadata is not None
    layer, roles = metadata.layers // 2, {}
    for spec in donor.blueprint.specs:
        if spec.layer != layer or spec.kind != "weight":
            continue
        for role, matrix in split_parts(spec, donor.read(spec.name, torch.float32)).items():
            if role in PATTERN_ROLES:
                order = torch.randperm(matrix.numel(), generator=stream(0, f"pattern/{role}"))
                shuffled = matrix.flatten()[order].view_as(matrix)
                own, null = (correlation_pattern(m, PATTERN_ROLES[role]) for m in (matrix, shuffled))
                roles[role] = {"own": own.tolist(), "null": null.tolist()}
    return {"layer": layer, "roles": roles}


def correlation_pattern(matrix: Tensor, is_sorted: bool) -> Tensor:
    """[GROUPS, GROUPS]: mean |correlation| of rows of one group with other rows of another, times the square root of
    the row's length; independent rows give 0.8. Groups are of adjacent rows, sorted by energy if `is_sorted`."""
    if is_sorted:
        matrix = matrix[matrix.square().sum(1).argsort(descending=True)]
    rows = F.normalize(matrix - matrix.mean(1, keepdim=True), dim=1)
    correlation = (rows @ rows.mT).abs_() * matrix.shape[1] ** 0.5
    correlation.fill_diagonal_(0.0)
    group = (torch.arange(len(rows)) * GROUPS) // len(rows)
    member = F.one_hot(group, GROUPS).float()
    sizes = member.sum(0)
    pairs = sizes[:, None] * sizes - torch.diag(sizes)
    return member.mT @ correlation @ member / pairs
