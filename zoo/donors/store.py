"""The zoo: a folder of donors and the manifest that describes their tensors."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc

from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.headers import read_json
from zoo.donors.manifest import MANIFEST, ROWS, intact, read_rows
from zoo.errors import UserError, unknown
from zoo.targets.blueprint import Blueprint

# Written last into a donor's folder: {source, revision, license, sha256, files: {name: {size, sha256}}, rows (hash of
# its part of the manifest), seal (hash of all this)}.
RECORD = "donor.json"


@dataclass(frozen=True, eq=False)
class Donor(Checkpoint):
    """A checkpoint of a zoo."""

    record: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        record = read_record(Path(folder))
        base = Checkpoint.open(folder)
        return cls(base.folder, base.config, base.entries, base.files, record)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def revision(self) -> str:
        return self.record["revision"]

    @property
    def license(self) -> str:
        return self.record["license"]

    @property
    def sha256(self) -> str:
        """Hash of its files: their names and hashes, sorted."""
        return self.record["sha256"]


def record(donor: Donor) -> dict[str, Any]:
    """What is said of a donor wherever something was made of it: {name, revision, sha256, license}."""
    return {"name": donor.name, "revision": donor.revision, "sha256": donor.sha256, "license": donor.license}


def size_gap(donor: Donor, blueprint: Blueprint) -> float:
    """|log| of the ratio of parameters."""
    return abs(math.log(donor.parameters / blueprint.parameters))


def unlikeness(donor: Donor, blueprint: Blueprint) -> tuple[bool, float]:
    """(whether a donor is of another architecture, the gap in size). Where none fits, the reasons of the least unlike
    are the ones worth reading."""
    source, target = donor.blueprint.metadata, blueprint.metadata
    return source is None or target is None or source.architecture != target.architecture, size_gap(donor, blueprint)


@dataclass(frozen=True)
class Zoo:
    """The donors of the manifest. A folder under models/ that the manifest does not list is none of them."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """UserError where there is no zoo."""
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise UserError(f"{path}: is no zoo (no {MANIFEST}); fill one with `headstart zoo add` or `zoo train`")
        return cls(path)

    @cached_property
    def manifest(self) -> pa.Table:
        """One row per tensor: the columns of zoo.donors.manifest.SCHEMA."""
        return read_rows(self.path / MANIFEST)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.manifest["model"].to_pylist())))

    @cached_property
    def donors(self) -> tuple[Donor, ...]:
        """All donors, sorted by name."""
        return tuple(Donor.open(self.path / "models" / name) for name in self.names)

    def donor(self, name: str) -> Donor:
        if name not in self.names:
            raise unknown(f"donor in {self.path}", name, self.names)
        return next(d for d in self.donors if d.name == name)

    def describe(self) -> list[dict[str, Any]]:
        """`headstart zoo list --json`: [{name, revision, license, architecture, parameters, tensors, roles}]."""
        by_model: dict[str, list[dict[str, Any]]] = {name: [] for name in self.names}
        for row in self.manifest.select(["model", "revision", "license", "role"]).to_pylist():
            by_model[row["model"]].append(row)
        return [
            {
                "name": d.name,
                "revision": by_model[d.name][0]["revision"],
                "license": by_model[d.name][0]["license"],
                "architecture": d.config.get("model_type", "unknown"),
                "parameters": d.parameters,
                "tensors": len(by_model[d.name]),
                "roles": dict(sorted(Counter(row["role"] for row in by_model[d.name]).items())),
            }
            for d in self.donors
        ]


@dataclass(frozen=True)
class Chosen(Zoo):
    """A zoo of just these donors, in this order; `path` is where they come from. It has no manifest."""

    members: tuple[Donor, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(donor.name for donor in self.members)

    @cached_property
    def donors(self) -> tuple[Donor, ...]:
        return self.members


def read_record(folder: Path) -> dict[str, Any]:
    """donor.json of a donor's folder. UserError where it is missing or not what was written."""
    again = f"remove {folder} and add the donor again"
    if not (folder / RECORD).is_file():
        raise UserError(f"{folder}: has no {RECORD}, so it is not a whole donor; {again}")
    record = read_json(folder / RECORD)
    if record.get("seal") != _seal(record):
        raise UserError(f"{folder / RECORD}: is not what was written when the donor was added; {again}")
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Seals the record of a folder that has its payload and its part of the manifest."""
    record = record | {"rows": file_hash(folder / ROWS)}
    text = json.dumps(record | {"seal": _seal(record)}, indent=2, ensure_ascii=False)
    partial = folder / f".{RECORD}.part"
    partial.write_text(text + "\n")
    partial.replace(folder / RECORD)


def _seal(record: dict[str, Any]) -> str:
    rest = {k: v for k, v in record.items() if k != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def content_hash(files: dict[str, dict[str, Any]]) -> str:
    """sha256 over the sorted lines `hash  name` (the format of sha256sum) of a checkpoint's files."""
    lines = "".join(f"{stamp['sha256']}  {name}\n" for name, stamp in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def verify(path: str | Path) -> list[str]:
    """Reads every byte of the zoo again and compares it with manifest and records. Returns the problems, one line
    each: which donor, which file or tensor, what to do. Empty: all is as it was added."""
    zoo = Zoo.open(path)
    problems: list[str] = []
    for name in zoo.names:
        try:
            problems += _verify_donor(zoo, name)
        except UserError as error:
            problems.append(f"{name}: {error}")
    parts = [zoo.path / "models" / name / ROWS for name in zoo.names]
    whole = all(p.is_file() and not any(str(p) in line for line in problems) for p in parts)
    if whole and not intact(zoo.path / MANIFEST, parts):
        again = "remove it and run any `headstart zoo add` again, which writes it anew"
        problems.append(f"{zoo.path / MANIFEST}: is not what its donors make; {again}")
    return problems


def notes(path: str | Path) -> list[str]:
    """What lies in the zoo's models/ and belongs to no donor: harmless, and maybe unexpected."""
    zoo = Zoo.open(path)
    found = []
    for folder in sorted((zoo.path / "models").iterdir()):
        if folder.name.startswith("."):
            if folder.is_dir():
                found.append(f"{folder}: an add that was interrupted; run it again, or remove the folder")
        elif folder.name not in zoo.names:
            found.append(f"{folder}: is not in the manifest")
        elif (folder / RECORD).is_file():
            known = {*read_json(folder / RECORD).get("files", ()), RECORD, ROWS}
            found += [f"{p}: belongs to no donor" for p in sorted(folder.iterdir()) if p.name not in known]
    return found


def _verify_donor(zoo: Zoo, name: str) -> Iterator[str]:
    folder = zoo.path / "models" / name
    table = zoo.manifest.filter(pc.equal(zoo.manifest["model"], name))
    record = read_record(folder)
    add_again = f"run `headstart zoo add {record['source']}` again"
    if Path(record["source"]).is_absolute() and not Path(record["source"]).exists():
        add_again = f"add or train it again: its source {record['source']} is gone, so remove {folder} first"
    for file, stamp in sorted(record["files"].items()):
        path = folder / file
        if not path.is_file():
            yield f"{name}: {path} is missing; {add_again}"
        elif path.stat().st_size != stamp["size"]:
            yield f"{name}: {path} has {path.stat().st_size} bytes, was added with {stamp['size']}; {add_again}"
        elif file_hash(path) != stamp["sha256"]:
            rows = table.filter(pc.equal(table["file"], file)).to_pylist()
            wrong = [row["tensor"] for row in rows if _hash_range(path, row) != row["sha256"]]
            where = f"in tensor {', '.join(map(repr, wrong))}" if wrong else "outside its tensors"
            yield f"{name}: {path} is not what was added (it differs {where}); remove that file and {add_again}"
    rows_path = folder / ROWS
    if not rows_path.is_file() or file_hash(rows_path) != record["rows"]:
        yield f"{name}: {rows_path} is missing or not what was written; remove it and {add_again}"


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes; UserError where the disk does not give them."""
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); look at its permissions and the disk") from error


def _hash_range(path: Path, row: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        f.seek(row["offset"])
        left = row["nbytes"]
        while left and (raw := f.read(min(left, 1 << 20))):
            digest.update(raw)
            left -= len(raw)
    return digest.hexdigest()
