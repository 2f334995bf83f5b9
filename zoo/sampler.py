"""The one interface that every method implements, the diffusion included."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

if TYPE_CHECKING:
    from zoo.blueprint import Blueprint
    from zoo.store import Zoo


def option(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field that is an option of a sampler: `--set NAME=VALUE` on the command line."""
    return dataclasses.field(default=default, metadata={"help": help, **extra})


@dataclass(kw_only=True)
class Sampler(ABC):
    """Fills a blueprint. Subclasses are keyword-only dataclasses whose fields are their options.

    fit(zoo, blueprint)    learns what is needed from the donors and refuses (UserError) what does not fit, before
                           any long work; returns self
    sample(blueprint, seed) yields (disk name, tensor on the CPU, of the spec's shape) for every tensor that the
                           method models, in any dtype (the writer casts); whatever it leaves out keeps the
                           architecture's default initialisation. Same seed, same bytes.
    donors                 names of the donors that the fitted sampler used
    """

    name: ClassVar[str]
    family: ClassVar[str]
    summary: ClassVar[str]  # one line
    reference: ClassVar[str]  # arXiv id or repository
    needs: ClassVar[tuple[str, ...]] = ()  # of: donor (one), donors (several), model (a trained pipeline)

    @abstractmethod
    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self: ...

    @abstractmethod
    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]: ...

    @property
    def donors(self) -> tuple[str, ...]:
        return ()

    @classmethod
    def option_table(cls) -> list[dict[str, Any]]:
        """[{name, type, default, help}] of the options, for `headstart methods` and the README."""
        return [
            {"name": f.name, "type": str(f.type), "default": f.default, "help": f.metadata["help"]}
            for f in dataclasses.fields(cls)
            if "help" in f.metadata
        ]

    def options(self) -> dict[str, Any]:
        """The options of this instance as JSON values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if "help" in f.metadata}
