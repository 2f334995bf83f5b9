"""What adding a source to a zoo would read, download and write."""

from __future__ import annotations

from pathlib import Path

from zoo.checkpoints.sources import Source, count_tensors, fetch_checked_files, open_source
from zoo.donors.records import read_record
from zoo.filling.present import find_donor, free_name, may_be_present, missing_files, possible_revisions
from zoo.filling.report import Report
from zoo.gguf.convert import converted_size
from zoo.gguf.model import GgufModel
from zoo.gguf.source import GgufSource, gguf_revision


def plan_source(models: Path, source: Source) -> Report:
    """The report of one source for a plan.

    Reads weights only where a donor may be the source, to compare the two: one with one of the source's names and, for
    a folder, with files of the same sizes.
    """
    revisions = [source.commit] if source.commit else _revisions_of_files(models, source)
    home = find_donor(models, source, revisions)
    record = read_record(home) if home else None
    missing = missing_files(home, record) if home and record else list(source.files)
    is_complete = record is not None and not missing
    if isinstance(source, GgufSource):
        tensors, whole = _converted_tensors_and_size(source)
        write, is_read = 0 if is_complete else whole, not is_complete
    else:
        tensors = count_tensors(source)
        write = sum(source.files[file].size for file in missing)
        is_read = not is_complete or source.commit is None
    return Report(
        source=source.address,
        name=home.name if home else free_name(models, source.names),
        revision=record["revision"] if record else next(iter(revisions), None),
        license=record["license"] if record else source.license,
        state="present" if record else "new",
        tensors=tensors,
        read=source.size if is_read else 0,
        download=source.download if is_read else 0,
        write=write,
    )


def _revisions_of_files(models: Path, source: Source) -> list[str]:
    """The possible revisions of files on this machine; empty where no donor can be the source."""
    if isinstance(source, GgufSource):
        is_named = any((models / name).exists() for name in source.names)
        return [gguf_revision(source, fetch_checked_files(source, quiet=True)[1])] if is_named else []
    return possible_revisions(source, open_source(source, quiet=True)[1]) if may_be_present(models, source) else []


def _converted_tensors_and_size(source: GgufSource) -> tuple[int | None, int | None]:
    """(tensors, bytes of the converted weights), or two None for a file of the hub that is not on this machine."""
    if source.folder is None and source.download:
        return None, None
    folder = fetch_checked_files(source, quiet=True)[0]
    model = GgufModel.open([folder / name for name in source.files])
    return len(model.blueprint.specs), converted_size(model)
