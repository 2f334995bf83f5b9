"""The tokenizer of a generated checkpoint: which donors share one, and its files."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from zoo.donors.folder import FolderDonor
from zoo.targets.blueprint import Blueprint

log = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


def shared_tokenizer(donors: Sequence[FolderDonor], blueprint: Blueprint) -> Path | None:
    """The folder of the donors' tokenizer, if they share one and the target has a row for each of its tokens."""
    found = [(d.folder, vocabulary) for d in donors if (vocabulary := d.vocabulary()) is not None]
    if not found:
        return None
    folder, first = found[0]
    if len(found) < len(donors) or any(vocabulary != first for _, vocabulary in found):
        log.info("no tokenizer is copied: the donors do not share one; give --tokenizer")
        return None
    if blueprint.metadata is None or max(first.values()) >= blueprint.metadata.vocab:
        log.info("no tokenizer is copied: that of the donors has more tokens than the target; give --tokenizer")
        return None
    return folder


def copy_tokenizer(source: Path, folder: Path, extra: Sequence[str] = ()) -> None:
    """Copies the files of a tokenizer, and files of the names `extra`, where they exist."""
    for name in (*TOKENIZER_FILES, *extra):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
