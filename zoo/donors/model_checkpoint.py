"""A checkpoint together with the blueprint that its config describes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.headers import Entry
from zoo.checkpoints.quantised import ADVICE, is_code, packed_by, refuse_unreadable, without_quantisation
from zoo.donors.disk_names import find_disk_names
from zoo.errors import UserError, unknown
from zoo.limits import MAX_UNKNOWN_VALUES
from zoo.targets.blueprint import Blueprint
from zoo.words import shortened_list

VALUES_COMPARED = 1 << 24  # of two tied tensors at a time
_blueprints: dict[str, Blueprint] = {}  # by config: the donors of a zoo often share one shape


@dataclass(frozen=True, eq=False)
class ModelCheckpoint(Checkpoint):
    """A checkpoint whose tensors are found by their names on disk and by the names of its blueprint."""

    @cached_property
    def blueprint(self) -> Blueprint:
        """The tensors that config.json describes, as transformers loads them.

        Where the config ties two tensors and the files have both with different values, nothing is tied, and the
        blueprint's config says so. A quantization_config is left out, because weights are dequantised when they are
        read. UserError as for `Blueprint.from_config`, and for a quantisation that is not read.
        """
        tied = self._blueprint_of_config
        if not self.differing_ties:
            return tied
        assert tied.config is not None
        untied = _cached_blueprint(_without_ties(tied.config), str(self.folder / "config.json"))
        for name in self.differing_ties:
            if name not in untied:
                raise UserError(
                    f"{self.folder}: {name!r} and {tied.ties[name]!r} are one tensor in this architecture and have"
                    " different values; take both from the same checkpoint"
                )
        return untied

    @cached_property
    def _blueprint_of_config(self) -> Blueprint:
        refuse_unreadable(self.config, str(self.folder / "config.json"))
        return _cached_blueprint(without_quantisation(self.config), str(self.folder / "config.json"))

    @cached_property
    def differing_ties(self) -> tuple[str, ...]:
        """The names that the config ties to others although the files have different values for the two."""
        blueprint = self._blueprint_of_config
        names = find_disk_names(blueprint, self.entries, blueprint.ties, str(self.folder))
        found = []
        for tied, stored in blueprint.ties.items():
            on_disk = names.get(stored, stored)
            prefix = on_disk.removesuffix(stored) if on_disk.endswith(stored) else ""
            twin = prefix + tied if prefix + tied in self.entries else tied
            if twin in self.entries and on_disk in self.entries and twin != on_disk:
                fits = stored in blueprint and self.entries[on_disk].shape == blueprint[stored].shape
                if fits and not self._is_equal(self.entries[twin], self.entries[on_disk]):
                    found.append(tied)
        return tuple(found)

    def _is_equal(self, a: Entry, b: Entry) -> bool:
        """Whether two tensors have the same shape and values. Reads a part of each at a time, where dtypes agree."""
        if a.shape != b.shape:
            return False
        if a.dtype != b.dtype or a.name in self.quantisation.weights or b.name in self.quantisation.weights:
            return torch.equal(super().read(a.name, torch.float32), super().read(b.name, torch.float32))
        count = math.prod(a.shape)
        for begin in range(0, count, VALUES_COMPARED):
            end = min(begin + VALUES_COMPARED, count)
            x, y = self.read_values(a, begin, end), self.read_values(b, begin, end)
            same_bytes = torch.equal(x.view(torch.uint8), y.view(torch.uint8))
            if not same_bytes and not torch.equal(x.double(), y.double()):  # -0 equals 0
                return False
        return True

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Name in the blueprint -> name on disk, where the two differ. UserError as `find_disk_names`."""
        return find_disk_names(self.blueprint, self.entries, self._blueprint_of_config.ties, str(self.folder))

    def entry(self, name: str) -> Entry:
        """Where a tensor lies, by its name on disk or in the blueprint. UserError for an unknown name."""
        if name in self.entries:
            return self.entries[name]
        if name in self.aliases:
            return self.entries[self.aliases[name]]
        raise unknown(f"tensor of {self.folder.name}", name, self.entries)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, as `Checkpoint.read`. UserError also for a weight that is stored as codes without a scale, or
        that has another shape than the config says."""
        problem = self.weight_problem(name)
        if problem:
            raise UserError(f"{self.folder}: {problem}")
        return super().read(name, dtype)

    def weight_problem(self, name: str) -> str | None:
        """Why a stored tensor cannot be the weight of the blueprint, None where it can or where it is no weight."""
        entry = self.entry(name)
        problem = self._codes_problem(name, entry)
        if problem is None and name in self.blueprint and self.blueprint[name].shape != entry.shape:
            described = list(self.blueprint[name].shape)
            return (
                f"config.json and weights disagree: {name!r} has shape {list(entry.shape)}, the config describes"
                f" {described}; take both from the same checkpoint"
            )
        return problem

    def _codes_problem(self, name: str, entry: Entry) -> str | None:
        if not is_code(entry.dtype) or entry.name in self.quantisation.weights:
            return None
        if name in self.blueprint and not self.blueprint[name].dtype.is_floating_point:
            return None  # a counter, a mask
        if name not in self.blueprint and entry.name not in self.quantisation.problems:
            return None  # not used as a weight
        why = self.quantisation.problems.get(entry.name, "codes of this kind are not read")
        dtype = str(entry.dtype).removeprefix("torch.")
        return f"{name!r} holds {dtype} codes instead of weights, and {why}; {ADVICE}"


def with_blueprint(checkpoint: Checkpoint) -> ModelCheckpoint:
    return ModelCheckpoint(checkpoint.folder, checkpoint.config, checkpoint.entries, checkpoint.files)


def check_against_blueprint(checkpoint: ModelCheckpoint) -> tuple[str, ...]:
    """Checks that every tensor of the blueprint is there with its shape, and returns the names that are not in it.

    Those are old buffers and heads of other tasks. A tied tensor that is stored as well is not among them. Reads no
    weights, except two tensors that the config ties. UserError where a tensor is missing, has another shape or is
    stored as codes that are not read, and where the tensors outside the blueprint are larger than the model.
    """
    blueprint = checkpoint.blueprint
    missing = [n for n in blueprint.names if n not in checkpoint.entries and n not in checkpoint.aliases]
    if missing:
        raise UserError(_missing_tensors(checkpoint, missing))
    for spec in blueprint.specs:
        problem = checkpoint.weight_problem(spec.name)
        if problem:
            raise UserError(f"{checkpoint.folder}: {problem}")
    known = {checkpoint.entry(n).name for n in blueprint.names} | set(blueprint.ties)
    unknown_names = tuple(n for n in checkpoint.names if n not in known)
    _check_unknown_size(checkpoint, unknown_names)
    return unknown_names


def describe_reading(checkpoint: ModelCheckpoint) -> list[str]:
    """What is read otherwise than the files and the config say: one line each."""
    lines = []
    quantisation = checkpoint.quantisation
    if quantisation.weights:
        lines.append(f"quantised, read as float32 values: {quantisation}")
    if quantisation.ignored:
        count, first = len(quantisation.ignored), quantisation.ignored[0]
        lines.append(f"{count} scales of activations are left out ({first}, …)")
    wrapped = [(n, on_disk) for n, on_disk in checkpoint.aliases.items() if on_disk != n and on_disk.endswith(n)]
    if wrapped:
        name, on_disk = wrapped[0]
        lines.append(f"the names of its tensors are read without the prefix {on_disk.removesuffix(name)!r}")
    for name in checkpoint.differing_ties:
        lines.append(f"its config ties {name!r} and the files have other values for it, which are used")
    return lines


def _missing_tensors(checkpoint: ModelCheckpoint, missing: list[str]) -> str:
    """The message for tensors that the config describes and the files do not have."""
    adapted = next((n for n in checkpoint.entries if ".base_layer." in n or ".lora_A." in n), None)
    packed = packed_by(checkpoint.entries)
    if adapted is not None:
        return (
            f"{checkpoint.folder}: {adapted!r} belongs to a PEFT model whose adapter is not merged; call"
            " merge_and_unload() and save the model that it returns"
        )
    if packed is not None:
        return f"{checkpoint.folder}: {packed}, which is not read; {ADVICE}"
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    return (
        f"{checkpoint.folder}: config.json and weights disagree: the config describes {missing[0]!r}{more}, which is"
        f" missing; the files have {shortened_list(checkpoint.entries, 2)}; take both from the same checkpoint"
    )


def _check_unknown_size(checkpoint: ModelCheckpoint, names: tuple[str, ...]) -> None:
    """UserError where the tensors outside the blueprint have more values than the model, so that reading takes long."""
    sizes = {name: math.prod(checkpoint.entries[name].shape) for name in names}
    if sum(sizes.values()) > max(MAX_UNKNOWN_VALUES, checkpoint.blueprint.parameters):
        largest = max(sizes, key=sizes.__getitem__)
        shape = list(checkpoint.entries[largest].shape)
        raise UserError(
            f"{checkpoint.folder}: {largest!r} of shape {shape} does not belong to the architecture in config.json, and"
            " such tensors are larger than the model; take them out"
        )


def _cached_blueprint(config: dict[str, Any], where: str) -> Blueprint:
    """The blueprint of a parsed config. where: its name in errors."""
    key = json.dumps(config, sort_keys=True)
    if key not in _blueprints:
        _blueprints[key] = Blueprint.from_config(config, where)
    return _blueprints[key]


def _without_ties(config: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed config.json whose model has a head of its own."""
    inner = {k: _without_ties(v) for k, v in config.items() if isinstance(v, Mapping) and "tie_word_embeddings" in v}
    return {**config, **inner, "tie_word_embeddings": False}
