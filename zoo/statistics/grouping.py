"""Which projections of a model stand out: the qualitative characterisation of arXiv 2509.00046."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from zoo.checkpoints.files import read_json
from zoo.donors.donor import Donor, provenance
from zoo.errors import UserError, unknown
from zoo.statistics.similarity import PROJECTIONS, compare_projections, singular_value_stacks

SOURCE_KEYS = {"name", "revision", "sha256", "license"}


@dataclass(frozen=True)
class Grouping:
    """The reference weight RW, the projections whose distances to it are no power law (Func = Gaussian), and all
    others (Func = Pareto), RW among neither."""

    rank: int  # how many singular values were compared
    reference: str | None  # of PROJECTIONS; None where no pair stands out
    gaussian: tuple[str, ...]
    pareto: tuple[str, ...]
    undifferentiated: bool  # no pair stands out: all projections are one Pareto group
    source: dict[str, Any] = field(default_factory=dict)  # which model this was read from: `record`, or none
    undecided: int = 0  # pairs of projections with too little data for a verdict, of all `pairs`

    @property
    def n_pairs(self) -> int:
        """How many unordered pairs of projections there are, those of one with itself included."""
        known = len(self.gaussian) + len(self.pareto) + (self.reference is not None)
        return known * (known + 1) // 2

    @property
    def description(self) -> str:
        """What was found, in a line."""
        of = f"({self.undecided} of {self.n_pairs} pairs of projections undecided)"
        if not self.undifferentiated:
            counts = f"Gaussian counts for {', '.join(self.gaussian)}, Pareto counts for the rest"
            return f"reference weight {self.reference}, {counts}" + (f" {of}" if self.undecided else "")
        if 2 * self.undecided > self.n_pairs:
            return f"undifferentiated, all pairs are drawn alike: too few layers, or too little data, to tell {of}"
        return f"undifferentiated, all pairs are drawn alike: none is shown to be other than a power law {of}"

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "reference": self.reference,
            "gaussian": list(self.gaussian),
            "pareto": list(self.pareto),
            "undifferentiated": self.undifferentiated,
            "source": self.source,
            "undecided": self.undecided,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Raises ValueError for what `to_json` never wrote."""
        reference, gaussian, pareto, alike = (
            values.get(key) for key in ("reference", "gaussian", "pareto", "undifferentiated")
        )
        rank, source, undecided = values.get("rank"), values.get("source", {}), values.get("undecided", 0)
        if type(rank) is not int or rank < 1:
            raise ValueError("rank is no positive whole number")
        if type(undecided) is not int or undecided < 0:
            raise ValueError("undecided is no count")
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
            raise ValueError("source must hold words")
        return cls(rank, reference, tuple(gaussian), tuple(pareto), alike, source, undecided)


def group_projections(rows: Sequence[dict[str, Any]], rank: int, source: dict[str, Any] | None = None) -> Grouping:
    """rows: of `zoo.statistics.similarity.compare_projections`. RW is the projection with most partners whose distances to it are
    "not a power law" (the first in PROJECTIONS of those with as many [R]); a projection's distances to itself say
    nothing of RW, and an undecided pair counts as a power law [R] (`undecided` tells how many). No such pair: one
    Pareto group [R]."""
    known = [role for role in PROJECTIONS if any(role in (row["a"], row["b"]) for row in rows)]
    partners: dict[str, set[str]] = {role: set() for role in known}
    for row in rows:
        if row["verdict"] == "not a power law" and row["a"] != row["b"]:
            partners[row["a"]].add(row["b"])
            partners[row["b"]].add(row["a"])
    reference = max(known, key=lambda role: len(partners[role]), default=None)
    undecided = sum(row["verdict"] == "undecided" for row in rows)
    if reference is None or not partners[reference]:
        return Grouping(rank, None, (), tuple(known), True, source or {}, undecided)
    gaussian = tuple(role for role in known if role in partners[reference])
    pareto = tuple(role for role in known if role not in (reference, *gaussian))
    return Grouping(rank, reference, gaussian, pareto, False, source or {}, undecided)


def group_donor(
    donor: Donor, rank: int = 16, bootstraps: int = 200, seed: int = 0, device: str = "cpu", quiet: bool = True
) -> Grouping:
    """The grouping of a donor by its `rank` largest singular values (fewer where its matrices are smaller). A few
    layers tell nothing apart: donors of up to six are undifferentiated, or differ in a pair or two, as chance has it
    among 28. With thirty, random matrices have a reference weight too, so a grouping is no proof of learning. Raises
    UserError as `zoo.statistics.similarity.singular_value_stacks`."""
    with tqdm(desc=f"spectra of {donor.name}", unit="tensor", disable=quiet) as bar:
        found = singular_value_stacks(donor, [rank], device, bar.update)
    rank = next(iter(found.values())).shape[1]
    with tqdm(desc="distances between layers", total=len(found) * (len(found) + 1) // 2, disable=quiet) as bar:
        return group_projections(compare_projections(found, rank, bootstraps, seed, bar.update), rank, provenance(donor))


def read_grouping(path: Path, model: str | None = None, rank: int | None = None) -> Grouping:
    """The grouping of a model in an analysis.json of `headstart analyze`; rank None: the smallest one there.

    Raises UserError: no such file, no analysis, an unknown model or rank, several models and none named, a model that
    could not be grouped."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; `headstart analyze` writes analysis.json")
    models = read_json(path).get("models")
    if not isinstance(models, dict) or not models:
        raise UserError(f"{path}: is no analysis; give the analysis.json that `headstart analyze` wrote")
    if model is None and len(models) > 1:
        raise UserError(f"{path}: holds {len(models)} models; name one as {path}#NAME: {', '.join(sorted(models))}")
    if model is not None and model not in models:
        raise unknown(f"model in {path}", model, models)
    name = model or next(iter(models))
    found = models[name].get("grouping") if isinstance(models[name], dict) else None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path}: has no grouping of {name}; analyze it again")
    if "why" in found:
        raise UserError(f"{path}: {name} could not be grouped: {found['why']}")
    used = str(rank) if rank is not None else min(found, key=lambda key: (len(key), key))
    ranks = models[name].get("ranks", {})
    if not isinstance(ranks, dict) or any(type(value) is not int for value in ranks.values()):
        raise UserError(f"{path}: the ranks of {name} are damaged; analyze it again")
    used = str(ranks.get(used, used))  # fewer where the model's matrices are smaller
    if used not in found:
        raise unknown(f"rank in {path}", used, found)
    try:
        if not isinstance(found[used], dict):
            raise ValueError("it is no object")
        return Grouping.from_json(found[used])
    except ValueError as error:
        raise UserError(f"{path}: the grouping of {name} is damaged ({error}); analyze it again") from error
