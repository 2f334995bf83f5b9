"""Checks of a stored zoo: every byte against the manifest and the donors' records."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from zoo.checkpoints.files import file_hash, read_json
from zoo.donors.index import is_damaged
from zoo.donors.layout import INDEX_FILE, MANIFEST, RECORD, ROWS, donor_folder
from zoo.donors.manifest import is_made_from, read_manifest
from zoo.donors.model_checkpoint import ModelCheckpoint, check_against_blueprint
from zoo.donors.records import read_record
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.limits import MAX_HASHED_UNCHECKED


def verify(path: str | Path) -> list[str]:
    """Reads every byte of the zoo at `path` again and compares it with the manifest and the records.

    Returns the problems, one line each: which donor, which file or tensor, what to do. An empty list: the zoo is as it
    was written.
    """
    zoo = Zoo.open(path)
    manifest = read_manifest(zoo.path)
    problems: list[str] = []
    for name in zoo.names:
        try:
            problems += _verify_donor(zoo.path, manifest, name)
        except UserError as error:
            problems.append(f"{name}: {error}")
    parts = [donor_folder(zoo.path, name) / ROWS for name in zoo.names]
    parts_are_sound = all(p.is_file() and not any(str(p) in line for line in problems) for p in parts)
    if parts_are_sound and not is_made_from(zoo.path / MANIFEST, parts):
        advice = "remove it and run any `headstart zoo add` again, which writes it again"
        problems.append(f"{zoo.path / MANIFEST}: does not match its donors; {advice}")
    if is_damaged(zoo.path):
        problems.append(f"{zoo.path / INDEX_FILE}: is damaged; remove it, and `headstart zoo list` writes it again")
    return problems


def stray_files(path: str | Path) -> list[str]:
    """Files and folders in the zoo's models/ that belong to no donor, one line each. They are harmless."""
    zoo = Zoo.open(path)
    strays = []
    for folder in sorted((zoo.path / "models").iterdir()):
        if folder.name.startswith("."):
            if folder.is_dir():
                strays.append(f"{folder}: is left from an interrupted add; add the donor again, or remove the folder")
        elif folder.name not in zoo.names:
            strays.append(f"{folder}: is not in the manifest")
        elif (folder / RECORD).is_file():
            known = {*read_json(folder / RECORD).get("files", ()), RECORD, ROWS}
            strays += [f"{p}: belongs to no donor" for p in sorted(folder.iterdir()) if p.name not in known]
    return strays


def _verify_donor(zoo: Path, manifest: pa.Table, name: str) -> Iterator[str]:
    folder = donor_folder(zoo, name)
    table = manifest.filter(pc.equal(manifest["model"], name))
    record = read_record(folder)
    add_again = f"run `headstart zoo add {record['source']}` again"
    if Path(record["source"]).is_absolute() and not Path(record["source"]).exists():
        add_again = f"its source {record['source']} is gone, so remove {folder} and add or train it again"
    if sum(stamp["size"] for stamp in record["files"].values()) > MAX_HASHED_UNCHECKED:
        check_against_blueprint(ModelCheckpoint.open(folder))
    for file, stamp in sorted(record["files"].items()):
        path = folder / file
        if not path.is_file():
            yield f"{name}: {path} is missing; {add_again}"
        elif path.stat().st_size != stamp["size"]:
            yield f"{name}: {path} has {path.stat().st_size} bytes, had {stamp['size']} when added; {add_again}"
        elif file_hash(path) != stamp["sha256"]:
            rows = table.filter(pc.equal(table["file"], file)).to_pylist()
            changed = [row["tensor"] for row in rows if _range_hash(path, row) != row["sha256"]]
            where = f"in tensor {', '.join(map(repr, changed))}" if changed else "outside its tensors"
            yield f"{name}: {path} has changed since it was added ({where}); remove that file and {add_again}"
    rows_path = folder / ROWS
    if not rows_path.is_file() or file_hash(rows_path) != record["rows"]:
        yield f"{name}: {rows_path} is missing or has changed; remove it and {add_again}"


def _range_hash(path: Path, row: dict[str, Any]) -> str:
    """sha256 of the bytes of one row's tensor."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        f.seek(row["offset"])
        left = row["nbytes"]
        while left and (raw := f.read(min(left, 1 << 20))):
            digest.update(raw)
            left -= len(raw)
    return digest.hexdigest()
