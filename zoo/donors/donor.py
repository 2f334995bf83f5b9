"""What every donor offers, wherever it lies: a name, a blueprint, tensors one at a time, a vocabulary, a provenance."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.checkpoints.quantised import Quantisation
from zoo.targets.blueprint import Blueprint


class Donor(Protocol):
    """A trained model that serves as source of weights.

    Implementations: ZooDonor (in a zoo), StandaloneDonor (a folder or hub repository outside a zoo), ModuleDonor (a
    module in memory) and PeftBaseDonor (the base of a PEFT model in memory).
    """

    @property
    def name(self) -> str: ...

    @property
    def blueprint(self) -> Blueprint:
        """Its tensors and what each of them does."""

    @property
    def config(self) -> dict[str, Any]:
        """The parsed config.json, empty for a module without one."""

    @property
    def names(self) -> list[str]:
        """The names of its tensors on disk."""

    @property
    def parameters(self) -> int:
        """The number of its weights."""

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of its training (loss, tokens, seed), or {}."""

    @property
    def quantisation(self) -> Quantisation:
        """Which of its tensors are stored as codes. They are read as float32 values."""

    def vocabulary(self) -> dict[str, int] | None:
        """Token string -> id, None without a tokenizer."""

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of one tensor on the CPU. UserError for an unknown name, NotFinite for NaN or infinity."""

    @property
    def source(self) -> str:
        """Where it came from: a hub id with its commit, the path of a folder, or a name."""

    @property
    def revision(self) -> str:
        """The commit of a hub repository, or `sha256:<content hash>`."""

    @property
    def license(self) -> str: ...

    @property
    def sha256(self) -> str:
        """The hash of its content."""


def provenance(donor: Donor) -> dict[str, Any]:
    """The record of a donor that cards and JSON files keep: {name, revision, sha256, license}.

    That of a quantised donor, or of one that comes from a GGUF file, has `quantisation` as well, and `base_models`
    where the file names those.
    """
    record: dict[str, Any] = {"name": donor.name, "revision": donor.revision, "sha256": donor.sha256}
    record["license"] = donor.license
    if str(donor.quantisation):
        record["quantisation"] = str(donor.quantisation)
    base_models = getattr(donor, "base_models", ())
    return {**record, "base_models": list(base_models)} if base_models else record


def size_gap(donor: Donor, blueprint: Blueprint) -> float:
    """|log| of the ratio of the numbers of weights of a donor and a target."""
    return abs(math.log(donor.parameters / blueprint.parameters))


def dissimilarity(donor: Donor, blueprint: Blueprint) -> tuple[bool, float]:
    """A sort key, the most similar donor first: (whether the architecture differs, the size gap)."""
    source, target = donor.blueprint.metadata, blueprint.metadata
    return source is None or target is None or source.architecture != target.architecture, size_gap(donor, blueprint)
