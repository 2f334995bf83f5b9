"""Joins zoos that were filled apart: their donors become donors of one zoo, each content once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zoo.checkpoints.atomic import (
    disk_errors,
    existing_parents,
    hold_lock,
    remove_temporaries,
    rename_folder,
    replacement_file,
)
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.files import file_hash
from zoo.checkpoints.hub import HUB_ID
from zoo.checkpoints.sources import folder_names, hub_names
from zoo.donors.layout import MANIFEST, RECORD, ROWS, donor_folder
from zoo.donors.manifest import read_rows, renamed_rows, write_rows
from zoo.donors.records import read_record, write_record
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.filling.copy import copy_and_hash
from zoo.filling.present import missing_files
from zoo.filling.publish import LOCK, check_free_space, merge_manifest, removed_on_error
from zoo.gguf.source import is_gguf_address, names_of_address

LINKED, COPIED = "linked", "copied"


@dataclass(frozen=True)
class MergeReport:
    """What happens, or would happen, to one donor. `read` and `write` are bytes of its files."""

    source: str  # its folder
    name: str  # in the merged zoo
    revision: str
    license: str
    state: str  # new or present in a plan, else added or present
    tensors: int
    files: str | None  # linked or copied; None where the donor is present
    read: int
    write: int


@dataclass(frozen=True)
class _Donor:
    """A donor of one of the zoos that are merged."""

    home: Path
    record: dict[str, Any]

    @property
    def size(self) -> int:
        return sum(stamp["size"] for stamp in self.record["files"].values())


def merge(zoos: Iterable[str | Path], zoo: str | Path, plan: bool = False, quiet: bool = False) -> list[dict[str, Any]]:
    """Makes the donors of `zoos` donors of the zoo at `zoo`, which is created if needed.

    plan  only report what would be done

    A donor whose files have the content of one that is there already, whatever its name, is not added again. One whose
    name belongs to another content gets the next free name: those that `zoo add` would try for its source, then NAME-2,
    NAME-3, …. Files are hard-linked where the disk allows it, else copied; nothing is moved. Zoos and donors are taken
    in the order of `zoos` and of names, so the result is that of one `zoo add` of all sources in this order.

    Returns for each donor {source, name, revision, license, state, tensors, files, read, write}. Notes of other names
    go to stderr. The manifest is written last. An interrupted merge leaves a hidden folder in models/, and the next one
    continues it. UserError: not a zoo, a zoo inside the other, an incomplete donor, a full disk.
    """
    zoo, folders = Path(zoo), [Path(folder) for folder in zoos]
    if zoo.exists() and not zoo.is_dir():
        raise UserError(f"{zoo}: is a file; give a folder for the merged zoo")
    for folder in folders:
        _check_places(folder, zoo)
    donors = [donor for folder in folders for donor in _donors(folder)]  # all are checked before the first is added
    if plan:
        taken = _contents(zoo / "models")
        return [asdict(_planned(donor, zoo, taken, quiet)) for donor in donors]
    try:
        return [asdict(_merge_donor(donor, zoo / "models", quiet)) for donor in donors]
    finally:
        if (zoo / "models").exists():
            merge_manifest(zoo)


def _check_places(folder: Path, zoo: Path) -> None:
    """UserError where `folder` is no zoo, or is or holds the zoo that is written, or lies in its models/."""
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: is not a zoo (no {MANIFEST}); fill one with `headstart zoo add` or `zoo train`")
    source, target = folder.resolve(), zoo.resolve()
    if source == target:
        raise UserError(f"{folder}: is the zoo that --zoo names; leave it out, its donors stay")
    if target.is_relative_to(source):
        raise UserError(f"{zoo}: lies inside {folder}, which is merged into it; give a folder outside of it")
    if source.is_relative_to(target / "models"):
        raise UserError(f"{folder}: lies inside {zoo}, where its donors go; give a folder outside of it")


def _donors(folder: Path) -> Iterator[_Donor]:
    """The donors of a zoo. UserError for one that is incomplete."""
    for name in Zoo.open(folder).names:
        home = donor_folder(folder, name)
        record = read_record(home)
        broken = missing_files(home, record)
        if not (home / ROWS).is_file() or file_hash(home / ROWS) != record["rows"]:
            broken.append(ROWS)
        if broken:
            advice = f"run `headstart zoo verify --zoo {folder}`"
            raise UserError(f"{home / broken[0]}: is missing, or is not as it was when the donor was added; {advice}")
        yield _Donor(home, record)


def _contents(models: Path) -> dict[str, str | None]:
    """Name -> hash of the content, of every donor in a zoo; None for a folder that is no complete donor."""
    return {
        home.name: read_record(home)["sha256"] if (home / RECORD).exists() else None
        for home in sorted(models.glob("[!.]*/"))
    }


def _name(donor: _Donor, taken: Mapping[str, str | None]) -> tuple[str, bool]:
    """(the name that a donor has or gets in a zoo with these contents, whether it is there already)."""
    present = next((name for name, sha256 in taken.items() if sha256 == donor.record["sha256"]), None)
    if present is not None:
        return present, True
    own = donor.home.name
    names = _possible_names(donor.record["source"])
    candidates = list(names[names.index(own) :]) if own in names else [own]
    candidates += [f"{own}-{number}" for number in range(2, len(taken) + 3)]
    return next(name for name in candidates if name not in taken), False


def _possible_names(address: str) -> tuple[str, ...]:
    """The names that `zoo add` tries for a source; none for what is neither a path nor an address of the hub."""
    if is_gguf_address(address):
        return names_of_address(address)
    if Path(address).is_absolute():
        return folder_names(Path(address))
    repo, _, commit = address.partition("@")
    return hub_names(repo, commit) if HUB_ID.fullmatch(address) and commit else ()


def _note_name(donor: _Donor, name: str, is_present: bool, quiet: bool) -> None:
    """Says on stderr where a donor has another name than before."""
    if name != donor.home.name and not quiet:
        why = f"is the donor {name} already" if is_present else f"is called {name}, because its name is taken"
        print(f"{donor.home}: {why}", file=sys.stderr)


def _report(donor: _Donor, name: str, state: str, files: str | None) -> MergeReport:
    copied = donor.size if files == COPIED else 0
    record, tensors = donor.record, len(Checkpoint.open(donor.home).names)
    source = str(donor.home)
    return MergeReport(source, name, record["revision"], record["license"], state, tensors, files, copied, copied)


def _planned(donor: _Donor, zoo: Path, taken: dict[str, str | None], quiet: bool) -> MergeReport:
    """The report of a donor for a plan; adds it to `taken`."""
    name, is_present = _name(donor, taken)
    _note_name(donor, name, is_present, quiet)
    if is_present:
        return _report(donor, name, "present", None)
    taken[name] = donor.record["sha256"]
    existing = next(folder for folder in (zoo.absolute(), *zoo.absolute().parents) if folder.exists())
    same_disk = existing.stat().st_dev == donor.home.stat().st_dev
    return _report(donor, name, "new", LINKED if same_disk else COPIED)


def _merge_donor(donor: _Donor, models: Path, quiet: bool) -> MergeReport:
    """Adds one donor, where its content is not there already."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors(models))
        stack.enter_context(existing_parents(models))
        staging = models / f".{donor.home.name}-{hashlib.sha256(str(donor.home.resolve()).encode()).hexdigest()[:16]}"
        # Of two processes that merge the same zoo, the second waits here and then finds the donor present.
        stack.enter_context(hold_lock(staging.with_name(f"{staging.name}.lock"), staging))
        name, is_present = _name(donor, _contents(models))
        files = None
        if not is_present:
            stack.enter_context(removed_on_error(staging))
            files = _fill(staging, donor, quiet)
            name, is_present = _publish(staging, donor)
        _note_name(donor, name, is_present, quiet)
    return _report(donor, name, "present" if is_present else "added", None if is_present else files)


def _fill(staging: Path, donor: _Donor, quiet: bool) -> str:
    """Links or copies the donor's files into `staging`. Files of an interrupted merge are kept."""
    staging.mkdir(exist_ok=True)
    remove_temporaries(staging)
    for path in staging.iterdir():
        if path.name not in donor.record["files"]:  # a record of an interrupted merge
            path.unlink()
    files = dict.fromkeys(donor.record["files"], LINKED)
    for file in files:
        if not _link(donor.home / file, staging / file):
            files[file] = COPIED
    copies = [file for file, how in files.items() if how == COPIED]
    if copies:
        _copy_all(staging, donor, copies, quiet)
    return COPIED if copies else LINKED


def _link(source: Path, target: Path) -> bool:
    """Whether the file now has `target` as a second name. False where the disk, or the system, refuses."""
    if target.exists() and os.path.samefile(source, target):
        return True
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _copy_all(staging: Path, donor: _Donor, files: list[str], quiet: bool) -> None:
    """Copies files of a donor. UserError where the disk is full, or the bytes are not those of the donor's record."""
    from tqdm import tqdm

    stamps = donor.record["files"]
    kept = [f for f in files if (staging / f).exists() and file_hash(staging / f) == stamps[f]["sha256"]]
    left = [f for f in files if f not in kept]
    size = sum(stamps[f]["size"] for f in left)
    check_free_space(staging, size)
    with tqdm(total=size, unit="B", unit_scale=True, desc=donor.home.name, disable=quiet) as bar:
        for file in left:
            if _copy(donor.home / file, staging / file, bar.update) != stamps[file]["sha256"]:
                advice = "run `headstart zoo verify` on its zoo"
                raise UserError(f"{donor.home / file}: has changed since the donor was added; {advice}")


def _copy(source: Path, target: Path, tick: Callable[[int], object]) -> str:
    """Copies a file. Returns the sha256 of its bytes."""
    with replacement_file(target) as partial:
        return copy_and_hash(source, partial, tick)


def _publish(staging: Path, donor: _Donor) -> tuple[str, bool]:
    """Gives a donor that is complete in `staging` its rows, its record and its name.

    Returns (the name, whether another process has added the same content meanwhile; then `staging` is removed).
    """
    models = staging.parent
    with hold_lock(models / LOCK, models):
        name, is_present = _name(donor, _contents(models))
        if is_present:
            shutil.rmtree(staging)
            return name, True
        if name == donor.home.name:
            for file in (ROWS, RECORD):
                _copy(donor.home / file, staging / file, lambda n: None)
        else:
            write_rows(staging / ROWS, renamed_rows(read_rows(donor.home / ROWS), name))
            record = {key: value for key, value in donor.record.items() if key not in ("rows", "seal")}
            write_record(staging, record)
        rename_folder(staging, models / name)
        return name, False
