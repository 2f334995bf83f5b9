"""Donors whose weights lie in a folder: in a zoo, or alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.files import content_hash, expect, file_hash
from zoo.checkpoints.quantised import Quantisation, find_quantised
from zoo.checkpoints.side_files import names_in_earlier_hash, vocabulary_file
from zoo.checkpoints.sources import Source, open_source, resolve_source
from zoo.donors.donor import Donor
from zoo.donors.layout import RECORD
from zoo.donors.model_checkpoint import ModelCheckpoint, check_against_blueprint, describe_reading
from zoo.donors.records import read_record
from zoo.errors import UserError
from zoo.vocabulary import read_vocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FolderDonor(ModelCheckpoint):
    """A checkpoint with a name and a provenance."""

    name: str
    source: str
    revision: str
    license: str
    sha256: str  # of the names and hashes of its files, sorted

    def vocabulary(self) -> dict[str, int] | None:
        """Token string -> id, added tokens included. None without a tokenizer; UserError for one that is damaged."""
        return super().vocabulary() if "tokenizer.json" in self.files else self._slow_vocabulary

    @cached_property
    def _slow_vocabulary(self) -> dict[str, int] | None:
        """The vocabulary of a tokenizer in an older format, which takes seconds to read."""
        return None if vocabulary_file(self.files) is None else read_vocabulary(self.folder)


@dataclass(frozen=True, eq=False)
class ZooDonor(FolderDonor):
    """A donor of a zoo; its name is that of its folder."""

    stored_as: str = ""  # how the GGUF file that it comes from stored its tensors
    base_models: tuple[str, ...] = ()  # that the GGUF file names

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """UserError if the folder is not a complete donor of a zoo."""
        record = read_record(Path(folder))
        base = Checkpoint.open(folder)
        provenance = (record["source"], record["revision"], record["license"], record["sha256"])
        gguf = record.get("gguf", {})
        where = f"{base.folder / RECORD}: gguf"
        origin = (
            (expect(gguf, "quantisation", str, where), tuple(expect(gguf, "base_models", [str], where)))
            if gguf
            else ("", ())
        )
        return cls(base.folder, base.config, base.entries, base.files, base.folder.name, *provenance, *origin)

    @cached_property
    def quantisation(self) -> Quantisation:
        """As that of a checkpoint, and how a GGUF file stored the tensors, which are plain values here."""
        return replace(find_quantised(self.entries, self.config), origin=self.stored_as)


@dataclass(frozen=True, eq=False)
class StandaloneDonor(FolderDonor):
    """A donor outside a zoo: a checkpoint folder or a hub repository that a command gets instead of a zoo."""

    @classmethod
    def open(cls, folder: str | Path | Source, quiet: bool = False) -> Self:
        """folder: a folder or a hub id (org/name[@revision]), downloaded if needed. UserError as for `zoo add`."""
        source = folder if isinstance(folder, Source) else resolve_source(str(folder))
        if source.folder is not None:  # before its files are hashed
            check_against_blueprint(ModelCheckpoint.open(source.folder))
        base, files = open_source(source, quiet)
        sha256 = content_hash(files)
        revision = source.commit or f"sha256:{sha256}"
        provenance = (source.address, revision, source.license, sha256)
        donor = cls(base.folder, base.config, base.entries, base.files, standalone_name(source), *provenance)
        check_against_blueprint(donor)
        for line in [] if quiet else describe_reading(donor):
            log.info("%s: %s", donor.name, line)
        return donor


def standalone_name(source: Source) -> str:
    """The name of a donor outside a zoo: its hub id, or the name of its folder."""
    return source.repo or source.names[0]


def open_donor(folder: str | Path) -> FolderDonor:
    """The donor in a folder, of a zoo or not."""
    return ZooDonor.open(folder) if (Path(folder) / RECORD).is_file() else StandaloneDonor.open(folder)


def donor_ref(donor: Donor) -> dict[str, str]:
    """What a saved sampler keeps of a donor whose weights it reads while it samples: {folder, sha256}, for `open_ref`.

    UserError for a module in memory, which has no folder.
    """
    if not isinstance(donor, FolderDonor):
        raise UserError(f"{donor.name}: is a module in memory, and a fitted sampler that reads it cannot be saved")
    return {"folder": str(donor.folder.resolve()), "sha256": donor.sha256}


def open_ref(ref: Mapping[str, str], method: str) -> FolderDonor:
    """The donor of a `donor_ref`. UserError where it is gone or has changed since `method` was fitted to it."""
    donor = open_donor(ref["folder"])
    if ref["sha256"] != donor.sha256 and ref["sha256"] != _earlier_sha256(donor):
        raise UserError(f"{donor.folder}: is not the donor that {method} was fitted to; fit it again")
    return donor


def _earlier_sha256(donor: FolderDonor) -> str:
    """The content hash of a donor as fitted samplers kept it before it covered chat templates and slow tokenizers."""
    names = names_in_earlier_hash(donor.files)
    if len(names) == len(donor.files):
        return donor.sha256
    return content_hash({name: {"sha256": file_hash(donor.folder / name)} for name in names})
