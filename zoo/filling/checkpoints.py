"""Folders and hub repositories become donors of a zoo."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from zoo.checkpoints.atomic import disk_errors, hold_lock
from zoo.checkpoints.files import FileHashes, content_hash
from zoo.checkpoints.side_files import CHAT_TEMPLATES
from zoo.checkpoints.sources import Source, open_source
from zoo.donors.manifest import measure
from zoo.donors.model_checkpoint import (
    ModelCheckpoint,
    check_against_blueprint,
    describe_reading,
    with_blueprint,
)
from zoo.donors.records import read_record
from zoo.filling.copy import copy_files, restore_files
from zoo.filling.present import find_donor, note_absent_files, possible_revisions
from zoo.filling.publish import check_free_space, publish_donor, removed_on_error
from zoo.filling.report import AddSettings, Report, report_added, report_present
from zoo.statistics.health import Finding, check_health


def add_checkpoint(models: Path, source: Source, settings: AddSettings) -> Report:
    """Adds a folder, or a repository of the hub, to the zoo with the folder `models`."""
    download = source.download
    files, hashes = open_source(source, settings.quiet)
    checkpoint = with_blueprint(files)
    extra = check_against_blueprint(checkpoint)
    if not settings.quiet:
        notes = [f"{len(extra)} tensors are not in its config ({extra[0]}, …)"] if extra else []
        notes += [f"{CHAT_TEMPLATES}/ is not copied"] if (files.folder / CHAT_TEMPLATES).is_dir() else []
        for note in notes + describe_reading(checkpoint):
            print(f"{source.names[0]}: {note}", file=sys.stderr)
    home = find_donor(models, source, possible_revisions(source, hashes))
    if home is not None:
        note_absent_files(home, hashes, settings.quiet)
        with disk_errors(models), hold_lock(models / f".{home.name}.lock", home):
            restore_files(home, checkpoint, read_record(home))
        return report_present(source, home, download)
    home, findings = _copy_donor(models, source, checkpoint, hashes, settings)
    if findings is None:
        return report_present(source, home, download)
    return report_added(source, home, download, findings, settings)


def _copy_donor(
    models: Path, source: Source, checkpoint: ModelCheckpoint, hashes: FileHashes, settings: AddSettings
) -> tuple[Path, list[Finding] | None]:
    """Measures and copies a new donor. Returns its folder and its health, None where another process added it."""
    from tqdm import tqdm

    sha256, revisions = content_hash(hashes), possible_revisions(source, hashes)
    weights = sum(e.nbytes for e in checkpoint.entries.values())
    bytes_per_value = weights / max(1, checkpoint.blueprint.parameters)
    total = source.size + (1 + settings.health) * weights  # every weight is measured, copied and examined
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, desc=source.names[0], disable=settings.quiet)
        )
        measures = {}
        for name in checkpoint.names:  # before anything is written, because this refuses NaN
            measures[name] = measure(checkpoint, checkpoint.entries[name])
            bar.update(checkpoint.entries[name].nbytes)
        stack.enter_context(disk_errors(models))
        models.mkdir(parents=True, exist_ok=True)
        staging = models / f".{source.names[0]}-{sha256[:16]}"
        check_free_space(models, source.size - sum(p.stat().st_size for p in staging.glob("*")))
        # Of two processes with the same source, the second waits here and then finds the donor present.
        stack.enter_context(hold_lock(staging.with_name(f"{staging.name}.lock"), staging))
        home = find_donor(models, source, revisions)
        if home is not None:
            return home, None
        stack.enter_context(removed_on_error(staging))
        copy_files(staging, checkpoint, hashes, bar.update)
        findings = (
            check_health(checkpoint, progress=lambda values: bar.update(values * bytes_per_value))
            if settings.health
            else []
        )
        record: dict[str, Any] = {"source": source.address, "revision": revisions[0], "license": source.license}
        record |= {"sha256": sha256, "files": hashes}
        return publish_donor(staging, source, checkpoint, record, measures), findings
