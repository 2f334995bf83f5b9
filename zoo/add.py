"""Adds donors to a zoo: resolve the sources, measure, copy, rename, and write the manifest last."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from zoo.checkpoints.sources import Source, resolve_source
from zoo.donors.model_checkpoint import ModelCheckpoint, check_against_blueprint
from zoo.errors import UserError
from zoo.filling.checkpoints import add_checkpoint
from zoo.filling.gguf import add_gguf
from zoo.filling.plan import plan_source
from zoo.filling.present import find_donor, is_complete, note_absent_files
from zoo.filling.publish import merge_manifest
from zoo.filling.report import AddSettings, Report, report_present
from zoo.gguf.source import GgufSource, is_gguf_address, resolve_gguf


def add(
    sources: list[str],
    zoo: str | Path,
    revision: str | None = None,
    plan: bool = False,
    shard: tuple[int, int] = (0, 1),
    quiet: bool = False,
    origin: str | None = None,
    health: bool = True,
) -> list[dict[str, Any]]:
    """Copies checkpoints into the zoo at `zoo`, which is created if needed.

    sources   folders, GGUF files, hub ids `org/name[@revision]`, and GGUF files of the hub `org/name[@revision]:FILE`
    revision  of the hub ids without one
    plan      only report what would be done
    shard     (i, n): only sources[i::n], for n parallel processes
    origin    what the donors' records state as their source, instead of the folder or hub id
    health    whether donors are examined, which takes longer than copying them; NaN and infinity are refused anyway

    Returns for each source {source, name, revision, license, state, tensors, read, download, write, health}. `read`,
    `download` and `write` are bytes. `state` is new or present in a plan, else added or present. `revision` is the
    commit of a hub source and `sha256:<content hash>` of a folder or of a GGUF file, None in the plan of one that was
    not read. `health` is `fine`, the kinds of `zoo.statistics.health`, which are also reported on stderr, or `not
    checked`. It is None where nothing was added.

    All sources are resolved before the first is copied. A donor appears in models/ complete, by a rename. An
    interrupted add leaves a hidden folder there, and the next add continues it. Adding a donor again changes nothing,
    except that it restores missing files. UserError: anything wrong with a source, NaN or infinity, a full disk.
    """
    zoo = Path(zoo)
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"--shard {index}/{count}: the first number must be from 0 to {count - 1}")
    if zoo.exists() and not zoo.is_dir():
        raise UserError(f"{zoo}: is a file; give a folder for the zoo")
    resolved = [_resolve(s, revision) for s in sources[index::count]]
    if origin is not None:
        resolved = [replace(source, address=origin) for source in resolved]
    for source in resolved:
        if source.folder is not None and not isinstance(source, GgufSource):
            check_against_blueprint(ModelCheckpoint.open(source.folder))
    if plan:
        return [asdict(plan_source(zoo / "models", source)) for source in resolved]
    try:
        return [asdict(_add(zoo / "models", source, AddSettings(quiet, health))) for source in resolved]
    finally:
        if (zoo / "models").exists():
            merge_manifest(zoo)


def _resolve(source: str, revision: str | None) -> Source:
    """The source of any kind that `add` takes."""
    return resolve_gguf(source, revision) if is_gguf_address(source) else resolve_source(source, revision)


def _add(models: Path, source: Source, settings: AddSettings) -> Report:
    home = find_donor(models, source, [source.commit] if source.commit else [])
    if home is not None and is_complete(home):
        note_absent_files(home, source.files, settings.quiet)
        return report_present(source, home, download=0)  # a commit cannot change: nothing to read
    if isinstance(source, GgufSource):
        return add_gguf(models, source, settings)
    return add_checkpoint(models, source, settings)
