"""The files of a stored zoo.

manifest.parquet            one row per tensor
index.json                  what `headstart zoo list` prints
models/<donor>/             the donor's own files, and
models/<donor>/tensors.parquet   its rows of the manifest
models/<donor>/donor.json        its record: source, revision, license, hashes
fits/                       what methods have fitted to donors; may be removed at any time
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

MANIFEST = "manifest.parquet"
INDEX_FILE = "index.json"
ROWS = "tensors.parquet"
RECORD = "donor.json"
FITS = "fits"


def donor_folder(zoo: Path, name: str) -> Path:
    return zoo / "models" / name


def fit_path(zoo: Path, name: str, depends_on: object, code: tuple[Path, ...]) -> Path:
    """Where a zoo keeps what was fitted to donors: a name, and a hash of all that the fit depends on.

    depends_on: a JSON value. code: the files of source code that fit.
    """
    key = json.dumps([depends_on, _hash_of_files(code)], sort_keys=True)
    return zoo / FITS / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"


@cache
def _hash_of_files(files: tuple[Path, ...]) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
