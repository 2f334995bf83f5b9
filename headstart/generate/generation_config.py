"""The generation_config.json of a generated checkpoint: sampling settings and the ids of special tokens."""

from __future__ import annotations

import filecmp
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.checkpoints.files import file_inside, read_json
from zoo.donors.folder import FolderDonor
from zoo.errors import UserError
from zoo.limits import MAX_CONFIG
from zoo.targets.blueprint import Blueprint
from zoo.vocabulary import has_tokenizer, read_vocabulary

log = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
# Keys of token ids that do not end in token_id: lists of ids, lists of lists, or pairs of a position and an id.
ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def copy_generation_config(
    target: str | Path | dict[str, Any], donors: Sequence[FolderDonor], blueprint: Blueprint, folder: Path
) -> None:
    """Copies the generation config beside the target's config, else the one of the donors, to an output's folder.

    That of the donors is copied where they have the same one, its token ids mean the same in the output (which has
    their tokenizer, or none and as many tokens), and the target's config states no other ids. A file that is not copied
    is logged with the reason.
    """
    place = None if isinstance(target, dict) or not Path(target).exists() else Path(target)
    place = place.parent if place is not None and place.is_file() else place
    if place is not None and (place / GENERATION_CONFIG).is_file():
        source, having = place, []
    else:
        having = [donor for donor in donors if GENERATION_CONFIG in donor.files]
        if not having:
            return
        source = having[0].folder
    try:
        reason = None if source == place else _difference(having, blueprint, folder)
        content = read_json(file_inside(source, GENERATION_CONFIG), MAX_CONFIG)
    except UserError as error:
        log.warning("no %s is copied: %s", GENERATION_CONFIG, error)
        return
    reason = reason or _misfit(content, blueprint)
    if reason is not None:
        log.warning("no %s is copied from %s: %s", GENERATION_CONFIG, source, reason)
    else:
        shutil.copyfile(source / GENERATION_CONFIG, folder / GENERATION_CONFIG)


def _difference(having: Sequence[FolderDonor], blueprint: Blueprint, folder: Path) -> str | None:
    """Why the generation config of donors is not that of the output, None where it may be."""
    first = having[0]
    contents = [read_json(file_inside(donor.folder, GENERATION_CONFIG), MAX_CONFIG) for donor in having]
    if any(content != contents[0] for content in contents):
        return "the donors have different ones"
    file, other = folder / "tokenizer.json", first.folder / "tokenizer.json"
    if file.is_file() and other.is_file() and filecmp.cmp(file, other, shallow=False):
        return None  # reading a vocabulary takes as long as sampling a small model
    own = read_vocabulary(folder) if has_tokenizer(folder) else None
    theirs = first.vocabulary()
    if theirs is not None:
        return None if own == theirs else "its token ids belong to another tokenizer"
    donor, target = first.blueprint.metadata, blueprint.metadata
    return None if donor and target and donor.vocab == target.vocab else "the target has another number of tokens"


def _misfit(content: Mapping[str, Any], blueprint: Blueprint) -> str | None:
    """Why a generation config does not fit a target, None where it does."""
    vocab = blueprint.metadata.vocab if blueprint.metadata is not None else 0
    for key, value in content.items():
        if key.endswith(("token_id", "token_ids")) or key in ID_LISTS:
            outside = next((i for i in _numbers(value) if i >= vocab), None)  # -1 stands for none
            if outside is not None:
                return f"{key} names token {outside}, outside the {vocab} of the target"
    config = blueprint.config or {}
    for key in SPECIAL:
        stated, given = set(_numbers(config.get(key))), set(_numbers(content.get(key)))
        if stated and given and not stated & given:
            return f"its {key} is {content[key]}, the target's {config[key]}"
    return None


def _numbers(value: Any) -> Iterator[int]:
    """The whole numbers in a value, also in nested lists."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)
