"""The tokenizer of a generated checkpoint: which donors share one, and its files."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.checkpoints.files import file_inside, read_json
from zoo.checkpoints.side_files import CHAT_TEMPLATES, TOKENIZER_FILES
from zoo.donors.folder import FolderDonor
from zoo.errors import UserError
from zoo.limits import MAX_CONFIG
from zoo.targets.blueprint import Blueprint
from zoo.vocabulary import compare_tokenizers

log = logging.getLogger(__name__)

TOKENIZER_CONFIG = "tokenizer_config.json"


def shared_tokenizer(donors: Sequence[FolderDonor], blueprint: Blueprint) -> Path | None:
    """The folder of the donors' tokenizer, if they share one and the target has a row for each of its tokens."""
    try:
        found = [(d.folder, vocabulary) for d in donors if (vocabulary := d.vocabulary()) is not None]
    except UserError as error:
        log.warning("no tokenizer is copied: %s", error)
        return None
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
    """Copies the files of a tokenizer, with its chat templates, and files of the names `extra`, where they exist."""
    for name in (*TOKENIZER_FILES, *extra):
        if (source / name).is_file():
            shutil.copyfile(file_inside(source, name), folder / name)
    for template in sorted((source / CHAT_TEMPLATES).glob("*.jinja")):
        (folder / CHAT_TEMPLATES).mkdir(exist_ok=True)
        name = f"{CHAT_TEMPLATES}/{template.name}"
        shutil.copyfile(file_inside(source, name), folder / name)


def keep_tokenizer_class(source: Path, folder: Path) -> None:
    """Makes transformers load the tokenizer that was copied from `source` as it does there.

    Where no file states its class, transformers takes that of the model beside it, and the model here may be another.
    The class is then written to tokenizer_config.json. A difference that remains is logged.
    """
    kinds = [_model_type(place) for place in (source, folder)]
    if None in kinds or kinds[0] == kinds[1]:
        return
    config = read_json(folder / TOKENIZER_CONFIG, MAX_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    try:
        equal, (name, here) = compare_tokenizers(source, folder)
        if not equal and "tokenizer_class" not in config:
            (folder / TOKENIZER_CONFIG).write_text(json.dumps(config | {"tokenizer_class": name}, indent=2) + "\n")
            equal, (name, here) = compare_tokenizers(source, folder)
    except UserError as error:
        log.warning("the tokenizer was copied and not checked: %s", error)
        return
    if not equal:
        log.warning(
            "the tokenizer encodes otherwise in the output: transformers loads that of %s as %s, beside a %s as %s; "
            "load it from its own folder", source, name, kinds[1], here,
        )  # fmt: skip


def _model_type(folder: Path) -> Any:
    """The model_type of the config in a folder, None without one."""
    return (
        read_json(folder / "config.json", MAX_CONFIG).get("model_type") if (folder / "config.json").is_file() else None
    )
