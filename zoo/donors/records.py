"""donor.json: what a zoo records about a donor when it is added.

It is written last into a donor folder: {source, revision, license, sha256, files: {name: {size, sha256}}, rows, seal}.
`rows` is the hash of the donor's rows of the manifest, `seal` the hash of all the rest.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from zoo.checkpoints.atomic import replace_file
from zoo.checkpoints.files import expect, expect_all, file_hash, is_bare_name, read_json
from zoo.donors.layout import RECORD, ROWS
from zoo.errors import UserError
from zoo.limits import MAX_RECORD

KINDS = {"source": str, "revision": str, "license": str, "sha256": str, "rows": str, "files": {str: dict}}


def read_record(folder: Path) -> dict[str, Any]:
    """The donor.json of a donor's folder. UserError where it is missing or was changed."""
    advice = f"remove {folder} and add the donor again"
    if not (folder / RECORD).is_file():
        raise UserError(f"{folder}: has no {RECORD}, so the donor is incomplete; {advice}")
    record = read_json(folder / RECORD, MAX_RECORD)
    if record.get("seal") != seal(record):
        raise UserError(f"{folder / RECORD}: was changed after the donor was added; {advice}")
    expect_all(record, KINDS, str(folder / RECORD), advice)
    for name, file in record["files"].items():
        if not is_bare_name(name):
            raise UserError(f"{folder / RECORD}: names the file {name!r:.60}, which is outside its folder; {advice}")
        expect(file, "size", int, f"{folder / RECORD}: {name!r:.60}", advice)
        expect(file, "sha256", str, f"{folder / RECORD}: {name!r:.60}", advice)
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes donor.json with its seal. The folder must hold the donor's files and its rows of the manifest."""
    record = record | {"rows": file_hash(folder / ROWS)}
    text = json.dumps(record | {"seal": seal(record)}, indent=2, ensure_ascii=False)
    replace_file(folder / RECORD, f"{text}\n".encode())


def seal(record: dict[str, Any]) -> str:
    """sha256 of a JSON object without its own key `seal`."""
    content = {k: v for k, v in record.items() if k != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
