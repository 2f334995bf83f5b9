"""index.json: what `headstart zoo list` prints, stored beside the manifest so that it needs neither torch nor pyarrow.

Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from zoo.checkpoints.atomic import remove_leftovers, replace_file
from zoo.checkpoints.files import expect, is_bare_name, parse_json, read_bytes, read_text
from zoo.donors.layout import INDEX_FILE, MANIFEST, RECORD, donor_folder
from zoo.donors.records import seal
from zoo.errors import UserError
from zoo.limits import MAX_MANIFEST, MAX_RECORD

KINDS = {
    "name": str, "revision": str, "license": str, "architecture": str, "parameters": int, "tensors": int,
    "roles": {str: int},
}  # fmt: skip


def list_donors(path: str | Path) -> list[dict[str, Any]]:
    """The donors of the zoo at `path`: [{name, revision, license, architecture, parameters, tensors, roles}].

    Read from the index where it is current. Otherwise computed from the manifest and the donors, and the index is
    written again. UserError if there is no zoo, or a donor is damaged.
    """
    path = Path(path)
    index = _read_index(path)
    if index is not None and index["fingerprint"] == _fingerprint(path, index["donors"]):
        return index["donors"]
    from zoo.donors.summary import summarize_donors

    donors = summarize_donors(path)  # raises where a file is missing, so an index is never written as "incomplete"
    with contextlib.suppress(OSError, UserError):  # a zoo on a read-only disk has no index
        _write_index(path, donors)
    return donors


def refresh_index(path: Path) -> None:
    """Brings the index up to date after the manifest was written. Does nothing where a donor is damaged."""
    remove_leftovers(path / INDEX_FILE)
    with contextlib.suppress(UserError):
        list_donors(path)


def is_damaged(path: Path) -> bool:
    """Whether the zoo has an index that is not one that `list_donors` wrote. An outdated index is not damaged."""
    return (path / INDEX_FILE).is_file() and _read_index(path) is None


def _read_index(path: Path) -> dict[str, Any] | None:
    """The index as it was written, or None where there is none or any of its bytes has changed."""
    where = str(path / INDEX_FILE)
    try:
        text = read_text(path / INDEX_FILE, MAX_RECORD)
        index = parse_json(text, where)
        if not isinstance(index, dict) or index.get("seal") != seal(index) or text != _as_text(index):
            return None
        expect(index, "fingerprint", str, where)
        for donor in expect(index, "donors", [dict], where):
            for key, kind in KINDS.items():
                expect(donor, key, kind, where)
            if not is_bare_name(donor["name"]):
                return None
    except UserError:
        return None
    return index


def _write_index(path: Path, donors: list[dict[str, Any]]) -> None:
    index = {"fingerprint": _fingerprint(path, donors), "donors": donors}
    replace_file(path / INDEX_FILE, _as_text(index | {"seal": seal(index)}).encode())


def _as_text(index: dict[str, Any]) -> str:
    return json.dumps(index, indent=1) + "\n"


def _fingerprint(path: Path, donors: list[dict[str, Any]]) -> str:
    """sha256 of the manifest, of the donors' records, and of the names and sizes of the donors' files.

    It changes when donors are added, removed, restored or truncated. "incomplete" where one of the files is missing.
    """
    digest = hashlib.sha256()
    try:
        digest.update(read_bytes(path / MANIFEST, MAX_MANIFEST))
        for donor in donors:
            folder = donor_folder(path, donor["name"])
            digest.update(read_bytes(folder / RECORD, MAX_RECORD))
            sizes = sorted((file.name, file.stat().st_size) for file in os.scandir(folder))
            digest.update(json.dumps(sizes).encode())
    except (OSError, UserError):
        return "incomplete"
    return digest.hexdigest()
