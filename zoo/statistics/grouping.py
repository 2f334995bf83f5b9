"""Which projections of a model differ from the others: the qualitative characterisation of arXiv 2509.00046."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from zoo.checkpoints.files import read_json
from zoo.donors.donor import Donor, provenance
from zoo.errors import UserError, unknown
from zoo.statistics.similarity import (
    PROJECTIONS,
    compare_projections,
    fit_pooled_distances,
    singular_value_stacks,
)

EXPONENTS = (1.02, 20.0)  # the range of a fitted exponent
SOURCE_KEYS = {"name", "revision", "sha256", "license"}


@dataclass(frozen=True)
class Grouping:
    """The reference weight, and which projections count as Gaussian and as Pareto.

    Gaussian: the projections whose distances to the reference weight are not a power law. Pareto: all others. The
    reference weight itself is in neither."""

    rank: int  # number of singular values that were compared
    reference: str | None  # one of PROJECTIONS; None if no pair stands out
    gaussian: tuple[str, ...]
    pareto: tuple[str, ...]
    undifferentiated: bool  # no pair stands out: all projections are one Pareto group
    source: dict[str, Any] = field(default_factory=dict)  # provenance of the model; empty if unknown
    undecided: int = 0  # pairs of projections with too little data for a verdict
    # Of the density of the distances between all singular-value vectors, to two decimals; None if unknown.
    exponent: float | None = None

    @property
    def n_pairs(self) -> int:
        """Number of unordered pairs of projections, including each with itself."""
        known = len(self.gaussian) + len(self.pareto) + (self.reference is not None)
        return known * (known + 1) // 2

    @property
    def description(self) -> str:
        """The result in one line."""
        law = "" if self.exponent is None else f"; distances between all vectors have the exponent {self.exponent:g}"
        return f"{self._groups}{law}"

    @property
    def _groups(self) -> str:
        undecided = f"({self.undecided} of {self.n_pairs} pairs of projections undecided)"
        if not self.undifferentiated:
            counts = f"Gaussian counts for {', '.join(self.gaussian)}, Pareto counts for the rest"
            return f"reference weight {self.reference}, {counts}" + (f" {undecided}" if self.undecided else "")
        if 2 * self.undecided > self.n_pairs:
            return f"undifferentiated, all pairs are treated alike: too few layers or too little data {undecided}"
        return f"undifferentiated, all pairs are treated alike: no pair is shown to differ from a power law {undecided}"

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "rank": self.rank,
            "reference": self.reference,
            "gaussian": list(self.gaussian),
            "pareto": list(self.pareto),
            "undifferentiated": self.undifferentiated,
            "source": self.source,
            "undecided": self.undecided,
            "exponent": self.exponent,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_json`. Raises ValueError for any other object."""
        reference, gaussian, pareto, alike = (
            values.get(key) for key in ("reference", "gaussian", "pareto", "undifferentiated")
        )
        rank, source, undecided = values.get("rank"), values.get("source", {}), values.get("undecided", 0)
        exponent = values.get("exponent")  # older analyses have none
        if type(rank) is not int or rank < 1:
            raise ValueError("rank is not a positive integer")
        if type(undecided) is not int or undecided < 0:
            raise ValueError("undecided is not a count")
        if exponent is not None and not (type(exponent) in (int, float) and EXPONENTS[0] <= exponent <= EXPONENTS[1]):
            raise ValueError(f"exponent is not from {EXPONENTS[0]:g} to {EXPONENTS[1]:g}")
        if not isinstance(gaussian, list) or not isinstance(pareto, list):
            raise ValueError("gaussian and pareto must be lists")
        named = [*gaussian, *pareto, *([] if reference is None else [reference])]
        if any(name not in PROJECTIONS for name in named) or len(named) != len(set(named)):
            raise ValueError("reference, gaussian and pareto must be distinct projections")
        if alike is not (reference is None) or alike is not (not gaussian):
            raise ValueError("undifferentiated, reference and gaussian contradict each other")
        if not isinstance(source, dict) or (source and {*source} != SOURCE_KEYS):
            raise ValueError(f"source must have {', '.join(sorted(SOURCE_KEYS))}")
        if not all(isinstance(value, str) and value.isprintable() for value in source.values()):
            raise ValueError("the values of source must be printable strings")
        return cls(rank, reference, tuple(gaussian), tuple(pareto), alike, source, undecided, exponent)


def group_projections(
    rows: Sequence[dict[str, Any]], rank: int, source: dict[str, Any] | None = None, alpha: float | None = None
) -> Grouping:
    """Groups the projections of a model by the rows of `zoo.statistics.similarity.compare_projections`. alpha: the
    exponent that `zoo.statistics.similarity.fit_pooled_distances` finds.

    The reference weight is the projection with the most partners, whose distances to it are "not a power law". Our
    choice: of several, the first in PROJECTIONS; distances within one projection do not count; an undecided pair
    counts as a power law (`undecided` says how many); without any partner, all projections are one Pareto group."""
    known = [role for role in PROJECTIONS if any(role in (row["a"], row["b"]) for row in rows)]
    partners: dict[str, set[str]] = {role: set() for role in known}
    for row in rows:
        if row["verdict"] == "not a power law" and row["a"] != row["b"]:
            partners[row["a"]].add(row["b"])
            partners[row["b"]].add(row["a"])
    reference = max(known, key=lambda role: len(partners[role]), default=None)
    undecided = sum(row["verdict"] == "undecided" for row in rows)
    exponent = None if alpha is None else min(max(round(alpha, 2), EXPONENTS[0]), EXPONENTS[1])
    if reference is None or not partners[reference]:
        return Grouping(rank, None, (), tuple(known), True, source or {}, undecided, exponent)
    gaussian = tuple(role for role in known if role in partners[reference])
    pareto = tuple(role for role in known if role not in (reference, *gaussian))
    return Grouping(rank, reference, gaussian, pareto, False, source or {}, undecided, exponent)


def group_donor(
    donor: Donor, rank: int = 16, bootstraps: int = 200, seed: int = 0, device: str = "cpu", quiet: bool = True
) -> Grouping:
    """Groups the projections of a donor by its `rank` largest singular values, fewer if its matrices are smaller.

    Few layers distinguish nothing: donors with up to six are undifferentiated, or differ in one or two of 28 pairs,
    as chance gives. With thirty layers, random matrices have a reference weight too. So a grouping does not prove
    learning. Raises UserError as `zoo.statistics.similarity.singular_value_stacks` does."""
    with tqdm(desc=f"spectra of {donor.name}", unit="tensor", disable=quiet) as bar:
        found = singular_value_stacks(donor, [rank], device, bar.update)
    rank = next(iter(found.values())).shape[1]
    with tqdm(desc="distances between layers", total=len(found) * (len(found) + 1) // 2, disable=quiet) as bar:
        rows = compare_projections(found, rank, bootstraps, seed, bar.update)
    return group_projections(rows, rank, provenance(donor), fit_pooled_distances(found, rank)["alpha"])


def read_grouping(path: Path, model: str | None = None, rank: int | None = None) -> Grouping:
    """Reads the grouping of a model from the analysis.json of `headstart analyze`. rank: None for the smallest one.

    Raises UserError for a missing file, another file, an unknown model or rank, several models if none is named, or
    a model that could not be grouped."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; `headstart analyze` writes analysis.json")
    models = read_json(path).get("models")
    if not isinstance(models, dict) or not models:
        raise UserError(f"{path}: is not an analysis; give an analysis.json written by `headstart analyze`")
    if model is None and len(models) > 1:
        raise UserError(
            f"{path}: contains {len(models)} models; choose one as {path}#NAME: {', '.join(sorted(models))}"
        )
    if model is not None and model not in models:
        raise unknown(f"model in {path}", model, models)
    name = model or next(iter(models))
    found = models[name].get("grouping") if isinstance(models[name], dict) else None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path}: has no grouping of {name}; run `headstart analyze` again")
    if "why" in found:
        raise UserError(f"{path}: {name} could not be grouped: {found['why']}")
    used = str(rank) if rank is not None else min(found, key=lambda key: (len(key), key))
    ranks = models[name].get("ranks", {})
    if not isinstance(ranks, dict) or any(type(value) is not int for value in ranks.values()):
        raise UserError(f"{path}: the ranks of {name} are damaged; run `headstart analyze` again")
    used = str(ranks.get(used, used))  # fewer where the model's matrices are smaller
    if used not in found:
        raise unknown(f"rank in {path}", used, found)
    try:
        if not isinstance(found[used], dict):
            raise ValueError("it is not an object")
        return Grouping.from_json(found[used])
    except ValueError as error:
        raise UserError(
            f"{path}: the grouping of {name} is damaged ({error}); run `headstart analyze` again"
        ) from error
