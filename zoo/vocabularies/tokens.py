"""What is known of the tokens of one tokenizer: their ids, their normal forms, and the roles of special ones."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from zoo.checkpoints.files import read_json
from zoo.checkpoints.side_files import TOKENIZER_FILES
from zoo.limits import MAX_CONFIG
from zoo.vocabularies.forms import TokenFormat, detect_format, guess_format, is_byte_piece, token_bytes
from zoo.vocabulary import has_tokenizer, read_vocabulary_and_parts

BRACKETED = re.compile(r"<.+>|\[.+\]")  # how special tokens are written; others that have a role stand for text too
ROLES = ("eos", "bos", "unk", "mask", "cls", "sep", "pad")  # a token of several roles counts as the first of them


@dataclass(frozen=True)
class Tokens:
    """The tokens of a tokenizer."""

    ids: dict[str, int]  # token string -> id, added tokens included
    form: TokenFormat
    added: dict[str, bool] = field(default_factory=dict)  # added token -> whether it is special
    roles: dict[str, int] = field(default_factory=dict)  # bos, eos, unk, … -> id
    path: Path | None = None  # the tokenizer's folder or file; None where only the strings are known

    @classmethod
    def of_strings(cls, ids: dict[str, int]) -> Tokens:
        """Tokens of which only the strings are known. Their format is guessed."""
        return cls(ids, guess_format(ids))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of the special tokens, which stand for no text."""
        named = set(self.roles.values())
        return frozenset(
            i for token, i in self.ids.items() if self.added.get(token) or (i in named and BRACKETED.fullmatch(token))
        )

    @cached_property
    def bytes_of_id(self) -> dict[int, bytes]:
        """Id -> normal form of every token that stands for text."""
        return {
            i: token_bytes(token, self.form, token in self.added)
            for token, i in self.ids.items()
            if i not in self.special_ids
        }

    @cached_property
    def id_of_bytes(self) -> dict[bytes, int]:
        """Normal form -> id. Of tokens with one normal form, a byte-fallback token comes last, then the lowest id."""
        order = sorted(
            (is_byte_piece(token, self.form, data), i, data)
            for token, i in self.ids.items()
            if (data := self.bytes_of_id.get(i))
        )
        found: dict[bytes, int] = {}
        for _, i, data in order:
            found.setdefault(data, i)
        return found

    @cached_property
    def byte_pieces(self) -> frozenset[int]:
        """The ids of the tokens that are one byte and mean nothing by themselves."""
        return frozenset(
            i for token, i in self.ids.items() if is_byte_piece(token, self.form, self.bytes_of_id.get(i, b""))
        )


def read_tokens(tokenizer: str | Path, config: dict[str, Any] | None = None) -> Tokens:
    """The tokens of a tokenizer: a folder, or a file of it. UserError where it is missing or damaged.

    config: the model's, whose ids of special tokens count where the tokenizer's files do not name them.
    """
    path = Path(tokenizer)
    folder = path if path.is_dir() else path.parent
    files = [folder / name for name in TOKENIZER_FILES] if path.is_dir() else [path]
    states = tuple((str(file), (s := file.stat()).st_mtime_ns, s.st_size) for file in files if file.is_file())
    base = _read_cached(path, states)
    named = dict(base.roles)
    special = base.special_ids
    for role in ROLES:
        value = (config or {}).get(f"{role}_token_id")
        first = value[0] if isinstance(value, list) and value else value
        if role not in named and isinstance(first, int) and first in special:
            named[role] = first
    return base if named == base.roles else Tokens(base.ids, base.form, base.added, named, base.path)


@lru_cache(maxsize=4)
def _read_cached(path: Path, states: tuple[tuple[str, int, int], ...]) -> Tokens:
    """`read_tokens` without a config. states: path, time and size of the files, so that a changed one is read again."""
    ids, parts = read_vocabulary_and_parts(path)
    added = {
        token["content"]: bool(token.get("special"))
        for token in parts.get("added_tokens") or ()
        if isinstance(token, dict) and isinstance(token.get("content"), str)
    }
    form = detect_format(parts) if parts else guess_format(ids)
    folder = path if path.is_dir() else path.parent
    return Tokens(ids, form, added, _named_roles(folder, ids, parts), path if has_tokenizer(folder) else None)


def _named_roles(folder: Path, ids: dict[str, int], parts: dict[str, Any]) -> dict[str, int]:
    """Role -> id of the special tokens that the files of a tokenizer name."""
    roles: dict[str, int] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = read_json(folder / name, MAX_CONFIG) if (folder / name).is_file() else {}
        for role in ROLES:
            token = content.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token in ids:
                roles.setdefault(role, ids[token])
    model = parts.get("model")
    unknown = model.get("unk_token") if isinstance(model, dict) else None
    if isinstance(unknown, str) and unknown in ids:
        roles.setdefault("unk", ids[unknown])
    unknown_id = model.get("unk_id") if isinstance(model, dict) else None
    if isinstance(unknown_id, int) and unknown_id in ids.values():
        roles.setdefault("unk", unknown_id)
    return roles
