"""The files of a checkpoint, copied into a donor's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoo.checkpoints.atomic import remove_temporaries, replacement_file
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.files import FileHashes, file_hash
from zoo.donors.layout import ROWS
from zoo.donors.manifest import measure
from zoo.donors.model_checkpoint import ModelCheckpoint
from zoo.errors import UserError
from zoo.filling.present import missing_files
from zoo.filling.publish import write_donor_rows

CHUNK = 1 << 22


def copy_files(folder: Path, checkpoint: Checkpoint, hashes: FileHashes, tick: Callable[[int], object]) -> None:
    """Copies the checkpoint's files. Complete files of an interrupted add are kept."""
    folder.mkdir(exist_ok=True)
    remove_temporaries(folder)
    for file, stamp in hashes.items():
        copy_file(checkpoint.folder / file, folder / file, stamp, tick)


def copy_file(
    source: Path, target: Path, stamp: dict[str, Any], tick: Callable[[int], object] = lambda n: None
) -> None:
    """Copies one file whose size and hash are known. UserError where the bytes have another hash."""
    if target.exists() and target.stat().st_size == stamp["size"] and file_hash(target) == stamp["sha256"]:
        tick(stamp["size"])
        return
    digest = hashlib.sha256()
    with replacement_file(target) as partial:
        with source.open("rb") as f, partial.open("wb") as out:
            while raw := f.read(CHUNK):
                digest.update(raw)
                out.write(raw)
                tick(len(raw))
        if digest.hexdigest() != stamp["sha256"]:
            raise UserError(f"{source}: changed while it was read; add it again when nothing writes to it")


def restore_files(home: Path, checkpoint: ModelCheckpoint, record: dict[str, Any]) -> None:
    """Restores the files, and the rows of the manifest, that a donor has lost since it was added."""
    for file in missing_files(home, record):
        copy_file(checkpoint.folder / file, home / file, record["files"][file])
    if not (home / ROWS).exists():
        measures = {name: measure(checkpoint, checkpoint.entries[name]) for name in checkpoint.names}
        write_donor_rows(home, home.name, checkpoint, record, measures)
