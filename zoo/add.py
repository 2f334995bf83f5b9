"""Adds donors to a zoo: resolve the sources, measure, copy, rename, and write the manifest last."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zoo.checkpoints.atomic import (
    disk_errors,
    hold_lock,
    remove_leftovers_in,
    remove_temporaries,
    rename_folder,
    replacement_file,
)
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.files import FileHashes, content_hash, file_hash
from zoo.checkpoints.licenses import UNKNOWN
from zoo.checkpoints.side_files import CHAT_TEMPLATES, names_in_earlier_hash
from zoo.checkpoints.sources import Source, count_tensors, fetch_checked_files, open_source, resolve_source
from zoo.donors.index import refresh_index
from zoo.donors.layout import MANIFEST, RECORD, ROWS
from zoo.donors.manifest import Measure, donor_rows, join_rows, measure, write_rows
from zoo.donors.model_checkpoint import (
    ModelCheckpoint,
    check_against_blueprint,
    describe_reading,
    with_blueprint,
)
from zoo.donors.records import read_record, write_record
from zoo.errors import UserError
from zoo.gguf.convert import convert, converted_size
from zoo.gguf.model import GgufModel, describe_types
from zoo.gguf.source import GgufSource, gguf_revision, is_gguf_address, resolve_gguf
from zoo.statistics.health import Finding, check_health, summarise_findings
from zoo.words import shortened_list

CHUNK = 1 << 22
LOCK = ".lock"  # held while a donor gets its name and while the manifest is written


@dataclass(frozen=True)
class AddSettings:
    """What every step of an addition needs to know."""

    quiet: bool
    health: bool


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
        return [_plan(zoo, source) for source in resolved]
    try:
        return [_add(zoo / "models", source, AddSettings(quiet, health)) for source in resolved]
    finally:
        if (zoo / "models").exists():
            merge_manifest(zoo)


def _resolve(source: str, revision: str | None) -> Source:
    """The source of any kind that `add` takes."""
    return resolve_gguf(source, revision) if is_gguf_address(source) else resolve_source(source, revision)


def merge_manifest(zoo: Path) -> None:
    """Writes manifest.parquet from the complete donors. Parallel processes take turns here."""
    with disk_errors(zoo), hold_lock(zoo / "models" / LOCK, zoo):
        for folder in (zoo / "models", *(zoo / "models").glob("[!.]*/")):
            remove_leftovers_in(folder)
        parts = [p for p in (zoo / "models").glob(f"[!.]*/{ROWS}") if (p.parent / RECORD).exists()]
        write_rows(zoo / MANIFEST, join_rows(parts))
        refresh_index(zoo)


def _plan(zoo: Path, source: Source) -> dict[str, Any]:
    """The report of one source for a plan.

    Reads weights only where a donor with one of the source's names has files of the same sizes, to compare the two.
    """
    if isinstance(source, GgufSource):
        return _plan_gguf(zoo, source)
    revisions = [source.commit] if source.commit else []
    if source.folder is not None and any(_has_same_sizes(zoo / "models" / name, source) for name in source.names):
        revisions = _revisions(source, open_source(source, quiet=True)[1])
    home = _find_donor(zoo / "models", source, revisions)
    record = read_record(home) if home else None
    name = home.name if home else _free_name(zoo / "models", source)
    missing = _missing_files(home, record) if home and record else list(source.files)
    nothing_to_do = record is not None and not missing and source.commit is not None
    return {
        "source": source.address,
        "name": name,
        "revision": record["revision"] if record else next(iter(revisions), None),
        "license": record["license"] if record else source.license,
        "state": "present" if record else "new",
        "tensors": count_tensors(source),
        "read": 0 if nothing_to_do else source.size,
        "download": 0 if nothing_to_do else source.download,
        "write": sum(source.files[f].size for f in missing),
        "health": None,
    }


def _plan_gguf(zoo: Path, source: GgufSource) -> dict[str, Any]:
    """The report of GGUF files for a plan. Hashes them only where a donor has one of their names.

    `tensors` and `write` are None for a file of the hub that is not on this machine.
    """
    here = source.folder is not None or not source.download
    revisions = [source.commit] if source.commit else []
    if source.folder is not None and any((zoo / "models" / name).exists() for name in source.names):
        revisions = [gguf_revision(source, fetch_checked_files(source, quiet=True)[1])]
    home = _find_donor(zoo / "models", source, revisions)
    record = read_record(home) if home else None
    is_complete = home is not None and record is not None and not _missing_files(home, record)
    model = _open_gguf(source, fetch_checked_files(source, quiet=True)[0]) if here else None
    size = None if model is None else converted_size(model)
    return {
        "source": source.address,
        "name": home.name if home else _free_name(zoo / "models", source),
        "revision": record["revision"] if record else next(iter(revisions), None),
        "license": record["license"] if record else source.license,
        "state": "present" if record else "new",
        "tensors": None if model is None else len(model.blueprint.specs),
        "read": 0 if is_complete else source.size,
        "download": 0 if is_complete else source.download,
        "write": 0 if is_complete else size,
        "health": None,
    }


def _has_same_sizes(home: Path, source: Source) -> bool:
    """Whether the donor in `home` has the file names and sizes of the source, those of `_revisions` at least."""
    files = read_record(home)["files"] if home.exists() else {}
    names, own = names_in_earlier_hash(source.files), names_in_earlier_hash(files)
    return {n: files[n]["size"] for n in own} == {n: source.files[n].size for n in names}


def _add(models: Path, source: Source, settings: AddSettings) -> dict[str, Any]:
    home = _find_donor(models, source, [source.commit] if source.commit else [])
    if home is not None and _is_complete(home):
        _note_absent_files(home, source.files, settings.quiet)
        return _summary(source, home, "present", download=0)  # a commit cannot change: nothing to read

    if isinstance(source, GgufSource):
        return _add_gguf(models, source, settings)
    download = source.download
    files, hashes = open_source(source, settings.quiet)
    checkpoint = with_blueprint(files)
    extra = check_against_blueprint(checkpoint)
    if not settings.quiet:
        notes = [f"{len(extra)} tensors are not in its config ({extra[0]}, …)"] if extra else []
        notes += [f"{CHAT_TEMPLATES}/ is not copied"] if (files.folder / CHAT_TEMPLATES).is_dir() else []
        for note in notes + describe_reading(checkpoint):
            print(f"{source.names[0]}: {note}", file=sys.stderr)
    home = _find_donor(models, source, _revisions(source, hashes))
    if home is not None:
        _note_absent_files(home, hashes, settings.quiet)
        with disk_errors(models), hold_lock(models / f".{home.name}.lock", home):
            _restore(home, checkpoint, read_record(home))
        return _summary(source, home, "present", download)
    home, findings = _copy_donor(models, source, checkpoint, hashes, settings)
    if findings is None:
        return _summary(source, home, "present", download)
    _print_findings(home, findings, settings)
    return _summary(source, home, "added", download, findings, settings.health)


def _print_findings(home: Path, findings: list[Finding], settings: AddSettings) -> None:
    for finding in [] if settings.quiet else findings:
        print(f"{home.name}: {finding.text}", file=sys.stderr)


def _open_gguf(source: GgufSource, folder: Path) -> GgufModel:
    return GgufModel.open([folder / name for name in source.files])


def _add_gguf(models: Path, source: GgufSource, settings: AddSettings) -> dict[str, Any]:
    """Converts GGUF files to a donor in bfloat16. Tensors that a killed add completed a file of are kept."""
    download = source.download
    folder, given = fetch_checked_files(source, settings.quiet)
    revision = gguf_revision(source, given)
    home = _find_donor(models, source, [revision])
    if home is not None and _is_complete(home):
        return _summary(source, home, "present", download)
    model = _open_gguf(source, folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors(models))
        models.mkdir(parents=True, exist_ok=True)
        staging = models / f".{source.names[0]}-{revision.removeprefix('sha256:')[:16]}"
        _check_free_space(models, converted_size(model) - sum(p.stat().st_size for p in staging.glob("*")))
        # Of two processes with the same source, the second waits here and then finds the donor present.
        stack.enter_context(hold_lock(staging.with_name(f"{staging.name}.lock"), staging))
        home = _find_donor(models, source, [revision])
        if home is not None and _is_complete(home):
            return _summary(source, home, "present", download)
        stack.enter_context(_removed_on_error(staging))
        staging.mkdir(exist_ok=True)
        checkpoint = _converted(model, staging, source.names[0], settings.quiet)
        if home is not None:
            stack.enter_context(hold_lock(models / f".{home.name}.lock", home))
            _restore(home, checkpoint, read_record(home))
            shutil.rmtree(staging)
            return _summary(source, home, "present", download)
        record = _gguf_record(source, model, checkpoint, revision)
        home, findings = _measure_and_publish(models, staging, source, checkpoint, record, settings)
    _print_findings(home, findings, settings)
    return _summary(source, home, "added", download, findings, settings.health)


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


def _gguf_record(source: GgufSource, model: GgufModel, checkpoint: ModelCheckpoint, revision: str) -> dict[str, Any]:
    """What donor.json keeps of a donor that was converted from GGUF files."""
    hashes: FileHashes = {
        file: {"size": (checkpoint.folder / file).stat().st_size, "sha256": file_hash(checkpoint.folder / file)}
        for file in checkpoint.files
    }
    license = source.license if source.license != UNKNOWN else model.license
    own: dict[str, Any] = {
        "quantisation": describe_types(model.types),
        "types": model.types,
        "base_models": model.base_models,
    }
    record: dict[str, Any] = {"source": source.address, "revision": revision, "license": license}
    return {**record, "sha256": content_hash(hashes), "files": hashes, "gguf": own}


def _findings(checkpoint: ModelCheckpoint, settings: AddSettings, progress: Callable[[int], None]) -> list[Finding]:
    """What the health check finds; nothing where it is not wanted."""
    return check_health(checkpoint, progress=progress) if settings.health else []


def _measure_and_publish(
    models: Path,
    staging: Path,
    source: Source,
    checkpoint: ModelCheckpoint,
    record: dict[str, Any],
    settings: AddSettings,
) -> tuple[Path, list[Finding]]:
    """Measures a donor that is complete in `staging` and gives it its name. Returns its folder and its health."""
    from tqdm import tqdm

    weights = sum(e.nbytes for e in checkpoint.entries.values())
    bytes_per_value = weights / max(1, checkpoint.blueprint.parameters)
    total = (1 + settings.health) * weights
    with tqdm(total=total, unit="B", unit_scale=True, desc=source.names[0], disable=settings.quiet) as bar:
        measures = {}
        for name in checkpoint.names:
            measures[name] = measure(checkpoint, checkpoint.entries[name])
            bar.update(checkpoint.entries[name].nbytes)
        findings = _findings(checkpoint, settings, lambda values: bar.update(values * bytes_per_value))
    return _publish(models, staging, source, checkpoint, record, measures), findings


def _publish(
    models: Path,
    staging: Path,
    source: Source,
    checkpoint: ModelCheckpoint,
    record: dict[str, Any],
    measures: dict[str, Measure],
) -> Path:
    """Gives a donor that is complete in `staging` its rows, its record and the first free name. Returns its folder."""
    with hold_lock(models / LOCK, models):
        free = _free_name(models, source)
        if free is None:
            raise UserError(f"{source.address}: all its names are taken in {models}; rename the folder")
        types = record.get("gguf", {}).get("types")
        rows = donor_rows(checkpoint, free, record["revision"], record["license"], measures, types)
        write_rows(staging / ROWS, rows)
        write_record(staging, record)
        rename_folder(staging, models / free)
        return models / free


def _copy_donor(
    models: Path, source: Source, checkpoint: ModelCheckpoint, hashes: FileHashes, settings: AddSettings
) -> tuple[Path, list[Finding] | None]:
    """Measures and copies a new donor. Returns its folder and its health, None where another process added it."""
    from tqdm import tqdm

    sha256, revisions = content_hash(hashes), _revisions(source, hashes)
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
        _check_free_space(models, source.size - sum(p.stat().st_size for p in staging.glob("*")))
        # Of two processes with the same source, the second waits here and then finds the donor present.
        stack.enter_context(hold_lock(staging.with_name(f"{staging.name}.lock"), staging))
        home = _find_donor(models, source, revisions)
        if home is not None:
            return home, None
        stack.enter_context(_removed_on_error(staging))
        _copy_files(staging, checkpoint, hashes, bar.update)
        findings = _findings(checkpoint, settings, lambda values: bar.update(values * bytes_per_value))
        record: dict[str, Any] = {"source": source.address, "revision": revisions[0], "license": source.license}
        record |= {"sha256": sha256, "files": hashes}
        return _publish(models, staging, source, checkpoint, record, measures), findings


def _free_name(models: Path, source: Source) -> str | None:
    """The first of the source's names that no donor has, None where all are taken."""
    return next((n for n in source.names if not (models / n).exists()), None)


def _revisions(source: Source, hashes: FileHashes) -> list[str]:
    """The revisions under which a zoo may have a source: its commit, or hashes of its content.

    The second hash is that of a zoo from before chat templates and slow tokenizers were copied.
    """
    earlier = {name: hashes[name] for name in names_in_earlier_hash(hashes)}
    found = [source.commit] if source.commit else [f"sha256:{content_hash(files)}" for files in (hashes, earlier)]
    return list(dict.fromkeys(found))


def _find_donor(models: Path, source: Source, revisions: Sequence[str]) -> Path | None:
    """The folder of the donor that is the source at one of its revisions, None where it is not in the zoo."""
    for name in source.names if revisions else ():
        if (models / name).exists() and read_record(models / name)["revision"] in revisions:
            return models / name
    return None


def _is_complete(home: Path) -> bool:
    """Whether a donor has all files of its record, and its rows of the manifest."""
    return not _missing_files(home, read_record(home)) and (home / ROWS).exists()


def _note_absent_files(home: Path, files: Iterable[str], quiet: bool) -> None:
    """Names the files of a source that its donor was added without."""
    absent = sorted(set(files) - set(read_record(home)["files"]))
    if absent and not quiet:
        advice = f"remove {home} and add it again to have them"
        print(f"{home.name}: was added without {shortened_list(absent)}; {advice}", file=sys.stderr)


def _missing_files(home: Path, record: dict[str, Any]) -> list[str]:
    """The donor's files that are missing or of another size. Only `verify` compares their bytes."""

    def is_present(file: str, size: int) -> bool:
        return (home / file).is_file() and (home / file).stat().st_size == size

    return [file for file, stamp in record["files"].items() if not is_present(file, stamp["size"])]


def _copy_files(staging: Path, checkpoint: ModelCheckpoint, hashes: FileHashes, tick: Callable[[int], object]) -> None:
    """Copies the checkpoint's files. Complete files of an interrupted add are kept."""
    staging.mkdir(exist_ok=True)
    remove_temporaries(staging)
    for file, stamp in hashes.items():
        _copy(checkpoint.folder / file, staging / file, stamp, tick)


@contextlib.contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    """Removes the folder on any error. An interruption leaves it, and the next add continues."""
    try:
        yield
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _copy(source: Path, target: Path, stamp: dict[str, Any], tick: Callable[[int], object] = lambda n: None) -> None:
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


def _restore(home: Path, checkpoint: ModelCheckpoint, record: dict[str, Any]) -> None:
    """Restores files that the donor has lost since it was added."""
    for file in _missing_files(home, record):
        _copy(checkpoint.folder / file, home / file, record["files"][file])
    if not (home / ROWS).exists():
        measures = {name: measure(checkpoint, checkpoint.entries[name]) for name in checkpoint.names}
        types = record.get("gguf", {}).get("types")
        rows = donor_rows(checkpoint, home.name, record["revision"], record["license"], measures, types)
        write_rows(home / ROWS, rows)
        write_record(home, record)


def _check_free_space(models: Path, need: int) -> None:
    """UserError where the disk has fewer than `need` bytes free."""
    free = shutil.disk_usage(models).free
    if free < need:
        raise UserError(
            f"{models}: {need} bytes are needed and {free} are free; free some space or choose another place"
        )


def _summary(
    source: Source,
    home: Path,
    state: str,
    download: int,
    findings: list[Finding] | None = None,
    checked: bool = True,
) -> dict[str, Any]:
    record = read_record(home)
    written = sum(stamp["size"] for stamp in record["files"].values()) if "gguf" in record else source.size
    return {
        "source": source.address,
        "name": home.name,
        "revision": record["revision"],
        "license": record["license"],
        "state": state,
        "tensors": len(Checkpoint.open(home).names),
        "read": source.size,
        "download": download,
        "write": written if state == "added" else 0,
        "health": None if findings is None else summarise_findings(findings) if checked else "not checked",
    }
