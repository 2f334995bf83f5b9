"""The donors of a stored zoo in one line each, from the manifest and the donors' headers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from zoo.donors.manifest import read_manifest
from zoo.donors.zoo import Zoo


def summarize_donors(path: Path) -> list[dict[str, Any]]:
    """[{name, revision, license, architecture, parameters, tensors, roles}] of the donors, sorted by name.

    UserError if there is no zoo, or a donor is damaged.
    """
    zoo = Zoo.open(path)
    rows_of: dict[str, list[dict[str, Any]]] = {name: [] for name in zoo.names}
    for row in read_manifest(path).select(["model", "revision", "license", "role"]).to_pylist():
        rows_of[row["model"]].append(row)
    return [
        {
            "name": donor.name,
            "revision": rows[0]["revision"],
            "license": rows[0]["license"],
            "architecture": donor.config.get("model_type", "unknown"),
            "parameters": donor.parameters,
            "tensors": len(rows),
            "roles": dict(sorted(Counter(row["role"] for row in rows).items())),
        }
        for donor, rows in ((donor, rows_of[donor.name]) for donor in zoo.donors)
    ]
