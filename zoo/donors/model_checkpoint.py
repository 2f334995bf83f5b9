"""A checkpoint together with the blueprint that its config describes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property

from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.headers import Entry
from zoo.errors import UserError, unknown
from zoo.targets.blueprint import Blueprint

_blueprints: dict[str, Blueprint] = {}  # by config: the donors of a zoo often share one shape


@dataclass(frozen=True, eq=False)
class ModelCheckpoint(Checkpoint):
    """A checkpoint whose tensors are found by their names on disk and by the names of its blueprint."""

    @cached_property
    def blueprint(self) -> Blueprint:
        """The tensors that config.json describes. UserError as `Blueprint.from_config`."""
        key = json.dumps(self.config, sort_keys=True)
        if key not in _blueprints:
            _blueprints[key] = Blueprint.from_config(self.folder / "config.json")
        return _blueprints[key]

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Name in the blueprint -> name on disk, where the two differ.

        A checkpoint saved from a base model lacks the prefix of the head model (`h.0…` for `transformer.h.0…`), or has
        it although the blueprint does not. Some checkpoints store the head of a tied pair instead of the embedding.
        """
        names = self.blueprint.names
        twins = {stored: tied for tied, stored in self.blueprint.ties.items()}
        prefixes = sorted({n.split(".")[0] + "." for n in names})
        disk_prefixes = sorted({n.split(".")[0] + "." for n in self.entries})
        aliases: dict[str, str] = {}
        for name in names:
            if name in self.entries:
                continue
            candidates = [
                *(name.removeprefix(prefix) for prefix in prefixes),
                *(prefix + name for prefix in disk_prefixes),
                twins.get(name, name),
            ]
            alias = next((candidate for candidate in candidates if candidate in self.entries), None)
            if alias is not None:
                aliases[name] = alias
        return aliases

    def entry(self, name: str) -> Entry:
        """Where a tensor lies, by its name on disk or in the blueprint. UserError for an unknown name."""
        if name in self.entries:
            return self.entries[name]
        if name in self.aliases:
            return self.entries[self.aliases[name]]
        raise unknown(f"tensor of {self.folder.name}", name, self.entries)


def with_blueprint(checkpoint: Checkpoint) -> ModelCheckpoint:
    return ModelCheckpoint(checkpoint.folder, checkpoint.config, checkpoint.entries, checkpoint.files)


def check_against_blueprint(checkpoint: ModelCheckpoint) -> tuple[str, ...]:
    """Checks that every tensor of the blueprint is there with its shape, and returns the names that are not in it.

    Those are old buffers and heads of other tasks. A tied tensor that is stored as well is not among them. UserError
    where a tensor is missing or has another shape.
    """
    blueprint = checkpoint.blueprint
    where = f"{checkpoint.folder}: config.json and weights disagree:"
    advice = "take both from the same checkpoint"
    missing = [n for n in blueprint.names if n not in checkpoint.entries and n not in checkpoint.aliases]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{where} the config describes {missing[0]!r}{more}, which is missing; {advice}")
    for spec in blueprint.specs:
        shape = checkpoint.entry(spec.name).shape
        if shape != spec.shape:
            raise UserError(
                f"{where} {spec.name!r} has shape {list(shape)}, the config describes {list(spec.shape)}; {advice}"
            )
    known = {checkpoint.entry(n).name for n in blueprint.names} | set(blueprint.ties)
    return tuple(n for n in checkpoint.entries if n not in known)
