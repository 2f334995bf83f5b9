"""Which donor of a zoo a source already is, and what that donor lacks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from zoo.checkpoints.files import FileHashes, content_hash
from zoo.checkpoints.side_files import names_in_earlier_hash
from zoo.checkpoints.sources import Source
from zoo.donors.layout import ROWS
from zoo.donors.records import read_record
from zoo.words import shortened_list


def find_donor(models: Path, source: Source, revisions: Sequence[str]) -> Path | None:
    """The folder of the donor that is the source at one of its revisions, None where it is not in the zoo."""
    for name in source.names if revisions else ():
        if (models / name).exists() and read_record(models / name)["revision"] in revisions:
            return models / name
    return None


def free_name(models: Path, names: Iterable[str]) -> str | None:
    """The first of the names that no donor has, None where all are taken."""
    return next((name for name in names if not (models / name).exists()), None)


def possible_revisions(source: Source, hashes: FileHashes) -> list[str]:
    """The revisions under which a zoo may have a source: its commit, or hashes of its content.

    The second hash is that of a zoo from before chat templates and slow tokenizers were copied.
    """
    earlier = {name: hashes[name] for name in names_in_earlier_hash(hashes)}
    found = [source.commit] if source.commit else [f"sha256:{content_hash(files)}" for files in (hashes, earlier)]
    return list(dict.fromkeys(found))


def may_be_present(models: Path, source: Source) -> bool:
    """Whether a donor has one of the source's names and files of the same names and sizes. Reads no weights."""
    return any(_has_same_sizes(models / name, source) for name in source.names)


def _has_same_sizes(home: Path, source: Source) -> bool:
    """Whether the donor in `home` has the file names and sizes of the source, those of the earlier hash at least."""
    files = read_record(home)["files"] if home.exists() else {}
    names, own = names_in_earlier_hash(source.files), names_in_earlier_hash(files)
    return {n: files[n]["size"] for n in own} == {n: source.files[n].size for n in names}


def missing_files(home: Path, record: dict[str, Any]) -> list[str]:
    """The donor's files that are missing or of another size. Only `verify` compares their bytes."""

    def is_present(file: str, size: int) -> bool:
        return (home / file).is_file() and (home / file).stat().st_size == size

    return [file for file, stamp in record["files"].items() if not is_present(file, stamp["size"])]


def is_complete(home: Path) -> bool:
    """Whether a donor has all files of its record, and its rows of the manifest."""
    return not missing_files(home, read_record(home)) and (home / ROWS).exists()


def note_absent_files(home: Path, files: Iterable[str], quiet: bool) -> None:
    """Names on stderr the files of a source that its donor was added without."""
    absent = sorted(set(files) - set(read_record(home)["files"]))
    if absent and not quiet:
        advice = f"remove {home} and add it again to have them"
        print(f"{home.name}: was added without {shortened_list(absent)}; {advice}", file=sys.stderr)
