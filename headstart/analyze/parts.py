"""The parts of the analysis of one donor, put together from the results of jobs. Each holds a measurement and what
chance alone gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headstart.analyze.jobs import Job
from headstart.analyze.tensors import AnalysisTask, from_base64, is_measured, label_of, measure_tensor
from zoo.donors.donor import Donor, provenance
from zoo.errors import UserError
from zoo.statistics.grouping import group_projections
from zoo.statistics.health import check_health
from zoo.statistics.row_column import measure_couplings
from zoo.statistics.signature import clustering_vector, has_projection, std_vector_from_sums
from zoo.statistics.similarity import (
    MIN_LAYERS,
    PROJECTIONS,
    common_rank,
    compare_pair,
    fit_pooled_distances,
    null_model_spectrum,
    projection_pairs,
    projection_tensors,
)
from zoo.tensors import TensorSpec

OWN = "own"  # the stacks of the donor itself
NULL_MODELS = ("gaussian", "spikes")  # random matrices that the similarity of layers is compared with

# Our estimates: operations that do not depend on the size of a tensor, and that each distance between layers takes, in
# a test of two projections and in a fit to all of them.
# They decide only how evenly the work is split.
TENSOR_COST, DISTANCE_COST, POOLED_COST = 2e9, 1e7, 1e5

Results = Mapping[str, Any]  # of jobs, by their keys
Stacks = dict[str, list[list[float]]]  # projection -> singular values of its matrix in each layer


class DonorAnalysis:
    """The jobs of one donor, and what their results say.

    `first_jobs` need no other. `pair_jobs` need the stacks that follow from these. `parts` needs the results of all.
    """

    def __init__(self, task: AnalysisTask) -> None:
        self.task, self.donor = task, task.donor
        self.health = self._health_job()
        self.tensors = {spec.name: self._tensor_job(spec) for spec in self.donor.blueprint.specs if is_measured(spec)}
        self.shapes = projection_shapes(self.donor)
        self.nulls = {kind: self._null_jobs(kind) for kind in NULL_MODELS}

    def first_jobs(self) -> list[Job]:
        """The health of the donor, every tensor, and the random matrices."""
        nulls = [job for by_role in self.nulls.values() for jobs in by_role.values() for job in jobs]
        return [self.health, *self.tensors.values(), *nulls]

    def stacks(self, results: Results) -> dict[str, Any]:
        """{OWN, *NULL_MODELS: stacks}, or {"why": reason} where layers cannot be compared."""
        try:
            own = self._own_stacks(results)
        except UserError as error:
            return {"why": str(error)}
        nulls = {
            kind: {role: [results[job.key] for job in jobs] for role, jobs in by_role.items()}
            for kind, by_role in self.nulls.items()
        }
        return {OWN: own, **nulls}

    def pair_jobs(self, stacks: Mapping[str, Any]) -> dict[tuple[int, str], list[Job]]:
        """(rank, OWN or one of NULL_MODELS) -> the comparisons of all pairs of projections, and as the last job that of
        all layers of all projections. stacks: `self.stacks`."""
        if "why" in stacks:
            return {}
        tensors = {kind: _to_tensors(stacks[kind]) for kind in stacks}
        width = min(stack.shape[1] for stack in tensors[OWN].values())
        return {
            (rank, kind): self._rank_jobs(rank, kind, known)
            for rank in sorted({min(rank, width) for rank in self.task.ranks})
            for kind, known in tensors.items()
        }

    def _rank_jobs(self, rank: int, kind: str, stacks: dict[str, Tensor]) -> list[Job]:
        task, name = self.task, self.donor.name
        source = self.donor.sha256 if kind == OWN else [kind, self.shapes, self._null_rank()]
        jobs = [
            Job(
                "pairs",
                [source, a, b, rank, task.bootstraps, task.seed],
                len(stacks[a]) * len(stacks[b]) * DISTANCE_COST,
                partial(compare_pair, stacks[a], stacks[b], (a, b), rank, task.bootstraps, task.seed),
                f"{name}: {a} and {b}",
            )
            for a, b in projection_pairs(stacks)
        ]
        vectors = sum(len(stack) for stack in stacks.values())
        fit = partial(fit_pooled_distances, stacks, rank)
        return [*jobs, Job("pooled", [source, rank, task.seed], vectors**2 * POOLED_COST, fit, f"{name}: all layers")]

    def parts(self, results: Results, stacks: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """(name, JSON value) of every part. A part that cannot be measured on this donor is {"why": reason}."""
        yield "health", results[self.health.key]
        yield "marginals", _value_or_reason(self._marginals, results)
        yield "spectra", _value_or_reason(self._spectra, results)
        ranks, similarity = {}, self._similarity(results, stacks)
        if "why" not in similarity:
            ranks = {str(rank): min(rank, max(map(int, similarity))) for rank in self.task.ranks}
        yield "ranks", ranks
        yield "dsv", similarity
        yield "grouping", similarity if "why" in similarity else self._groupings(similarity)
        yield "row_column", _value_or_reason(self._row_column, results)
        yield "signature", _value_or_reason(partial(self._signature, stacks), results)

    def _health_job(self) -> Job:
        donor, task = self.donor, self.task

        def check() -> Any:
            return [asdict(finding) for finding in check_health(donor, device=task.device, seed=task.seed)]

        return Job(
            "health",
            [donor.sha256, task.seed],
            donor.parameters * 20 + TENSOR_COST,
            lambda: _value_or_reason(lambda _: check(), {}),
            f"{donor.name}: health",
        )

    def _tensor_job(self, spec: TensorSpec) -> Job:
        donor, task = self.donor, self.task
        side = max(min(torch.Size(part.shape[:1]).numel(), spec.numel // max(part.shape[0], 1)) for part in spec.parts)
        return Job(
            "tensor",
            [donor.sha256, spec.name, max(task.ranks), task.seed],
            TENSOR_COST + spec.numel * (side + 500),
            partial(measure_tensor, task, spec),
            f"{donor.name}: {spec.name}",
        )

    def _null_jobs(self, kind: str) -> dict[str, list[Job]]:
        """The random matrices in place of the projections. Donors of the same shapes share them."""
        seed, name = self.task.seed, self.donor.name

        def job(role: str, layer: int, shape: tuple[int, int], rank: int) -> Job:
            return Job(
                kind,
                [role, layer, shape, rank, seed],
                shape[0] * shape[1] * (min(shape) if kind == "spikes" else 1),
                lambda: null_model_spectrum(kind, shape, rank, seed, (role, layer)).tolist(),
                f"{name}: random matrices",
            )

        rank = self._null_rank()
        return {
            role: [job(role, layer, shape, rank) for layer, shape in enumerate(shapes)]
            for role, shapes in self.shapes.items()
        }

    def _null_rank(self) -> int:
        return min(
            [max(self.task.ranks), *(side for shapes in self.shapes.values() for size in shapes for side in size)]
        )

    def _measured(self, results: Results, specs: list[TensorSpec]) -> Iterator[tuple[TensorSpec, dict[str, Any]]]:
        """Yields what was measured of tensors. UserError for one that holds NaN or infinity, or cannot be read."""
        for spec in specs:
            if spec.name in self.tensors:
                found = results[self.tensors[spec.name].key]
                for reason in ("not_finite", "error"):
                    if reason in found:
                        raise UserError(found[reason])
                yield spec, found

    def _labelled(self, results: Results, what: str) -> dict[str, dict[str, Any]]:
        """label -> {role, layer, shape} and a measurement, or why it is missing, of every part of every tensor."""
        labelled = {}
        for spec in self.donor.blueprint.specs:
            found = results[self.tensors[spec.name].key] if spec.name in self.tensors else {what: {}}
            if "error" in found:
                raise UserError(found["error"])
            for part in spec.parts if spec.name in self.tensors else ():
                role = part.role if spec.kind == "weight" else f"{part.role} bias"
                about = {"role": role, "layer": spec.layer, "shape": list(part.shape)}
                own = {"why": "NaN or infinity"} if "not_finite" in found else found[what].get(part.role)
                if own is not None:
                    labelled[label_of(spec, part.role)] = about | own
        return labelled

    def _marginals(self, results: Results) -> Any:
        found = self._labelled(results, "marginals")
        families = [t["family"] for t in found.values() if len(t["shape"]) > 1 and t.get("family")]
        return {"tensors": found, "shares": {f: families.count(f) / len(families) for f in sorted({*families})}}

    def _spectra(self, results: Results) -> Any:
        found = self._labelled(results, "spectra")
        return {"tensors": {label: spectrum for label, spectrum in found.items() if len(spectrum["shape"]) > 1}}

    def _own_stacks(self, results: Results) -> Stacks:
        specs = projection_tensors(self.donor)
        rank = common_rank(specs, self.task.ranks)
        stacks: Stacks = {role: [] for role in PROJECTIONS}
        for _, found in self._measured(results, specs):
            for role, values in found["stacks"].items():
                if role in PROJECTIONS:
                    if isinstance(values, dict):
                        raise UserError(values["why"])
                    stacks[role].append(values[:rank])
        return {role: rows for role, rows in stacks.items() if len(rows) >= MIN_LAYERS}

    def _similarity(self, results: Results, stacks: dict[str, Any]) -> dict[str, Any]:
        if "why" in stacks:
            return stacks
        found: dict[str, Any] = {}
        for (rank, kind), jobs in self.pair_jobs(stacks).items():
            *pairs, pooled = (results[job.key] for job in jobs)
            entry = found.setdefault(str(rank), {"pairs": [], "nulls": {}, "pooled": {}})
            entry["pooled"][kind] = pooled
            if kind == OWN:
                entry["pairs"] = pairs
            else:
                entry["nulls"][kind] = pairs
        return found

    def _groupings(self, similarity: dict[str, Any]) -> dict[str, Any]:
        source = provenance(self.donor)
        return {
            rank: group_projections(found["pairs"], int(rank), source, found["pooled"][OWN]["alpha"]).to_json()
            for rank, found in similarity.items()
        }

    def _row_column(self, results: Results) -> Any:
        entries, energies = [], []
        for spec, found in self._measured(results, [s for s in self.donor.blueprint.specs if len(s.shape) > 1]):
            for part in spec.parts:
                entry, rows, columns = found["row_column"][part.role]
                energies.append((spec, part, from_base64(rows), from_base64(columns)))
                entries += [] if entry is None else [entry]
        return {"tensors": entries, "couplings": measure_couplings(self.donor, energies, self.task.row_column)}

    def _signature(self, stacks: dict[str, Any], results: Results) -> Any:
        projections = [spec for spec in self.donor.blueprint.specs if has_projection(spec)]
        sums = [(role, *own) for _, found in self._measured(results, projections) for role, own in found["std"].items()]
        signature: dict[str, Any] = {"std": std_vector_from_sums(self.donor.name, sums)}
        try:
            if "why" in stacks:
                raise UserError(stacks["why"])
            first = {role: stack[:, : self.task.ranks[0]] for role, stack in _to_tensors(stacks[OWN]).items()}
            signature["clustering"] = clustering_vector(first)
        except UserError as error:  # too few layers
            signature["clustering_why"] = str(error)
        return signature


def projection_shapes(donor: Donor) -> dict[str, list[tuple[int, int]]]:
    """projection -> (rows, columns) of its matrix in every layer, of those in at least MIN_LAYERS."""
    found: dict[str, list[tuple[int, int]]] = {}
    for spec in sorted(donor.blueprint.specs, key=lambda s: -1 if s.layer is None else s.layer):
        for part in spec.parts:
            if spec.kind == "weight" and spec.expert is None and spec.layer is not None and part.role in PROJECTIONS:
                found.setdefault(part.role, []).append((part.shape[0], part.shape[1]))
    return {role: found[role] for role in PROJECTIONS if len(found.get(role, [])) >= MIN_LAYERS}


def _to_tensors(stacks: Stacks) -> dict[str, Tensor]:
    return {role: torch.tensor(rows, dtype=torch.float64) for role, rows in stacks.items()}


def _value_or_reason(measure: Callable[[Results], Any], results: Results) -> Any:
    try:
        return measure(results)
    except UserError as error:
        return {"why": str(error)}
