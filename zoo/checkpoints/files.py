"""Files from untrusted sources: bounded reading, checked JSON, paths that stay in their folder, no pickles; hashes."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from itertools import chain
from pathlib import Path
from reprlib import Repr
from typing import Any

from zoo.errors import UserError
from zoo.limits import MAX_DIGITS, MAX_JSON, MAX_JSON_VALUES, MAX_KEYS, MAX_NESTING
from zoo.words import first_line

GGUF = ".gguf"
GGUF_ADVICE = "a GGUF file becomes a donor with `headstart zoo add FILE.gguf --zoo DIR`; then give that zoo"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

FileHashes = dict[str, dict[str, Any]]  # file name -> {"size": bytes, "sha256": hex digest}

KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip
TYPE_NAMES = {
    int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "an object", list: "a list",
    None: "null",
}  # fmt: skip
LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that is text only in a pair
_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def refuse_other_formats(path: Path) -> None:
    """UserError for a pickle, which can run code when it is loaded, and for a GGUF file. Opens neither."""
    if path.suffix in PICKLES:
        raise UserError(f"{path}: a pickle can run code when it is loaded; convert it to safetensors and give that")
    if path.suffix.lower() == GGUF:
        raise UserError(f"{path}: {GGUF_ADVICE}")


def open_regular(path: Path) -> BufferedReader:
    """The open file at `path`. UserError where there is none, or it is a folder, a pipe, a socket or a device."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe must not block
    try:
        file = os.fdopen(os.open(path, flags), "rb")
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder; give a file") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: cannot be read ({reason}); check the path and its permissions") from error
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise UserError(f"{path}: is {KINDS.get(stat.S_IFMT(mode), 'not a regular file')}; give a file")
    return file


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes. UserError for a larger one, before it is read."""
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = b"" if size > most else file.read(most + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the disk") from error
    if max(size, len(data)) > most:
        raise UserError(f"{path}: has {max(size, len(data))} bytes, more than the {most} allowed; give the right file")
    return data


def read_text(path: Path, most: int) -> str:
    """A UTF-8 file of at most `most` bytes. UserError as `read_bytes`, and for bytes that are not UTF-8."""
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start}; convert it") from error


def read_json(path: Path, most: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes. UserError as `read_bytes` and `parse_json`."""
    value = parse_json(read_bytes(path, most), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__} instead of a JSON object; download it again")
    return value


def parse_json(data: bytes | str, where: str) -> Any:
    """The value of a JSON text. UserError, about `where`, for one that is not valid or larger than our bounds.

    Refused are also keys that come twice, lone surrogates, numbers of more than MAX_DIGITS digits, more than
    MAX_JSON_VALUES values and more than MAX_NESTING levels.
    """
    try:
        text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
        values = text.count(",") + text.count("[") + text.count("{")
        if values > MAX_JSON_VALUES:
            raise ValueError(f"{values} values, more than the {MAX_JSON_VALUES} allowed")
        with without_garbage_collection():
            value = json.loads(text, object_pairs_hook=unique_keys, parse_int=_parse_int)
            _check_depth(value)
        if LONE_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not valid JSON (half a surrogate pair in a text); download it again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({first_line(error)}); correct it or download it again") from error
    return value


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Python's garbage collector is off: it would look at every new value again and again, which triples the time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The object_pairs_hook of json.loads that refuses a key that comes twice, with ValueError."""
    pairs = list(pairs)
    if len(pairs) > MAX_KEYS:
        raise ValueError(f"an object of {len(pairs)} keys, more than the {MAX_KEYS} allowed")
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {repeated[:60]!r} comes twice")
    return found


def expect(data: Mapping[str, Any], key: str, kind: Any, where: str, advice: str = "correct it") -> Any:
    """The value under `key`. UserError where it is missing or not of this kind.

    kind: a type, None, a tuple of alternatives, [kind] for a list of values of that kind, {str: kind} for an object.
    """
    value = data.get(key)
    if is_kind(value, kind):
        return value
    found = f"is {_short.repr(value)}" if key in data else "is missing"
    raise UserError(f"{where}: {key} {found}; it must be {kind_name(kind)}; {advice}")


def expect_all(
    data: Mapping[str, Any], kinds: Mapping[str, Any], where: str, advice: str = "correct it", optional: bool = True
) -> None:
    """UserError where a value is not of the kind of its key (see `expect`).

    optional: whether a key whose value may be None may be missing.
    """
    for key, kind in kinds.items():
        if key not in data and not optional:
            raise UserError(f"{where}: {key} is missing; it must be {kind_name(kind)}; {advice}")
        expect(data, key, kind, where, advice)


def is_kind(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a kind (see `expect`). true and false are no numbers, whole numbers are numbers."""
    if isinstance(kind, tuple):
        return any(is_kind(value, k) for k in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(is_kind(v, kind[0]) for v in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(is_kind(v, kind[str]) for v in value.values())
    if kind is None:
        return value is None
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind)


def kind_name(kind: Any) -> str:
    """A kind in words, for messages."""
    if isinstance(kind, tuple):
        return " or ".join(kind_name(k) for k in kind)
    if isinstance(kind, list):
        return f"a list of values that are each {kind_name(kind[0])}"
    if isinstance(kind, dict):
        return f"an object whose values are each {kind_name(kind[str])}"
    return TYPE_NAMES[kind]


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
    """sha256 of a regular file's bytes. UserError where the file cannot be read."""
    with open_regular(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions and the disk") from error


def content_hash(files: FileHashes) -> str:
    """sha256 of a checkpoint: of the sorted lines `hash  name` of its files (the format of sha256sum)."""
    lines = "".join(f"{file['sha256']}  {name}\n" for name, file in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS + 1:  # and a sign
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _check_depth(value: Any) -> None:
    """ValueError for more than MAX_NESTING levels of lists and objects."""
    level = [value] if type(value) in (list, dict) else []
    for _ in range(MAX_NESTING):
        children = chain.from_iterable(item.values() if type(item) is dict else item for item in level)
        level = [child for child in children if type(child) is list or type(child) is dict]
    if level:
        raise ValueError(f"more than {MAX_NESTING} levels of lists and objects")
