"""Texts to train on: plain text, JSON lines, Parquet, CSV, a folder of such files, or a data set of the hub.

The library `datasets` reads what is not plain text, in a child process with limits and without code from the data set.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from zoo.checkpoints.atomic import disk_errors, scratch_folder
from zoo.checkpoints.files import open_regular
from zoo.checkpoints.hub import with_retries
from zoo.errors import UserError
from zoo.limits import (
    CORPUS_MEMORY,
    CORPUS_MEMORY_PER_BYTE,
    CORPUS_SECONDS,
    CORPUS_SECONDS_PER_MB,
    MAX_CORPUS,
    MAX_CORPUS_FILES,
    MAX_EXPANSION,
    MAX_HUB_CORPUS_FILE,
)
from zoo.sandbox import Limits, shared
from zoo.words import shortened_list

log = logging.getLogger(__name__)

SPLIT, COLUMN = "train", "text"  # read where none is named
BLANK_LINE = "\n\n"  # between two documents, where the tokenizer has no token for the end of a text
KINDS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv",
    ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip  # ending -> kind; alone, a file of any other ending is text
NAMES = {"text": "plain text", "json": "JSON", "parquet": "Parquet", "csv": "CSV"}
IGNORED = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "state.json"}  # beside a data set
SPLIT_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "dev": "validation",
    "val": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip  # word in the name of a file or folder -> split, as `datasets` has them
NUMBERED = re.compile(r"(\w+)-\d{5}-of-\d{5}.*")  # NAME-00000-of-00012.parquet holds a part of the split NAME
DATASET_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@((?!\S*\.\.)\w[\w.-]*))?(?:/([\w./-]+))?", re.ASCII)
BINARY_STARTS = {
    b"\x1f\x8b": "a gzip archive", b"PK\x03\x04": "a zip archive", b"\x28\xb5\x2f\xfd": "a zstandard archive",
    b"BZh": "a bzip2 archive", b"\xfd7zXZ\x00": "an xz archive", b"\x89PNG": "an image", b"\xff\xd8\xff": "an image",
    b"GIF8": "an image", b"%PDF-": "a PDF document", b"\x7fELF": "a program",
}  # fmt: skip
PARQUET_START = b"PAR1"
SAMPLE = 1 << 16  # bytes at the start of a file by which it is judged
TEXT_CONTROLS = b"\t\n\v\f\r\b\x1b"  # control characters that occur in text
MAX_CONTROL_SHARE = 0.01  # of other control characters: binary data has a tenth
LINES_LOOKED_AT = 3  # lines of a plain text that are tried as JSON


@dataclass(frozen=True)
class TextSource:
    """Where a text is: `address` is a file, a folder or a hub data set org/name[@revision][/FOLDER].

    split and column: of a data set; None for `train` and `text`."""

    address: str
    split: str | None = None
    column: str | None = None


@dataclass(frozen=True)
class Corpus:
    """A text as bytes, usually UTF-8, and where they come from, in JSON values."""

    text: bytes
    about: dict[str, Any]  # {format, documents, bytes, whole}; also separator, split, column and revision, if any

    def decode(self, where: str) -> str:
        """The text, without a character that the end of what was read cuts in two. UserError where it is not UTF-8."""
        try:
            return self.text.decode()
        except UnicodeDecodeError as error:
            if self.about["whole"] or error.start < len(self.text) - 3:
                raise UserError(
                    f"{where}: is not UTF-8 at byte {error.start}; convert it, or use a model of bytes"
                ) from error
            return self.text[: error.start].decode()


@dataclass
class _Joined:
    """Documents that are joined until there are enough."""

    separator: bytes
    most: int
    parts: list[bytes] = field(default_factory=list)
    size: int = 0
    documents: int = 0
    whole: bool = True

    @property
    def left(self) -> int:
        return self.most - self.size

    def add(self, text: bytes, documents: int = 1) -> None:
        """Adds documents that are already joined with the separator."""
        if documents:
            text = self.separator + text if self.documents else text
            self.whole &= len(text) <= self.left
            self.parts.append(text[: self.left])
            self.size += len(self.parts[-1])
            self.documents += documents


def read_corpus(source: TextSource, separator: str = BLANK_LINE, most: int = MAX_CORPUS) -> Corpus:
    """The text of a source, at most its first `most` bytes. The documents of a data set are joined by `separator`.

    A plain text file is one document, whose bytes are not changed. UserError where there is no such source, split or
    column, where a file is not text by its content, and for what `datasets` cannot read.
    """
    path = Path(source.address)
    if path.is_dir():
        joined, about = _read_folder(path, source, separator, most)
    elif path.exists():
        joined, about = _read_file(path, source, separator, most)
    elif found := DATASET_ID.fullmatch(source.address):
        joined, about = _read_hub(found, source, separator, most)
    else:
        raise UserError(f"{path}: no such corpus; give a file, a folder, or a hub data set as org/name")
    text = b"".join(joined.parts)
    if not joined.whole and most == MAX_CORPUS:
        log.warning("%s: only the first %d MB of text are read", source.address, MAX_CORPUS // 10**6)
    return Corpus(text, about | {"documents": joined.documents, "bytes": len(text), "whole": joined.whole})


def _read_file(path: Path, source: TextSource, separator: str, most: int) -> tuple[_Joined, dict[str, Any]]:
    kind = file_kind(path)
    joined = _Joined(separator.encode(), most)
    if kind == "text":
        _refuse_options(source, f"{path}: is plain text")
        _read_plain(path, joined)
        return joined, {"format": "text"}
    if source.split not in (None, SPLIT):
        raise UserError(f"{path}: is one file, which has no split {source.split!r}; leave --split out")
    _read_rows([path], kind, source, joined)
    return joined, {"format": kind, "separator": separator, "column": source.column or COLUMN}


def _read_folder(path: Path, source: TextSource, separator: str, most: int) -> tuple[_Joined, dict[str, Any]]:
    names = [p.relative_to(path).as_posix() for p in sorted(path.rglob("*")) if p.is_file()]
    kind, chosen = _choose_files(names, source, f"{path}")
    joined = _Joined(separator.encode(), most)
    files = [path / name for name in chosen]
    for file in files:
        if file_kind(file) != kind:
            raise UserError(f"{file}: is not {NAMES[kind]} by its content; correct or remove it")
    about = {"format": kind, "separator": separator, "split": source.split or SPLIT}
    if kind == "text":
        if source.column is not None:
            raise UserError(f"{path}: holds plain text, which has no columns; leave --text-column out")
        for file in files:
            if joined.left > len(joined.separator):
                _read_plain(file, joined)
        joined.whole &= joined.documents == len(files)
        return joined, about
    _read_rows(files, kind, source, joined)
    return joined, about | {"column": source.column or COLUMN}


def _read_hub(found: re.Match[str], source: TextSource, separator: str, most: int) -> tuple[_Joined, dict[str, Any]]:
    """Downloads the files of a data set one by one into the hub's cache, until there is enough text."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    repo, revision, folder = found.groups()
    what = f"data set {source.address}"
    info = with_retries(lambda: HfApi().dataset_info(repo, revision=revision, files_metadata=True), what)
    sizes = {s.rfilename: s.size or 0 for s in info.siblings or ()}
    within = f"{folder.strip('/')}/" if folder else ""
    names = {name.removeprefix(within): name for name in sorted(sizes) if name.startswith(within)}
    kind, chosen = _choose_files(list(names), source, what)
    joined = _Joined(separator.encode(), most)
    for name in (names[n] for n in chosen):
        if joined.left <= len(joined.separator):
            joined.whole = False
            break
        if sizes[name] > MAX_HUB_CORPUS_FILE:
            raise UserError(f"{what}: {name} has {sizes[name]} bytes, more than the {MAX_HUB_CORPUS_FILE} allowed")

        def download(name: str = name) -> str:
            return hf_hub_download(repo, name, repo_type="dataset", revision=info.sha)

        with disk_errors(Path(constants.HF_HUB_CACHE)):
            file = Path(with_retries(download, what))
        if file_kind(file) != kind:
            raise UserError(f"{what}: {name} is not {NAMES[kind]} by its content; give another data set")
        if kind == "text":
            _read_plain(file, joined)
        else:
            _read_rows([file], kind, source, joined)
    about = {"format": kind, "separator": separator, "split": source.split or SPLIT, "revision": info.sha}
    return joined, about if kind == "text" else about | {"column": source.column or COLUMN}


def _choose_files(names: Sequence[str], source: TextSource, where: str) -> tuple[str, list[str]]:
    """The kind of a folder's data files and those of the split, in order. names: relative paths with slashes."""
    files = [n for n in names if not any(part.startswith(".") for part in n.split("/"))]
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in files:
        path = PurePosixPath(name)
        if path.name not in IGNORED and path.suffix.lower() in KINDS:
            kinds[KINDS[path.suffix.lower()]].append(name)
    if not kinds:
        known = ", ".join(dict.fromkeys(KINDS))
        raise UserError(f"{where}: holds no file of text ({known}); give another folder or data set")
    if len(kinds) > 1:
        raise UserError(f"{where}: holds {' and '.join(NAMES[k] for k in sorted(kinds))}; keep files of one kind")
    kind, found = kinds.popitem()
    if len(found) > MAX_CORPUS_FILES:
        raise UserError(f"{where}: holds {len(found)} files, more than the {MAX_CORPUS_FILES} allowed")
    if len(files) > len(found):
        log.info("%s: %d files that are not %s are left out", where, len(files) - len(found), NAMES[kind])
    splits: dict[str, list[str]] = defaultdict(list)
    for name in found:
        splits[split_of(name)].append(name)
    split = source.split or SPLIT
    if split not in splits:
        raise UserError(f"{where}: has no split {split!r}; give one with --split: {shortened_list(sorted(splits))}")
    _refuse_subsets(splits[split], where)
    return kind, sorted(splits[split])


def _refuse_subsets(names: Iterable[str], where: str) -> None:
    """UserError where the files are those of several data sets: each in a folder of its own, which is no split."""
    tops = {name.split("/")[0] for name in names if "/" in name}
    subsets = sorted(top for top in tops if split_word(top) is None and top != "data")
    if len(subsets) > 1 and all("/" in name for name in names):
        raise UserError(f"{where}: holds several sets; add one to the address after a slash: {shortened_list(subsets)}")


def split_of(name: str) -> str:
    """The split of a data file by its name, else by the folders that it is in, `train` where none names one."""
    *folders, file = name.split("/")
    numbered = NUMBERED.fullmatch(file)
    if numbered and numbered[1].islower() and not numbered[1].isdigit():
        return SPLIT_WORDS.get(numbered[1], split_word(numbered[1]) or numbered[1])
    words = (split_word(part) for part in (PurePosixPath(file).stem, *reversed(folders)))
    return next((word for word in words if word is not None), SPLIT)


def split_word(name: str) -> str | None:
    """The split that a word of a name stands for, such as validation for `my-dev_set`."""
    return next((SPLIT_WORDS[w] for w in re.split(r"[\W\d_]+", name.lower()) if w in SPLIT_WORDS), None)


def file_kind(path: Path) -> str:
    """The kind of a file by its content, and for text formats by its ending. UserError for what holds no text."""
    with open_regular(path) as file:
        start = file.read(SAMPLE)
    kind = KINDS.get(path.suffix.lower(), "text")
    if start.startswith(PARQUET_START):
        return "parquet"
    if kind == "parquet":
        raise UserError(f"{path}: is not Parquet, although it is named so; fetch it again")
    if problem := binary_problem(start):
        raise UserError(f"{path}: {problem}; give text, JSON lines, Parquet or CSV")
    if kind == "text" and _looks_like_json_lines(start):
        log.warning("%s: looks like JSON lines and is read as plain text; name it .jsonl to read its documents", path)
    return kind


def binary_problem(start: bytes) -> str | None:
    """Why the first bytes of a file are not text, None where they are. Text in other encodings than UTF-8 is text."""
    for magic, name in BINARY_STARTS.items():
        if start.startswith(magic):
            return f"is {name}, not text"
    if b"\0" in start:
        return "holds zero bytes, so it is not text"
    odd = sum(start.count(bytes([c])) for c in range(32) if c not in TEXT_CONTROLS)
    return "holds binary data, not text" if odd > MAX_CONTROL_SHARE * len(start) else None


def _looks_like_json_lines(start: bytes) -> bool:
    import json

    lines = [line for line in start.split(b"\n")[:-1] if line.strip()][:LINES_LOOKED_AT]
    try:
        return bool(lines) and all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False


def _read_plain(path: Path, joined: _Joined) -> None:
    """Adds a plain text file as one document."""
    with open_regular(path) as file:
        text = file.read(joined.left + 1)
    if b"\0" in text:
        raise UserError(f"{path}: holds a zero byte at {text.index(0)}, so it is not text; give text")
    joined.add(text)


def _read_rows(files: Sequence[Path], kind: str, source: TextSource, joined: _Joined) -> None:
    """Adds the documents of the text column of JSON, Parquet or CSV files."""
    size = min(MAX_EXPANSION * sum(file.stat().st_size for file in files), joined.left)
    limits = Limits(CORPUS_SECONDS + CORPUS_SECONDS_PER_MB * size / 1e6, CORPUS_MEMORY + CORPUS_MEMORY_PER_BYTE * size)
    where = str(files[0]) if len(files) == 1 else str(files[0].parent)
    arguments = {
        "files": [str(file.resolve()) for file in files],
        "kind": kind,
        "column": source.column or COLUMN,
        "separator": joined.separator.decode(),
        "most": joined.left,
    }
    with scratch_folder() as cache:
        reply, text = shared.call("read_documents", arguments | {"cache": str(cache)}, limits, where)
    if reply["empty"]:
        log.warning("%s: %d rows without a text are left out", where, reply["empty"])
    joined.add(text, reply["documents"])
    joined.whole &= reply["whole"]


def _refuse_options(source: TextSource, what: str) -> None:
    """UserError for a split or a column of what has none."""
    if source.split not in (None, SPLIT):
        raise UserError(f"{what}, which has no split {source.split!r}; leave --split out")
    if source.column is not None:
        raise UserError(f"{what}, which has no column {source.column!r}; leave --text-column out")
