"""Donors into the zoo: resolve, measure, copy, rename, and only then the manifest."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.files import FileHashes, content_hash, file_hash
from zoo.checkpoints.sources import Source, count_tensors, open_source, resolve_source
from zoo.checkpoints.writer import disk_errors
from zoo.donors.index import refresh_index
from zoo.donors.layout import MANIFEST, RECORD, ROWS
from zoo.donors.manifest import donor_rows, join_rows, measure, write_rows
from zoo.donors.model_checkpoint import ModelCheckpoint, check_against_blueprint, with_blueprint
from zoo.donors.records import read_record, write_record
from zoo.errors import UserError
from zoo.statistics.health import Finding, check_health, summarise_findings

CHUNK = 1 << 22
LOCK = ".lock"  # held while names are given and the manifest is written


def add(
    sources: list[str],
    zoo: str | Path,
    revision: str | None = None,
    plan: bool = False,
    shard: tuple[int, int] = (0, 1),
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Puts checkpoints into the zoo at `zoo`, which is made if need be.

    sources: folders and hub ids `org/name[@revision]`; revision: for the hub ids without one. shard (i, n): only
    sources[i::n], for n processes side by side. plan: only say what would be done.

    Returns for each source {source, name, revision, license, state, tensors, read, download, write, health}; read,
    download and write in bytes, `state` is new or present for a plan, added or present otherwise. revision is the
    commit of a hub source and `sha256:<content hash>` of a folder (None in the plan of one that has not been read).
    health is `fine` or the kinds of `zoo.statistics.health`, each with a line on stderr: a word, no refusal. It is
    None where nothing was added.

    All sources are resolved before the first is copied. A donor appears in models/ by a rename, complete; an
    interrupted add leaves a hidden folder there, which the next one goes on with. Adding again changes nothing, and
    restores files that were lost. UserError: anything wrong with a source, NaN or infinity, no room.
    """
    zoo = Path(zoo)
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"--shard {index}/{count}: the first number counts from 0 to {count - 1}")
    if zoo.exists() and not zoo.is_dir():
        raise UserError(f"{zoo}: is a file; give a folder for the zoo")
    resolved = [resolve_source(s, revision) for s in sources[index::count]]
    for source in resolved:
        if source.folder is not None:
            check_against_blueprint(ModelCheckpoint.open(source.folder))
    if plan:
        return [_plan(zoo, source) for source in resolved]
    try:
        return [_add(zoo / "models", source, quiet) for source in resolved]
    finally:
        if (zoo / "models").exists():
            merge_manifest(zoo)


def merge_manifest(zoo: Path) -> None:
    """manifest.parquet from the donors that are complete. Processes that add side by side take turns here."""
    with disk_errors(zoo), _lock(zoo / "models" / LOCK):
        parts = [p for p in (zoo / "models").glob(f"[!.]*/{ROWS}") if (p.parent / RECORD).exists()]
        write_rows(zoo / MANIFEST, join_rows(parts))
        refresh_index(zoo)


def _plan(zoo: Path, source: Source) -> dict[str, Any]:
    """Reads weights only where a donor of one of the source's names has files of the same sizes, to tell whether it is
    the same."""
    revision = source.commit
    if source.folder is not None and any(_alike(zoo / "models" / name, source) for name in source.names):
        revision = f"sha256:{content_hash(open_source(source, quiet=True)[1])}"
    home = _home(zoo / "models", source, revision)
    record = read_record(home) if home else None
    name = home.name if home else next((n for n in source.names if not (zoo / "models" / n).exists()), None)
    missing = _lost(home, record) if home and record else list(source.files)
    idle = record is not None and not missing and source.commit is not None
    return {
        "source": source.address,
        "name": name,
        "revision": revision,
        "license": record["license"] if record else source.license,
        "state": "present" if record else "new",
        "tensors": count_tensors(source),
        "read": 0 if idle else source.size,
        "download": 0 if idle else source.download,
        "write": sum(source.files[f].size for f in missing),
        "health": None,
    }


def _alike(home: Path, source: Source) -> bool:
    files = read_record(home)["files"] if home.exists() else {}
    return {n: stamp["size"] for n, stamp in files.items()} == {n: f.size for n, f in source.files.items()}


def _add(models: Path, source: Source, quiet: bool) -> dict[str, Any]:
    from tqdm import tqdm

    home = _home(models, source, source.commit)
    if home is not None and not _lost(home, read_record(home)) and (home / ROWS).exists():
        return _summary(source, home, "present", download=0)  # a commit cannot change: nothing to read

    download = source.download
    files, stamps = open_source(source, quiet)
    checkpoint = with_blueprint(files)
    extra = check_against_blueprint(checkpoint)
    if extra and not quiet:
        print(f"{source.names[0]}: {len(extra)} tensors that its config does not know ({extra[0]}, …)", file=sys.stderr)
    sha256 = content_hash(stamps)
    revision = source.commit or f"sha256:{sha256}"
    home = _home(models, source, revision)
    if home is not None:
        with disk_errors(models):
            _restore(home, checkpoint, read_record(home))
        return _summary(source, home, "present", download)

    weights = sum(e.nbytes for e in checkpoint.entries.values())
    share = weights / max(1, checkpoint.blueprint.parameters)  # bytes of a value
    total = source.size + 2 * weights  # measured, copied, examined
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, desc=source.names[0], disable=quiet))
        measures = {}
        for entry in checkpoint.entries.values():  # before anything is written: this is what refuses NaN
            measures[entry.name] = measure(checkpoint, entry)
            bar.update(entry.nbytes)
        stack.enter_context(disk_errors(models))
        models.mkdir(parents=True, exist_ok=True)
        staging = models / f".{source.names[0]}-{sha256[:16]}"
        _room(models, source.size - sum(p.stat().st_size for p in staging.glob("*")))
        # Of two processes with the same source, the second waits and finds it present.
        stack.enter_context(_lock(staging.with_name(f"{staging.name}.lock")))
        home = _home(models, source, revision)
        if home is not None:
            return _summary(source, home, "present", download)
        stack.enter_context(_removed_on_error(staging))
        _stage(staging, checkpoint, stamps, bar.update)
        findings = check_health(checkpoint, progress=lambda values: bar.update(values * share))
        stack.enter_context(_lock(models / LOCK))
        name = next((n for n in source.names if not (models / n).exists()), None)
        if name is None:
            raise UserError(f"{source.address}: all its names are taken in {models}; rename the folder")
        write_rows(staging / ROWS, donor_rows(checkpoint, name, revision, source.license, measures))
        record = {"source": source.address, "revision": revision, "license": source.license}
        write_record(staging, {**record, "sha256": sha256, "files": stamps})
        home = staging.rename(models / name)
    if not quiet:
        for finding in findings:
            print(f"{name}: {finding.text}", file=sys.stderr)
    return _summary(source, home, "added", download, findings)


def _home(models: Path, source: Source, revision: str | None) -> Path | None:
    """Where the source at this revision lies in the zoo already."""
    for name in source.names if revision else ():
        if (models / name).exists() and read_record(models / name)["revision"] == revision:
            return models / name
    return None


def _lost(home: Path, record: dict[str, Any]) -> list[str]:
    """The donor's files that are gone or cut; their bytes are the business of `verify`."""

    def whole(file: str, size: int) -> bool:
        return (home / file).is_file() and (home / file).stat().st_size == size

    return [file for file, stamp in record["files"].items() if not whole(file, stamp["size"])]


def _stage(staging: Path, checkpoint: ModelCheckpoint, stamps: FileHashes, tick: Callable[[int], object]) -> None:
    """Copies the files; those that an interrupted add has left whole are kept."""
    staging.mkdir(exist_ok=True)
    for file, stamp in stamps.items():
        _copy(checkpoint.folder / file, staging / file, stamp, tick)


@contextlib.contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    """Any error removes the folder, but not an interruption, after which the next add goes on."""
    try:
        yield
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _copy(source: Path, target: Path, stamp: dict[str, Any], tick: Callable[[int], object] = lambda n: None) -> None:
    if target.exists() and target.stat().st_size == stamp["size"] and file_hash(target) == stamp["sha256"]:
        tick(stamp["size"])
        return
    partial = target.with_name(f".{target.name}.part")
    digest = hashlib.sha256()
    try:
        with source.open("rb") as f, partial.open("wb") as out:
            while raw := f.read(CHUNK):
                digest.update(raw)
                out.write(raw)
                tick(len(raw))
        if digest.hexdigest() != stamp["sha256"]:
            raise UserError(f"{source}: changed while it was read; add it again when it is at rest")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _restore(home: Path, checkpoint: ModelCheckpoint, record: dict[str, Any]) -> None:
    """Puts back what the donor has lost since it was added."""
    for file in _lost(home, record):
        _copy(checkpoint.folder / file, home / file, record["files"][file])
    if not (home / ROWS).exists():
        measures = {e.name: measure(checkpoint, e) for e in checkpoint.entries.values()}
        write_rows(home / ROWS, donor_rows(checkpoint, home.name, record["revision"], record["license"], measures))
        write_record(home, record)


def _room(models: Path, need: int) -> None:
    free = shutil.disk_usage(models).free
    if free < need:
        raise UserError(f"{models}: {need} bytes are needed and {free} are free; make room or choose another place")


def _summary(
    source: Source, home: Path, state: str, download: int, findings: list[Finding] | None = None
) -> dict[str, Any]:
    record = read_record(home)
    weights = sum(1 for _ in Checkpoint.open(home).entries)
    return {
        "source": source.address,
        "name": home.name,
        "revision": record["revision"],
        "license": record["license"],
        "state": state,
        "tensors": weights,
        "read": source.size,
        "download": download,
        "write": source.size if state == "added" else 0,
        "health": findings if findings is None else summarise_findings(findings),
    }


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    from huggingface_hub.utils import WeakFileLock

    with WeakFileLock(path):
        yield
    if path.name != LOCK:  # who waited for it looks again at what is there, so nobody needs the file
        path.unlink(missing_ok=True)
