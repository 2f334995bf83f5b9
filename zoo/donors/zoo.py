"""The zoo: the donors of a folder with a manifest, or any donors at hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from zoo.checkpoints.sources import Source
from zoo.donors.donor import Donor
from zoo.donors.folder import StandaloneDonor, ZooDonor
from zoo.donors.layout import MANIFEST, donor_folder
from zoo.donors.manifest import read_manifest
from zoo.errors import UserError, unknown
from zoo.words import shortened_list


@dataclass(frozen=True, repr=False)
class Zoo:
    """Donors that samplers learn from.

    Make one with `Zoo.open(path)` (a folder that `headstart zoo add` filled), `open_standalone(source)` (one folder or
    hub id) or `zoo_of({"name": module})` (trained modules in memory). Its parts are `zoo.names`, `zoo.donors` and
    `zoo.donor(name)`; weights are read from disk only when they are needed.

    path     the zoo's folder, or where the donors come from
    members  the donors, in order; None for those of the manifest at `path`
    """

    path: Path
    members: tuple[Donor, ...] | None = None

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The zoo in a folder. UserError where there is none."""
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise UserError(f"{path}: is not a zoo (no {MANIFEST}); fill one with `headstart zoo add` or `zoo train`")
        return cls(path)

    @classmethod
    def of_donors(cls, donors: Iterable[Donor], path: str | Path = "memory") -> Self:
        """The zoo of these donors, in this order; `path` says where they come from."""
        return cls(Path(path), tuple(donors))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the donors, sorted for a zoo in a folder. Only folders that the manifest lists are donors."""
        if self.members is not None:
            return tuple(donor.name for donor in self.members)
        return tuple(sorted(set(read_manifest(self.path)["model"].to_pylist())))

    @cached_property
    def donors(self) -> tuple[Donor, ...]:
        """The donors, in the order of their names. UserError where one is incomplete or damaged."""
        if self.members is not None:
            return self.members
        return tuple(ZooDonor.open(donor_folder(self.path, name)) for name in self.names)

    def donor(self, name: str) -> Donor:
        """The donor of this name. UserError where there is none."""
        if name not in self.names:
            raise unknown(f"donor in {self.path}", name, self.names)
        return next(d for d in self.donors if d.name == name)

    def __repr__(self) -> str:
        try:
            names = self.names
        except UserError as error:
            return f"Zoo({str(self.path)!r}, not readable: {error})"
        return f"Zoo({str(self.path)!r}, {len(names)} donors: {shortened_list(names)})"


def open_standalone(source: str | Path | Source, quiet: bool = False) -> Zoo:
    """The zoo of one donor: a folder or a hub id (org/name[@revision]). UserError as for `StandaloneDonor.open`."""
    donor = StandaloneDonor.open(source, quiet)
    return Zoo.of_donors([donor], donor.folder)
