"""The files of a stored zoo.

manifest.parquet            one row per tensor
index.json                  what `headstart zoo list` prints
models/<donor>/             the donor's own files, and
models/<donor>/tensors.parquet   its rows of the manifest
models/<donor>/donor.json        its record: source, revision, license, hashes
fits/                       what methods have fitted to donors; may be removed at any time
"""

from __future__ import annotations

from pathlib import Path

MANIFEST = "manifest.parquet"
INDEX_FILE = "index.json"
ROWS = "tensors.parquet"
RECORD = "donor.json"
FITS = "fits"


def donor_folder(zoo: Path, name: str) -> Path:
    return zoo / "models" / name
