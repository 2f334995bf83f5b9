"""The parts of one donor's analysis, each beside what chance alone would give."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.analyze.marginals import marginal
from zoo.donors.store import Donor, record
from zoo.errors import NotFinite, UserError
from zoo.statistics.grouping import group_projections
from zoo.statistics.health import check_health
from zoo.statistics.row_column import row_column_study
from zoo.statistics.signature import clustering_vector, std_vector
from zoo.statistics.similarity import PROJECTIONS, compare_projections, null_model_stacks, singular_value_stacks
from zoo.statistics.spectra import spectrum_summary
from zoo.streams import stream
from zoo.tensors import split

NULLS = ("gaussian", "spikes")  # what the similarity of layers is compared with

Tick = Callable[[int], None]  # so many more tensors (or pairs) are done


# keep(what, what it depends on, make): what `make` gives as JSON, or gave when it was made before.
Keep = Callable[[str, list[Any], Callable[[Tick], Any]], Any]


@dataclass(frozen=True)
class Task:
    """One donor and how it is analyzed."""

    donor: Donor
    ranks: tuple[int, ...]  # ascending
    bootstraps: int
    seed: int
    device: str
    keep: Keep


def parts(task: Task) -> Iterator[tuple[str, Any]]:
    """(name, JSON) of every part. A part that a donor does not admit is {"why": the reason}."""
    yield "health", _attempt(_health, task)
    yield "marginals", _attempt(_marginals, task)
    yield "spectra", _attempt(_spectra, task)
    ranks, similarity = {}, _attempt(_similarity, task)
    if "why" not in similarity:
        ranks = {str(rank): min(rank, max(map(int, similarity))) for rank in task.ranks}
    yield "ranks", ranks
    yield "dsv", similarity
    yield "grouping", similarity if "why" in similarity else _groupings(task, similarity)
    yield "row_column", _attempt(_row_column, task)
    yield "signature", _attempt(_signature, task)


def _attempt(part: Callable[[Task], Any], task: Task) -> Any:
    try:
        return part(task)
    except UserError as error:
        return {"why": str(error)}


def _health(task: Task) -> Any:
    def make(tick: Tick) -> Any:
        return [asdict(finding) for finding in check_health(task.donor, device=task.device, seed=task.seed)]

    return task.keep("health", [task.donor.sha256, task.seed], make)


def _marginals(task: Task) -> Any:
    def make(tick: Tick) -> Any:
        found = {}
        for label, about, values in tensors(task, tick):
            found[label] = about if values is None else about | _or_why(marginal, values.flatten())
        families = [t["family"] for t in found.values() if len(t["shape"]) > 1 and t.get("family")]
        return {"tensors": found, "shares": {f: families.count(f) / len(families) for f in sorted({*families})}}

    return task.keep("marginals", [task.donor.sha256], make)


def _spectra(task: Task) -> Any:
    """The spectrum of every matrix, beside that of a random one of its shape: a draw for each, so that counts of
    matrices are counts of independent trials."""

    def make(tick: Tick) -> Any:
        found = {}
        for label, about, values in tensors(task, tick):
            if len(about["shape"]) < 2:
                continue
            found[label] = about
            if values is not None:
                noise = stream(task.seed, f"analyze/noise/{task.donor.sha256}/{label}")
                matrix = values.flatten(1)
                found[label] = about | _or_why(spectrum_summary, matrix)
                matrix = torch.randn(matrix.shape, generator=noise).to(task.device)
                found[label]["noise"] = _or_why(spectrum_summary, matrix)
        return {"tensors": found}

    return task.keep("spectra", [task.donor.sha256, task.seed], make)


def _similarity(task: Task) -> Any:
    stacked = _stacks(task)
    width = min(stack.shape[1] for stack in stacked.values())
    sizes = {role: shape for role, shape in shapes(task.donor).items() if role in stacked}
    found = {}
    for rank in sorted({min(rank, width) for rank in task.ranks}):
        depends_on = [task.donor.sha256, max(task.ranks), rank, task.bootstraps, task.seed]
        pairs = task.keep("pairs", depends_on, partial(compare_projections, stacked, rank, task.bootstraps, task.seed))
        found[str(rank)] = {"pairs": pairs, "nulls": {kind: _null(task, kind, sizes, rank) for kind in NULLS}}
    return found


def _stacks(task: Task) -> dict[str, Tensor]:
    def make(tick: Tick) -> Any:
        return _lists(singular_value_stacks(task.donor, task.ranks, device=task.device, progress=tick))

    return _tensors(task.keep("stacks", [task.donor.sha256, max(task.ranks)], make))


def _null(task: Task, kind: str, sizes: dict[str, list[tuple[int, int]]], rank: int) -> Any:
    """The same study of random matrices; donors of the same shapes share it."""
    most = max(task.ranks)
    depends_on = [kind, sizes, most, task.seed]

    def draw(tick: Tick) -> Any:
        smallest = min(side for shape in sizes.values() for size in shape for side in size)
        return _lists(null_model_stacks(sizes, min(most, smallest), kind, task.seed))

    def make(tick: Tick) -> Any:
        return compare_projections(
            _tensors(task.keep(f"{kind}-stacks", depends_on, draw)), rank, task.bootstraps, task.seed, tick
        )

    return task.keep(f"{kind}-pairs", [*depends_on, rank, task.bootstraps], make)


def _groupings(task: Task, similarity: dict[str, Any]) -> dict[str, Any]:
    source = record(task.donor)
    return {rank: group_projections(found["pairs"], int(rank), source).to_json() for rank, found in similarity.items()}


def _row_column(task: Task) -> Any:
    def make(tick: Tick) -> Any:
        return row_column_study(task.donor, seed=task.seed, device=task.device, progress=tick)

    return task.keep("row-column", [task.donor.sha256, task.seed], make)


def _signature(task: Task) -> Any:
    found: dict[str, Any] = {"std": task.keep("std", [task.donor.sha256], lambda tick: std_vector(task.donor))}
    try:
        stacked = {name: stack[:, : task.ranks[0]] for name, stack in _stacks(task).items()}
        depends_on = [task.donor.sha256, task.ranks[0]]
        found["clustering"] = task.keep("clustering", depends_on, lambda tick: clustering_vector(stacked))
    except UserError as error:  # too few layers
        found["clustering_why"] = str(error)
    return found


def tensors(task: Task, tick: Tick) -> Iterator[tuple[str, dict[str, Any], Tensor | None]]:
    """(label, {role, layer, shape}, values in float32 on the device) of every tensor of the donor, one at a time;
    fused ones are split, and the labels of their parts end with the role. Of a tensor with NaN or infinity there are
    no values, and a reason: {..., why}."""
    for spec in task.donor.blueprint.specs:
        if spec.numel and spec.dtype.is_floating_point:
            logical: dict[str, Tensor] = {}
            why = {}
            try:
                logical = split(spec, task.donor.read(spec.name, torch.float32).to(task.device))
            except NotFinite:
                why = {"why": "NaN or infinity"}
            for part in spec.parts:
                label = spec.name if len(spec.parts) == 1 else f"{spec.name} [{part.role}]"
                role = part.role if spec.kind == "weight" else f"{part.role} bias"
                yield (
                    label,
                    {"role": role, "layer": spec.layer, "shape": list(part.shape)} | why,
                    logical.get(part.role),
                )
        tick(1)


def shapes(donor: Donor) -> dict[str, list[tuple[int, int]]]:
    """projection -> [rows, columns] of its matrix in every layer."""
    found: dict[str, list[tuple[int, int]]] = {}
    for spec in sorted(donor.blueprint.specs, key=lambda s: -1 if s.layer is None else s.layer):
        for part in spec.parts:
            if spec.kind == "weight" and spec.expert is None and spec.layer is not None and part.role in PROJECTIONS:
                found.setdefault(part.role, []).append((part.shape[0], part.shape[1]))
    return {role: found[role] for role in PROJECTIONS if role in found}


def _or_why(measure: Callable[[Tensor], dict[str, Any]], values: Tensor) -> dict[str, Any]:
    """What a measurement of one tensor says; a constant one, say, does not spoil those of the others."""
    try:
        return measure(values)
    except UserError as error:
        return {"why": str(error)}


def _lists(stacked: dict[str, Tensor]) -> dict[str, Any]:
    return {name: stack.tolist() for name, stack in stacked.items()}


def _tensors(stacked: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(rows, dtype=torch.float64) for name, rows in stacked.items()}


def plain(value: Any, digits: int = 17) -> Any:
    """Numbers of numpy and torch as JSON knows them, with so many significant digits (17: all); None for what is not
    finite."""

    def number(text: str) -> float:
        return float(f"{float(text):.{digits}g}")

    return json.loads(json.dumps(value, default=_number), parse_float=number, parse_constant=lambda _: None)


def _number(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value) if isinstance(value, Path) else list(value)
