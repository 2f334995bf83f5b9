"""The parts of the analysis of one donor. Each holds a measurement and what chance alone gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.analyze.marginals import marginal_summary
from zoo.donors.donor import Donor, provenance
from zoo.errors import NotFinite, UserError
from zoo.statistics.grouping import group_projections
from zoo.statistics.health import check_health
from zoo.statistics.row_column import row_column_study
from zoo.statistics.signature import clustering_vector, std_vector
from zoo.statistics.similarity import PROJECTIONS, compare_projections, null_model_stacks, singular_value_stacks
from zoo.statistics.spectra import spectrum_summary
from zoo.streams import stream
from zoo.tensors import split_parts

NULL_MODELS = ("gaussian", "spikes")  # random matrices that the similarity of layers is compared with

Progress = Callable[[int], None]  # called with the number of tensors (or pairs) that were just finished

# cache(name, what the result depends on, compute): the JSON value that `compute` returns, or returned earlier.
Cache = Callable[[str, list[Any], Callable[[Progress], Any]], Any]


@dataclass(frozen=True)
class AnalysisTask:
    """A donor and the settings of its analysis."""

    donor: Donor
    ranks: tuple[int, ...]  # ascending
    bootstraps: int
    seed: int
    device: str
    cache: Cache


def analyze_donor(task: AnalysisTask) -> Iterator[tuple[str, Any]]:
    """Yields (name, JSON value) of every part. A part that cannot be measured on this donor is {"why": reason}."""
    yield "health", _value_or_reason(_health, task)
    yield "marginals", _value_or_reason(_marginals, task)
    yield "spectra", _value_or_reason(_spectra, task)
    ranks, similarity = {}, _value_or_reason(_similarity, task)
    if "why" not in similarity:
        ranks = {str(rank): min(rank, max(map(int, similarity))) for rank in task.ranks}
    yield "ranks", ranks
    yield "dsv", similarity
    yield "grouping", similarity if "why" in similarity else _groupings(task, similarity)
    yield "row_column", _value_or_reason(_row_column, task)
    yield "signature", _value_or_reason(_signature, task)


def _value_or_reason(part: Callable[[AnalysisTask], Any], task: AnalysisTask) -> Any:
    try:
        return part(task)
    except UserError as error:
        return {"why": str(error)}


def _health(task: AnalysisTask) -> Any:
    def compute(progress: Progress) -> Any:
        return [asdict(finding) for finding in check_health(task.donor, device=task.device, seed=task.seed)]

    return task.cache("health", [task.donor.sha256, task.seed], compute)


def _marginals(task: AnalysisTask) -> Any:
    def compute(progress: Progress) -> Any:
        found = {}
        for label, about, values in donor_tensors(task, progress):
            found[label] = about if values is None else about | _summary_or_reason(marginal_summary, values.flatten())
        families = [t["family"] for t in found.values() if len(t["shape"]) > 1 and t.get("family")]
        return {"tensors": found, "shares": {f: families.count(f) / len(families) for f in sorted({*families})}}

    return task.cache("marginals", [task.donor.sha256], compute)


def _spectra(task: AnalysisTask) -> Any:
    """The spectrum of every matrix and of a random matrix of its shape. Each has its own draw, so that matrices can be
    counted as independent trials."""

    def compute(progress: Progress) -> Any:
        found = {}
        for label, about, values in donor_tensors(task, progress):
            if len(about["shape"]) < 2:
                continue
            found[label] = about
            if values is not None:
                noise = stream(task.seed, f"analyze/noise/{task.donor.sha256}/{label}")
                matrix = values.flatten(1)
                found[label] = about | _summary_or_reason(spectrum_summary, matrix)
                matrix = torch.randn(matrix.shape, generator=noise).to(task.device)
                found[label]["noise"] = _summary_or_reason(spectrum_summary, matrix)
        return {"tensors": found}

    return task.cache("spectra", [task.donor.sha256, task.seed], compute)


def _similarity(task: AnalysisTask) -> Any:
    stacked = _stacks(task)
    width = min(stack.shape[1] for stack in stacked.values())
    sizes = {role: shape for role, shape in projection_shapes(task.donor).items() if role in stacked}
    found = {}
    for rank in sorted({min(rank, width) for rank in task.ranks}):
        depends_on = [task.donor.sha256, max(task.ranks), rank, task.bootstraps, task.seed]
        pairs = task.cache("pairs", depends_on, partial(compare_projections, stacked, rank, task.bootstraps, task.seed))
        found[str(rank)] = {
            "pairs": pairs,
            "nulls": {kind: _null_pairs(task, kind, sizes, rank) for kind in NULL_MODELS},
        }
    return found


def _stacks(task: AnalysisTask) -> dict[str, Tensor]:
    def compute(progress: Progress) -> Any:
        return _stacks_to_lists(singular_value_stacks(task.donor, task.ranks, device=task.device, progress=progress))

    return _stacks_from_lists(task.cache("stacks", [task.donor.sha256, max(task.ranks)], compute))


def _null_pairs(task: AnalysisTask, kind: str, sizes: dict[str, list[tuple[int, int]]], rank: int) -> Any:
    """The same comparison of projections on random matrices. Donors of the same shapes share it."""
    most = max(task.ranks)
    depends_on = [kind, sizes, most, task.seed]

    def draw(progress: Progress) -> Any:
        smallest = min(side for shape in sizes.values() for size in shape for side in size)
        return _stacks_to_lists(null_model_stacks(sizes, min(most, smallest), kind, task.seed))

    def compute(progress: Progress) -> Any:
        stacks = _stacks_from_lists(task.cache(f"{kind}-stacks", depends_on, draw))
        return compare_projections(stacks, rank, task.bootstraps, task.seed, progress)

    return task.cache(f"{kind}-pairs", [*depends_on, rank, task.bootstraps], compute)


def _groupings(task: AnalysisTask, similarity: dict[str, Any]) -> dict[str, Any]:
    source = provenance(task.donor)
    return {rank: group_projections(found["pairs"], int(rank), source).to_json() for rank, found in similarity.items()}


def _row_column(task: AnalysisTask) -> Any:
    def compute(progress: Progress) -> Any:
        return row_column_study(task.donor, seed=task.seed, device=task.device, progress=progress)

    return task.cache("row-column", [task.donor.sha256, task.seed], compute)


def _signature(task: AnalysisTask) -> Any:
    found: dict[str, Any] = {"std": task.cache("std", [task.donor.sha256], lambda progress: std_vector(task.donor))}
    try:
        stacked = {name: stack[:, : task.ranks[0]] for name, stack in _stacks(task).items()}
        depends_on = [task.donor.sha256, task.ranks[0]]
        found["clustering"] = task.cache("clustering", depends_on, lambda progress: clustering_vector(stacked))
    except UserError as error:  # too few layers
        found["clustering_why"] = str(error)
    return found


def donor_tensors(task: AnalysisTask, progress: Progress) -> Iterator[tuple[str, dict[str, Any], Tensor | None]]:
    """Yields (label, {role, layer, shape}, values) for every tensor of the donor, one at a time, in float32 on the
    device. A fused tensor is split into its parts, whose labels end with the role. For a tensor that holds NaN or
    infinity, values is None and the dict has a `why`."""
    for spec in task.donor.blueprint.specs:
        if spec.numel and spec.dtype.is_floating_point:
            logical: dict[str, Tensor] = {}
            why = {}
            try:
                logical = split_parts(spec, task.donor.read(spec.name, torch.float32).to(task.device))
            except NotFinite:
                why = {"why": "NaN or infinity"}
            for part in spec.parts:
                label = spec.name if len(spec.parts) == 1 else f"{spec.name} [{part.role}]"
                role = part.role if spec.kind == "weight" else f"{part.role} bias"
                about = {"role": role, "layer": spec.layer, "shape": list(part.shape)}
                yield label, about | why, logical.get(part.role)
        progress(1)


def projection_shapes(donor: Donor) -> dict[str, list[tuple[int, int]]]:
    """projection -> (rows, columns) of its matrix in every layer."""
    found: dict[str, list[tuple[int, int]]] = {}
    for spec in sorted(donor.blueprint.specs, key=lambda s: -1 if s.layer is None else s.layer):
        for part in spec.parts:
            if spec.kind == "weight" and spec.expert is None and spec.layer is not None and part.role in PROJECTIONS:
                found.setdefault(part.role, []).append((part.shape[0], part.shape[1]))
    return {role: found[role] for role in PROJECTIONS if role in found}


def _summary_or_reason(measure: Callable[[Tensor], dict[str, Any]], values: Tensor) -> dict[str, Any]:
    """The measurement, or {"why": reason} where this tensor does not allow it (a constant one, for example)."""
    try:
        return measure(values)
    except UserError as error:
        return {"why": str(error)}


def _stacks_to_lists(stacked: dict[str, Tensor]) -> dict[str, Any]:
    return {name: stack.tolist() for name, stack in stacked.items()}


def _stacks_from_lists(stacked: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(rows, dtype=torch.float64) for name, rows in stacked.items()}


def to_json_values(value: Any, digits: int = 17) -> Any:
    """The value with the types of JSON only: NumPy and torch numbers become Python's, NaN and infinity become None.
    Floats keep `digits` significant digits; 17 keep them all."""

    def number(text: str) -> float:
        return float(f"{float(text):.{digits}g}")

    return json.loads(json.dumps(value, default=_to_builtin), parse_float=number, parse_constant=lambda _: None)


def _to_builtin(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value) if isinstance(value, Path) else list(value)
