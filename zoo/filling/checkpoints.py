"""Folders and hub repositories become donors of a zoo."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from pathlib import Path
from typing import Any

from zoo.checkpoints.atomic import disk_errors, existing_parents, hold_lock
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.files import FileHashes, content_hash
from zoo.checkpoints.side_files import CHAT_TEMPLATES
from zoo.checkpoints.sources import Source, open_source
from zoo.donors.model_checkpoint import (
    ModelCheckpoint,
    check_against_blueprint,
    describe_reading,
    with_blueprint,
)
from zoo.donors.records import read_record
from zoo.filling.copy import copy_checkpoint, restore_files
from zoo.filling.present import find_donor, may_be_present, note_absent_files, possible_revisions
from zoo.filling.publish import bytes_in, check_free_space, examine, publish_donor, removed_on_error
from zoo.filling.report import AddSettings, Report, report_added, report_present
from zoo.statistics.health import Finding


def add_checkpoint(models: Path, source: Source, settings: AddSettings) -> Report:
    """Adds a folder, or a repository of the hub, to the zoo with the folder `models`."""
    download = source.download
    checkpoint, hashes = _open(models, source, settings)
    home = find_donor(models, source, possible_revisions(source, hashes)) if hashes is not None else None
    if home is not None:
        note_absent_files(home, checkpoint.files, settings.quiet)
        with disk_errors(models), hold_lock(models / f".{home.name}.lock", home):
            restore_files(home, checkpoint, read_record(home))
        return report_present(source, home, download)
    home, findings = _copy_donor(models, source, checkpoint, hashes, settings)
    if findings is None:
        return report_present(source, home, download)
    return report_added(source, home, download, findings, settings)


def _open(models: Path, source: Source, settings: AddSettings) -> tuple[ModelCheckpoint, FileHashes | None]:
    """The checked checkpoint of a source, and the hashes of its files: None for a folder that is certainly new."""
    hashes: FileHashes | None = None
    if source.folder is None or may_be_present(models, source):
        files, hashes = open_source(source, settings.quiet)
    else:
        files = Checkpoint.open(source.folder)
    checkpoint = with_blueprint(files)
    extra = check_against_blueprint(checkpoint)
    notes = [f"{len(extra)} tensors are not in its config ({extra[0]}, …)"] if extra else []
    notes += [f"{CHAT_TEMPLATES}/ is not copied"] if (files.folder / CHAT_TEMPLATES).is_dir() else []
    for note in [] if settings.quiet else notes + describe_reading(checkpoint):
        print(f"{source.names[0]}: {note}", file=sys.stderr)
    return checkpoint, hashes


def _copy_donor(
    models: Path, source: Source, checkpoint: ModelCheckpoint, hashes: FileHashes | None, settings: AddSettings
) -> tuple[Path, list[Finding] | None]:
    """Copies and measures a new donor. Returns its folder and its health, None where another process added it."""
    from tqdm import tqdm

    total = source.size + settings.health * sum(e.nbytes for e in checkpoint.entries.values())
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, desc=source.names[0], disable=settings.quiet)
        )
        stack.enter_context(disk_errors(models))
        stack.enter_context(existing_parents(models))
        staging = _staging_folder(models, source)
        check_free_space(models, source.size - bytes_in(staging))
        # Of two processes with the same source, the second waits here and then finds the donor present.
        stack.enter_context(hold_lock(staging.with_name(f"{staging.name}.lock"), staging))
        if may_be_present(models, source):
            hashes = hashes or open_source(source, settings.quiet)[1]
            home = find_donor(models, source, possible_revisions(source, hashes))
            if home is not None:
                return home, None
        stack.enter_context(removed_on_error(staging))
        hashes, measures = copy_checkpoint(staging, checkpoint, hashes, bar.update)
        findings = examine(checkpoint, measures, bar.update) if settings.health else []
        revision = possible_revisions(source, hashes)[0]
        record: dict[str, Any] = {"source": source.address, "revision": revision, "license": source.license}
        record |= {"sha256": content_hash(hashes), "files": hashes}
        home, is_new = publish_donor(staging, source, checkpoint, record, measures)
        return home, findings if is_new else None


def _staging_folder(models: Path, source: Source) -> Path:
    """The hidden folder that a source is copied into, the same for every attempt."""
    origin = source.address if source.folder is None else str(source.folder.resolve())
    return models / f".{source.names[0]}-{hashlib.sha256(origin.encode()).hexdigest()[:16]}"
