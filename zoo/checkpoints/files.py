"""Files from untrusted sources: checked JSON, paths that stay in their folder, no pickles; and hashes of files."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zoo.errors import UserError
from zoo.words import first_line

MAX_JSON = 100_000_000  # bytes
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

FileHashes = dict[str, dict[str, Any]]  # file name -> {"size": bytes, "sha256": hex digest}


def refuse_pickle(path: Path) -> None:
    """UserError for a pickle, which can run code when it is loaded. Does not open it."""
    if path.suffix in PICKLES:
        raise UserError(f"{path}: a pickle can run code when it is loaded; convert it to safetensors and give that")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. UserError where the file is missing, not a JSON object, or has a key twice."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise UserError(f"{path}: {size} bytes are too many for a JSON file; check that it is one")
        value = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a folder that contains it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({first_line(error)}); correct it or download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__} instead of a JSON object; download it again")
    return value


def is_bare_name(file: str) -> bool:
    """Whether `file` is a file name without folders, which cannot leave the folder that it is joined to."""
    return file not in ("", ".", "..") and not any(c in file for c in "/\\\0:")


def file_inside(folder: Path, file: str) -> Path:
    """The path of the regular file `file` in `folder`. UserError where it is missing or a link out of the folder.

    The snapshots in the hub's cache may link into the `blobs` folder of the same repository.
    """
    path = folder / file
    if not path.is_file():
        raise UserError(f"{folder}: has no file {file!r}; give a complete checkpoint")
    real, root = path.resolve(), folder.resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(real.is_relative_to(r) for r in roots):
        raise UserError(f"{path}: is a link that leads out of its folder; copy the file there")
    return path


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes. UserError where the file cannot be read."""
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions and the disk") from error


def content_hash(files: FileHashes) -> str:
    """sha256 of a checkpoint: of the sorted lines `hash  name` of its files (the format of sha256sum)."""
    lines = "".join(f"{file['sha256']}  {name}\n" for name, file in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The object_pairs_hook of json.loads that refuses a key that comes twice, with ValueError."""
    pairs = list(pairs)
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"the key {repeated[0]!r} comes twice")
    return dict(pairs)
