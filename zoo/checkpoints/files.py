"""Files from a stranger: JSON read with checks, paths that stay in their folder, no pickles, hashes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zoo.errors import UserError

MAX_JSON = 100_000_000  # bytes
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

FileHashes = dict[str, dict[str, Any]]  # file name -> {"size": bytes, "sha256": hex digest}


def refuse_pickle(path: Path) -> None:
    """A pickle runs code when it is loaded: UserError, without opening it."""
    if path.suffix in PICKLES:
        raise UserError(f"{path}: a pickle can run code when it is loaded; convert it to safetensors and give that")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; UserError where there is none or a key comes twice."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise UserError(f"{path}: {size} bytes is too long for a JSON file; is it what it says?")
        value = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a folder that holds it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({first_line(error)}); mend it or fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__} where a JSON object must be; fetch it again")
    return value


def is_bare_name(file: str) -> bool:
    """Whether `file` is a bare file name, which cannot lead out of the folder that it is joined to."""
    return file not in ("", ".", "..") and not any(c in file for c in "/\\\0:")


def file_inside(folder: Path, file: str) -> Path:
    """The regular file `file` of `folder`. A symbolic link that leads out of the folder raises UserError; the hub's
    cache, whose snapshots are links into the `blobs` folder of the same repository, is the one exception."""
    path = folder / file
    if not path.is_file():
        raise UserError(f"{folder}: has no file {file!r}; give a complete checkpoint")
    real, root = path.resolve(), folder.resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(real.is_relative_to(r) for r in roots):
        raise UserError(f"{path}: is a link that leads out of its folder; put the file itself there")
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
    pairs = list(pairs)
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"the key {twice[0]!r} comes twice")
    return dict(pairs)


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
