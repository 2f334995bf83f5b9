"""The files of a checkpoint, copied into a donor's folder and measured on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoo.checkpoints.atomic import remove_temporaries, replacement_file
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.files import FileHashes, file_hash
from zoo.donors.layout import ROWS
from zoo.donors.measures import CHUNK, Measure, MeasuredFile, measure_checkpoint, measure_file
from zoo.donors.model_checkpoint import ModelCheckpoint
from zoo.errors import UserError
from zoo.filling.present import missing_files
from zoo.filling.publish import write_donor_rows

Tick = Callable[[int], object]


def copy_checkpoint(
    folder: Path, checkpoint: Checkpoint, expected: FileHashes | None, tick: Tick
) -> tuple[FileHashes, dict[str, Measure]]:
    """Copies a checkpoint's files into `folder`. Returns the hashes of the files and the measures of the tensors.

    The bytes that are hashed and measured are those that are written. Complete files of an interrupted add are kept,
    where the source still has the same bytes. tick: called with the number of bytes of each step.

    UserError for NaN and infinity, and where the source has changed: where a file has another hash than `expected`, or
    another size, time of modification or inode than before it was copied, or where the copy is another checkpoint.
    """
    folder.mkdir(exist_ok=True)
    remove_temporaries(folder)
    for path in folder.iterdir():
        if path.name not in checkpoint.files:  # of an earlier state of the source
            path.unlink()
    before = _file_states(checkpoint)
    hashes: FileHashes = {}
    measures: dict[str, Measure] = {}
    for file in checkpoint.files:
        copied = _keep_file(folder / file, checkpoint, tick) or copy_file(folder / file, checkpoint, tick)
        if expected is not None and copied.sha256 != expected[file]["sha256"]:
            raise _changed(checkpoint.folder / file)
        hashes[file] = {"size": copied.size, "sha256": copied.sha256}
        measures |= copied.measures
    after = _file_states(checkpoint)
    for file, state in before.items():
        if after[file] != state:
            raise _changed(checkpoint.folder / file)
    copy = Checkpoint.open(folder)
    if (copy.entries, copy.config, copy.files) != (checkpoint.entries, checkpoint.config, checkpoint.files):
        raise _changed(checkpoint.folder)
    return hashes, measures


def _keep_file(target: Path, checkpoint: Checkpoint, tick: Tick) -> MeasuredFile | None:
    """Measures a file that an interrupted add completed; None where it is missing or the source has other bytes."""
    source = checkpoint.folder / target.name
    if not target.exists() or target.stat().st_size != source.stat().st_size:
        return None
    measured = measure_file(checkpoint, target)
    if measured.sha256 != file_hash(source):
        return None
    tick(measured.size)
    return measured


def copy_file(target: Path, checkpoint: Checkpoint, tick: Tick = lambda n: None) -> MeasuredFile:
    """Copies the file with the name of `target` from a checkpoint and measures its tensors."""
    with replacement_file(target) as partial, partial.open("wb") as out:

        def write(raw: memoryview) -> None:
            out.write(raw)
            tick(len(raw))

        return measure_file(checkpoint, checkpoint.folder / target.name, write)


def _file_states(checkpoint: Checkpoint) -> dict[str, tuple[int, int, int]]:
    """(size, time of modification, inode) of every file, which change when a file is written or replaced."""
    try:
        states = {file: (checkpoint.folder / file).stat() for file in checkpoint.files}
    except OSError as error:
        raise _changed(checkpoint.folder) from error
    return {file: (state.st_size, state.st_mtime_ns, state.st_ino) for file, state in states.items()}


def _changed(path: Path) -> UserError:
    return UserError(f"{path}: changed while it was read; add it again when nothing writes to it")


def restore_files(home: Path, checkpoint: ModelCheckpoint, record: dict[str, Any]) -> None:
    """Restores the files, and the rows of the manifest, that a donor has lost since it was added."""
    for file in missing_files(home, record):
        _restore_file(checkpoint.folder / file, home / file, record["files"][file]["sha256"])
    if not (home / ROWS).exists():
        measures = {name: m for file in measure_checkpoint(checkpoint) for name, m in file.measures.items()}
        write_donor_rows(home, home.name, checkpoint, record, measures)


def _restore_file(source: Path, target: Path, sha256: str) -> None:
    """Copies one file. UserError where the bytes have another hash."""
    with replacement_file(target) as partial:
        if copy_and_hash(source, partial) != sha256:
            raise _changed(source)


def copy_and_hash(source: Path, target: Path, tick: Tick = lambda n: None) -> str:
    """Writes the bytes of a file to another. Returns their sha256. tick: as for `copy_checkpoint`."""
    digest = hashlib.sha256()
    with source.open("rb") as file, target.open("wb") as out:
        while raw := file.read(CHUNK):
            digest.update(raw)
            out.write(raw)
            tick(len(raw))
    return digest.hexdigest()
