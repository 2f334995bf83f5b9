"""GGUF files become donors of a zoo, converted to checkpoints in bfloat16."""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path
from typing import Any

from zoo.checkpoints.atomic import disk_errors, existing_parents, hold_lock
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.files import FileHashes, content_hash
from zoo.checkpoints.licenses import UNKNOWN
from zoo.checkpoints.sources import fetch_checked_files
from zoo.donors.measures import measure_checkpoint
from zoo.donors.model_checkpoint import ModelCheckpoint, check_against_blueprint, with_blueprint
from zoo.donors.records import read_record
from zoo.filling.copy import restore_files
from zoo.filling.present import find_donor, is_complete
from zoo.filling.publish import bytes_in, check_free_space, examine, publish_donor, removed_on_error
from zoo.filling.report import AddSettings, Report, report_added, report_present
from zoo.gguf.convert import convert, converted_size
from zoo.gguf.model import GgufModel, describe_types
from zoo.gguf.source import GgufSource, gguf_revision
from zoo.statistics.health import Finding


def add_gguf(models: Path, source: GgufSource, settings: AddSettings) -> Report:
    """Converts GGUF files to a donor in bfloat16. Tensors that a killed add completed a file of are kept."""
    download = source.download
    folder, given = fetch_checked_files(source, settings.quiet)
    revision = gguf_revision(source, given)
    home = find_donor(models, source, [revision])
    if home is not None and is_complete(home):
        return report_present(source, home, download)
    model = GgufModel.open([folder / name for name in source.files])
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors(models))
        stack.enter_context(existing_parents(models))
        staging = models / f".{source.names[0]}-{revision.removeprefix('sha256:')[:16]}"
        check_free_space(models, converted_size(model) - bytes_in(staging))
        # Of two processes with the same source, the second waits here and then finds the donor present.
        stack.enter_context(hold_lock(staging.with_name(f"{staging.name}.lock"), staging))
        home = find_donor(models, source, [revision])
        if home is not None and is_complete(home):
            return report_present(source, home, download)
        stack.enter_context(removed_on_error(staging))
        staging.mkdir(exist_ok=True)
        checkpoint = _converted(model, staging, source.names[0], settings.quiet)
        if home is not None:
            stack.enter_context(hold_lock(models / f".{home.name}.lock", home))
            restore_files(home, checkpoint, read_record(home))
            shutil.rmtree(staging)
            return report_present(source, home, download)
        home, findings = _measure_and_publish(source, model, checkpoint, revision, settings)
    if findings is None:
        return report_present(source, home, download)
    return report_added(source, home, download, findings, settings)


def _converted(model: GgufModel, staging: Path, name: str, quiet: bool) -> ModelCheckpoint:
    """The checkpoint that a model is converted to, in the folder `staging`."""
    from tqdm import tqdm

    with tqdm(total=converted_size(model), unit="B", unit_scale=True, desc=name, disable=quiet) as bar:
        notes = convert(model, staging, bar.update)
    for note in [] if quiet else [describe_types(model.types), *notes]:
        print(f"{name}: {note}", file=sys.stderr)
    checkpoint = with_blueprint(Checkpoint.open(staging))
    check_against_blueprint(checkpoint)
    return checkpoint


def _measure_and_publish(
    source: GgufSource, model: GgufModel, checkpoint: ModelCheckpoint, revision: str, settings: AddSettings
) -> tuple[Path, list[Finding] | None]:
    """Measures a converted donor and gives it its name. Returns its folder and its health.

    The health is None where another process added the same donor meanwhile.
    """
    from tqdm import tqdm

    total = (1 + settings.health) * sum(e.nbytes for e in checkpoint.entries.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=source.names[0], disable=settings.quiet) as bar:
        measured = dict(zip(checkpoint.files, measure_checkpoint(checkpoint, bar.update), strict=True))
        measures = {name: measure for file in measured.values() for name, measure in file.measures.items()}
        findings = examine(checkpoint, measures, bar.update) if settings.health else []
    hashes: FileHashes = {name: {"size": file.size, "sha256": file.sha256} for name, file in measured.items()}
    record = _record(source, model, hashes, revision)
    home, is_new = publish_donor(checkpoint.folder, source, checkpoint, record, measures)
    return home, findings if is_new else None


def _record(source: GgufSource, model: GgufModel, hashes: FileHashes, revision: str) -> dict[str, Any]:
    """What donor.json keeps of a donor that was converted from GGUF files."""
    license = source.license if source.license != UNKNOWN else model.license
    own: dict[str, Any] = {
        "quantisation": describe_types(model.types),
        "types": model.types,
        "base_models": model.base_models,
    }
    record: dict[str, Any] = {"source": source.address, "revision": revision, "license": license}
    return {**record, "sha256": content_hash(hashes), "files": hashes, "gguf": own}
