"""The vocabulary of a tokenizer.json, read without the tokenizers library, which builds all that the file asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.checkpoints.files import expect, is_kind, read_json
from zoo.errors import UserError

ADVICE = "save it again with save_pretrained"


def read_token_ids(path: Path) -> dict[str, int]:
    """Token string -> id of a tokenizer.json, added tokens included. UserError for a file that is none."""
    return parse_token_ids(read_json(path), path)


def parse_token_ids(content: dict[str, Any], path: Path) -> dict[str, int]:
    """Token string -> id of the content of a tokenizer.json. UserError, about `path`, where it is none."""
    if not isinstance(content.get("model"), dict):
        raise UserError(f"{path}: is not a tokenizer (it has no model); {ADVICE}")
    ids = _model_ids(content["model"].get("vocab"), str(path))
    for token in expect(content, "added_tokens", (None, [dict]), str(path), ADVICE) or ():
        where = f"{path}: added_tokens"
        ids[expect(token, "content", str, where, ADVICE)] = expect(token, "id", int, where, ADVICE)
    if ids and not 0 <= min(ids.values()) <= max(ids.values()) < 2**31:
        raise UserError(f"{path}: has token ids from {min(ids.values())} to {max(ids.values())}; {ADVICE}")
    return ids


def _model_ids(vocab: Any, where: str) -> dict[str, int]:
    """The ids of the tokens of a tokenizer's model, without those that were added."""
    if isinstance(vocab, list):  # Unigram: [[token, score], …]
        pairs = [entry for entry in vocab if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)]
        if len(pairs) == len(vocab):
            return {token: i for i, (token, _) in enumerate(pairs)}
    elif is_kind(vocab, {str: int}):
        return dict(vocab)
    raise UserError(f"{where}: is not a tokenizer (its model has no vocabulary); {ADVICE}")
