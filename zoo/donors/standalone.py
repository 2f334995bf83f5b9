"""A zoo of one: a checkpoint folder or a hub id that a command is given instead of a zoo."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from zoo.checkpoints.checkpoint import check_against_blueprint
from zoo.checkpoints.sources import Source, obtain, resolve
from zoo.donors.store import RECORD, Chosen, Donor, content_hash
from zoo.errors import UserError


class Lone(Donor):
    """A donor outside a zoo: its record is made on the spot, its name is that of its source."""

    @property
    def name(self) -> str:
        return self.record["name"]


class Single(Chosen):
    """The zoo that holds one donor; `path` is the donor's folder."""

    @property
    def only(self) -> Donor:
        return self.members[0]


def lone_name(source: Source) -> str:
    """What a donor outside a zoo is called: its hub id, or the name of its folder."""
    return source.repo or source.names[0]


def single(source: str | Path | Source, quiet: bool = False) -> Single:
    """source: a folder or a hub id (org/name[@revision]), fetched if need be. UserError as for `zoo add`."""
    resolved = source if isinstance(source, Source) else resolve(str(source))
    checkpoint, files = obtain(resolved, quiet)
    check_against_blueprint(checkpoint)
    sha256 = content_hash(files)
    record = {
        "name": lone_name(resolved),
        "source": resolved.given,
        "revision": resolved.commit or f"sha256:{sha256}",
        "license": resolved.license,
        "sha256": sha256,
        "files": files,
    }
    folder = checkpoint.folder
    return Single(folder, (Lone(folder, checkpoint.config, checkpoint.entries, checkpoint.files, record),))


def open_donor(folder: str | Path) -> Donor:
    """The donor that lies in a folder, whether a zoo recorded it or not."""
    return Donor.open(folder) if (Path(folder) / RECORD).is_file() else single(folder).only


def kept(donor: Donor) -> dict[str, str]:
    """What a fitted sampler keeps of a donor whose weights it reads while sampling, for `reopen`. Raises UserError for
    a module in memory, which has no files."""
    if not donor.files:
        raise UserError(f"{donor.name}: is a module in memory, and a fitted sampler that reads it cannot be saved")
    return {"folder": str(donor.folder.resolve()), "sha256": donor.sha256}


def reopen(kept: Mapping[str, str], who: str) -> Donor:
    """The donor that `kept` was taken of. UserError where it is gone or not what it was; `who` was fitted to it."""
    donor = open_donor(kept["folder"])
    if donor.sha256 != kept["sha256"]:
        raise UserError(f"{donor.folder}: is not the donor that {who} was fitted to: fit it again")
    return donor
