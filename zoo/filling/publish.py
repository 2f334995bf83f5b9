"""How a donor that is complete in a hidden folder gets its name, and how the manifest is written."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zoo.checkpoints.atomic import disk_errors, hold_lock, remove_leftovers_in, rename_folder
from zoo.checkpoints.sources import Source
from zoo.donors.index import refresh_index
from zoo.donors.layout import MANIFEST, RECORD, ROWS
from zoo.donors.manifest import donor_rows, join_rows, write_rows
from zoo.donors.measures import Measure
from zoo.donors.model_checkpoint import ModelCheckpoint
from zoo.donors.records import write_record
from zoo.errors import UserError
from zoo.filling.present import find_donor, free_name
from zoo.statistics.health import Finding, check_health

LOCK = ".lock"  # held while a donor gets its name and while the manifest is written


def publish_donor(
    staging: Path, source: Source, checkpoint: ModelCheckpoint, record: dict[str, Any], measures: dict[str, Measure]
) -> tuple[Path, bool]:
    """Gives a donor that is complete in `staging` its rows, its record and the first free name.

    Returns (its folder, whether it is new). Where another process has added the same donor meanwhile, it is that one's
    folder, and `staging` is removed.
    """
    models = staging.parent
    with hold_lock(models / LOCK, models):
        home = find_donor(models, source, [record["revision"]])
        if home is not None:
            shutil.rmtree(staging)
            return home, False
        free = free_name(models, source.names)
        if free is None:
            raise UserError(f"{source.address}: all its names are taken in {models}; rename the folder")
        write_donor_rows(staging, free, checkpoint, record, measures)
        rename_folder(staging, models / free)
        return models / free, True


def write_donor_rows(
    folder: Path, name: str, checkpoint: ModelCheckpoint, record: dict[str, Any], measures: dict[str, Measure]
) -> None:
    """Writes a donor's rows of the manifest, and then its record, into its folder."""
    types = record.get("gguf", {}).get("types")
    write_rows(folder / ROWS, donor_rows(checkpoint, name, record["revision"], record["license"], measures, types))
    write_record(folder, record)


def merge_manifest(zoo: Path) -> None:
    """Writes manifest.parquet from the complete donors. Parallel processes take turns here."""
    with disk_errors(zoo), hold_lock(zoo / "models" / LOCK, zoo):
        for folder in (zoo / "models", *(zoo / "models").glob("[!.]*/")):
            remove_leftovers_in(folder)
        parts = [p for p in (zoo / "models").glob(f"[!.]*/{ROWS}") if (p.parent / RECORD).exists()]
        write_rows(zoo / MANIFEST, join_rows(parts))
        refresh_index(zoo)


def examine(
    checkpoint: ModelCheckpoint, measures: dict[str, Measure], tick: Callable[[float], object]
) -> list[Finding]:
    """What the health check finds. tick: called with the bytes of each tensor."""
    weights = sum(entry.nbytes for entry in checkpoint.entries.values())
    bytes_per_value = weights / max(1, checkpoint.blueprint.parameters)
    return check_health(checkpoint, progress=lambda values: tick(values * bytes_per_value), measures=measures)


def bytes_in(folder: Path) -> int:
    """The bytes of the files in a folder, which another process may publish or remove meanwhile."""
    total = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def check_free_space(models: Path, need: int) -> None:
    """UserError where the disk has fewer than `need` bytes free."""
    free = shutil.disk_usage(models).free
    if free < need:
        raise UserError(
            f"{models}: {need} bytes are needed and {free} are free; free some space or choose another place"
        )


@contextlib.contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Removes the folder on any error. An interruption leaves it, and the next add continues."""
    try:
        yield
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
