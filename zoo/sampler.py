"""The interface that every method implements, the diffusion included."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.checkpoints.atomic import replace_file, replacement_file
from zoo.checkpoints.files import expect, file_hash, read_json
from zoo.checkpoints.headers import read_header
from zoo.donors.donor import provenance
from zoo.donors.zoo import Zoo
from zoo.errors import UserError, unknown
from zoo.options import bounds_problem, type_name
from zoo.sandbox import library_errors
from zoo.targets.blueprint import Blueprint
from zoo.tensors import TensorSpec

SAME_MACHINE = "same bytes on the same machine with the same versions, kind of device and number of threads"


@dataclass(kw_only=True)
class Sampler(ABC):
    """A method that fills a blueprint. Subclasses are keyword-only dataclasses; their fields are their options."""

    name: ClassVar[str]
    family: ClassVar[str]
    summary: ClassVar[str]  # one line
    reference: ClassVar[str]  # arXiv id or repository
    # What it needs: donor (one), donors (several), model (a trained pipeline), text; LoRA: base, reference
    needs: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}  # option -> the values that it can have
    on_other_machines: ClassVar[str] = "equal up to rounding errors"  # what the same options and seed give there

    device: str = "cpu"  # where it computes, and with CUDA draws (`zoo.streams.stream`); results return to the CPU

    # The names of the tensors that are wanted of `sample`, None for all. One of several processes sets it: `sample` may
    # then leave others out. It changes nothing of the tensors that are wanted.
    only: frozenset[str] | None = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for key, values in self.choices.items():
            if getattr(self, key) not in values:
                raise unknown(f"{key} of {self.name}", str(getattr(self, key)), values)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if problem := bounds_problem(field, value):
                raise UserError(f"{self.name}: {field.name} is {value}; give {problem}")

    @abstractmethod
    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        """Learns from the donors what the method needs for this target, and returns itself.

        UserError, before any long work, where no donor fits or the target is not supported.
        """

    @abstractmethod
    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        """Yields (name on disk, tensor on the CPU of the spec's shape, any dtype) for every tensor that it models.

        The other tensors keep the architecture's default initialisation. Equal seeds give equal bytes. Tensors that
        are not in `only` may be left out.
        """

    @property
    def donors(self) -> tuple[str, ...]:
        """The names of the donors that the fitted sampler uses."""
        return ()

    @classmethod
    def reproducibility(cls) -> str:
        """What the same options, donors and seed give again, for `headstart.json`."""
        return f"{SAME_MACHINE}; on other machines {cls.on_other_machines}"

    def provenance(self, zoo: Zoo | None) -> list[dict[str, Any]]:
        """[{name, revision, sha256, license}] of the donors that it uses, for cards and `headstart.json`."""
        return [provenance(zoo.donor(name)) for name in self.donors] if zoo is not None else []

    def details(self, blueprint: Blueprint) -> dict[str, Any]:
        """What `headstart.json` says of a fitted sampler besides its options and donors: key -> JSON value."""
        return {}

    def planned_donors(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        """The names of the donors whose weights `fit` or `sample` would read, for `--plan`. Reads no weight itself."""
        return tuple(d.name for d in zoo.donors) if zoo is not None and "donors" in self.needs else ()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `fit` learned: JSON values and tensors, for `restore`."""
        return {}, {}

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:  # noqa: B027  (most have no state)
        """Puts the result of `state` into a new instance with the same options."""

    def save(self, folder: str | Path) -> None:
        """Writes the fitted sampler: sampler.json {method, options, state, seal} and state.safetensors."""
        folder = Path(folder)
        values, tensors = self.state()
        for file in ("sampler.json", "state.safetensors"):  # of a sampler saved here before
            (folder / file).unlink(missing_ok=True)
        if tensors:
            with replacement_file(folder / "state.safetensors") as partial:
                save_file({k: t.contiguous() for k, t in tensors.items()}, partial)
        content = {"method": self.name, "options": self.options(), "state": values}
        content["seal"] = _seal(content, folder)
        replace_file(folder / "sampler.json", (json.dumps(content, indent=2) + "\n").encode())  # last: it is complete

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """A fitted sampler of this class that `save` wrote. UserError where there is none, or one of another method."""
        path = Path(folder) / "sampler.json"
        if not path.is_file():
            raise UserError(f"{folder}: has no sampler.json; give a folder with a saved sampler")
        content, advice = read_json(path), "fit the sampler and save it again"
        for key, kind in (("method", str), ("options", dict), ("state", dict)):
            expect(content, key, kind, str(path), advice)
        if content["method"] != cls.name:
            raise UserError(f"{path}: is a sampler of method {content['method'][:60]!r}, not {cls.name!r}")
        if "seal" in content and content["seal"] != _seal(content, path.parent):  # older ones have none
            raise UserError(f"{path}: it or its tensors were changed after they were saved; {advice}")
        stored = path.with_name("state.safetensors")
        with library_errors(f"{path}: cannot be opened", advice):
            sampler = cls(**cls.current_options(content["options"]))
            sampler.restore(content["state"], load_file(stored) if stored.exists() and read_header(stored) else {})
        return sampler

    @classmethod
    def current_options(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """The saved options that still exist. A method that has lost an option overrides this."""
        return saved

    @classmethod
    def option_table(cls) -> list[dict[str, Any]]:
        """[{name, type, default, help}] of the options, for `headstart methods` and the README."""
        return [
            {"name": f.name, "type": type_name(f), "default": f.default, "help": f.metadata["help"]}
            for f in dataclasses.fields(cls)
            if "help" in f.metadata
        ]

    def options(self) -> dict[str, Any]:
        """The options of this instance as JSON values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if "help" in f.metadata}


def wanted_specs(blueprint: Blueprint, only: Collection[str] | None) -> list[TensorSpec]:
    """The specs of the names in `only`, in the blueprint's order; all where that is None."""
    return [spec for spec in blueprint.specs if only is None or spec.name in only]


def _seal(content: dict[str, Any], folder: Path) -> str:
    """sha256 of a saved sampler: of its JSON object without the seal, and of its tensors."""
    stored = folder / "state.safetensors"
    parts = {k: v for k, v in content.items() if k != "seal"} | {
        "tensors": file_hash(stored) if stored.exists() else None
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
