"""Tokenizers and their vocabularies: find one, read one, match two by their token strings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.words import first_line

BYTE_VOCAB = 256  # size of the byte vocabulary: token ids 0 to 255 are the bytes themselves


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level tokenizers (GPT-2's table), by byte value."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {b: chr(b) for b in printable}
    table |= {b: chr(BYTE_VOCAB + n) for n, b in enumerate(b for b in range(BYTE_VOCAB) if b not in table)}
    return [table[b] for b in range(BYTE_VOCAB)]


def byte_tokenizer() -> Any:
    """A `tokenizers.Tokenizer` whose token ids are the bytes of UTF-8: byte-level BPE without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_byte_tokenizer(folder: Path) -> None:
    """Writes the byte tokenizer to a folder, so that AutoTokenizer loads it as a fast tokenizer."""
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def find_tokenizer(given: str | Path | None, target: str | Path | dict[str, Any]) -> Path | None:
    """The folder of the `given` tokenizer, else of the one beside the target's config, else None.

    Raises UserError if the given one has no tokenizer.json, the file whose tokens can be matched by their strings."""
    if given is not None:
        path = Path(given)
        folder = path.parent if path.is_file() else path
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{given}: no tokenizer.json found; save the tokenizer with save_pretrained")
        return folder
    if isinstance(target, dict):
        return None
    path = Path(target)
    folder = path if path.is_dir() else path.parent
    return folder if path.exists() and (folder / "tokenizer.json").is_file() else None


def read_vocabulary(tokenizer: str | Path) -> dict[str, int]:
    """Token string -> id, read from a tokenizer.json or its folder. Raises UserError if it is missing or damaged."""
    from tokenizers import Tokenizer

    path = Path(tokenizer)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file; save the tokenizer with save_pretrained")
    try:
        return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the tokenizers library has no exception of its own
        raise UserError(
            f"{path}: is not a tokenizer ({first_line(error)}); save it again with save_pretrained"
        ) from error


def rows_by_token(donor: dict[str, int], target: dict[str, int], n_source: int, n_target: int) -> Tensor:
    """int64 [n_target]: the donor's embedding row for each token string of the target, -1 if the donor has none.

    donor, target: token string -> row. n_source, n_target: rows of the donor's and of the target's embedding."""
    index = torch.full((n_target,), -1)
    for token, row in target.items():
        if row < n_target and donor.get(token, n_source) < n_source:
            index[row] = donor[token]
    return index
