"""Tokenizers and their vocabularies: find one, read one, match two by their token strings."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.checkpoints.files import open_regular, read_json
from zoo.checkpoints.side_files import SENTENCEPIECE_FILES, TOKENIZER_FILES, VOCABULARY_FILES, vocabulary_file
from zoo.checkpoints.token_ids import parse_token_ids
from zoo.errors import UserError
from zoo.limits import (
    MAX_CONFIG,
    MAX_JSON,
    TEXT_MEMORY_PER_BYTE,
    TEXT_SECONDS_PER_MB,
    TOKENIZER_MEMORY,
    TOKENIZER_MEMORY_PER_BYTE,
    TOKENIZER_SECONDS,
    TOKENIZER_SECONDS_PER_MB,
)
from zoo.sandbox import Limits, shared

BYTE_VOCAB = 256  # size of the byte vocabulary: token ids 0 to 255 are the bytes themselves
BYTE_TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
MAX_PADDING = 1024  # rows of padding after a vocabulary; our choice: more are another vocabulary


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


def byte_tokens(data: bytes) -> Tensor:
    """The bytes of a text as token ids, int64 [len(data)]."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long() if data else torch.empty(0, dtype=torch.int64)


def save_byte_tokenizer(folder: Path) -> None:
    """Writes the byte tokenizer to a folder, so that AutoTokenizer loads it as a fast tokenizer."""
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(BYTE_TOKENIZER_CONFIG, indent=2) + "\n")


def find_tokenizer(given: str | Path | None, target: str | Path | dict[str, Any]) -> Path | None:
    """The folder of the `given` tokenizer, else of the one beside the target's config, else None.

    UserError where the given folder, or the folder of the given file, holds no tokenizer."""
    if given is not None:
        path = Path(given)
        folder = path.parent if path.is_file() else path
        if not has_tokenizer(folder):
            kinds = "tokenizer.json, tokenizer.model, vocab.json with merges.txt, or vocab.txt"
            raise UserError(f"{given}: no tokenizer found ({kinds}); save it with save_pretrained")
        return folder
    if isinstance(target, dict):
        return None
    path = Path(target)
    folder = path if path.is_dir() else path.parent
    return folder if path.exists() and has_tokenizer(folder) else None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the vocabulary of a tokenizer, in any format that transformers reads."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def fits_padded(tokens: dict[str, int], vocab: int) -> bool:
    """Whether a vocabulary of `vocab` rows can be this one (token string -> id) with rows of padding after it."""
    return bool(tokens) and max(tokens.values()) < vocab <= max(tokens.values()) + 1 + MAX_PADDING


def read_vocabulary(tokenizer: str | Path) -> dict[str, int]:
    """Token string -> id of a tokenizer: a folder, or a file of it. UserError where it is missing or damaged.

    A tokenizer.json is read here. transformers reads older formats, in a child process with limits of time and memory.
    """
    return read_vocabulary_and_parts(tokenizer)[0]


def read_vocabulary_and_parts(tokenizer: str | Path) -> tuple[dict[str, int], dict[str, Any]]:
    """(`read_vocabulary`, the content of its tokenizer.json without the vocabulary).

    transformers makes a tokenizer.json of most older formats. For the others the second value is empty.
    """
    path = Path(tokenizer)
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file() and file.name not in (*VOCABULARY_FILES[1:], "merges.txt"):
        content = read_json(file)
        ids = parse_token_ids(content, file)
        model = {key: value for key, value in content["model"].items() if key not in ("vocab", "merges")}
        return ids, {**content, "model": model}
    folder = path if path.is_dir() else path.parent
    if not path.exists() or not has_tokenizer(folder):
        raise UserError(f"{file}: no such file; save the tokenizer with save_pretrained")
    require_tokenizer_packages(folder)
    call = ("vocabulary_with_folder", {"folder": str(folder.resolve())})
    with tokenizer_errors(folder):
        reply, _ = shared.call(*call, tokenizer_limits(folder, 0), str(folder))
    return {str(token): int(row) for token, row in reply["vocabulary"].items()}, dict(reply["parts"])


def require_tokenizer_packages(folder: Path) -> None:
    """UserError where the tokenizer of a folder is a SentencePiece model, and what reads it is not installed."""
    file = vocabulary_file([p.name for p in folder.iterdir()])
    if file in SENTENCEPIECE_FILES and not all(map(_is_installed, ("sentencepiece", "google.protobuf"))):
        raise UserError(
            f"{folder / file}: needs the packages sentencepiece and protobuf: pip install 'headstart[sentencepiece]'"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that should hold it
        return False


def is_byte_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the tokenizer of `save_byte_tokenizer`, whose code we trust: its ids are bytes."""
    if any((folder / name).exists() for name in ("special_tokens_map.json", "added_tokens.json")):
        return False
    with contextlib.suppress(UserError):
        own = read_json(folder / "tokenizer_config.json", MAX_CONFIG) == BYTE_TOKENIZER_CONFIG
        return own and read_json(folder / "tokenizer.json") == json.loads(byte_tokenizer().to_str())
    return False


def encode_text(text: str, tokenizer: Path) -> Tensor:
    """The token ids of a text without special tokens, int64 [N].

    tokenizer: a folder, which transformers reads (AutoTokenizer), or a tokenizer.json, which the tokenizers library
    reads alone. Either does its work in a child process with limits of time and memory, because a tokenizer's
    normaliser or pattern may take any time. UserError where the tokenizer is damaged or passes the limits.
    """
    data = text.encode()
    if tokenizer.is_dir():
        if is_byte_tokenizer(tokenizer):
            return byte_tokens(data)
        call = ("encode_with_folder", {"folder": str(tokenizer.resolve())})
    else:
        call = ("encode_with_file", {"file": str(tokenizer.resolve())})
    with tokenizer_errors(tokenizer):
        _, ids = shared.call(*call, tokenizer_limits(tokenizer, len(data)), str(tokenizer), data)
    return torch.frombuffer(bytearray(ids), dtype=torch.int64) if ids else torch.empty(0, dtype=torch.int64)


def encode_strings(strings: Sequence[str], tokenizer: Path, word_inside: bool = False) -> tuple[Tensor, Tensor]:
    """(the number of token ids of each string, all ids one after the other), int64: [N] and [sum of the numbers].

    Each string is encoded as a part of a text: neither special tokens nor a word marker or space come before it.
    tokenizer: a folder or a tokenizer.json. word_inside: whether the strings are not split into words, so that
    WordPiece reads one that begins with its prefix (`##`) as the inside of a word. A child process with limits of time
    and memory does the work, as for `encode_text`. UserError where the tokenizer is damaged or passes the limits.
    """
    data = json.dumps(list(strings), ensure_ascii=False).encode()
    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if file.is_file() and file.name not in (*VOCABULARY_FILES[1:], "merges.txt"):
        call = ("encode_strings_with_file", {"file": str(file.resolve()), "word_inside": word_inside})
    else:
        folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
        call = ("encode_strings_with_folder", {"folder": str(folder.resolve()), "word_inside": word_inside})
    with tokenizer_errors(tokenizer):
        _, answer = shared.call(*call, tokenizer_limits(tokenizer, len(data)), str(tokenizer), data)
        values = torch.frombuffer(bytearray(answer), dtype=torch.int64) if answer else torch.empty(0, dtype=torch.int64)
        counts, ids = values[: len(strings)], values[len(strings) :]
        if len(counts) < len(strings) or int(counts.sum()) != len(ids):
            raise UserError("its answer is not a list of ids for each string")
    return counts, ids


def compare_tokenizers(first: Path, second: Path) -> tuple[bool, list[str]]:
    """(whether the tokenizers of two folders encode alike, their classes), as transformers loads them.

    UserError where one of them cannot be loaded.
    """
    limits = [tokenizer_limits(folder, 0) for folder in (first, second)]
    both = Limits(sum(limit.seconds for limit in limits), sum(limit.memory for limit in limits))
    arguments = {"folders": [str(folder.resolve()) for folder in (first, second)]}
    with tokenizer_errors(first):
        reply, _ = shared.call("compare_tokenizers", arguments, both, str(first))
    return reply["equal"], reply["classes"]


def tokenizer_limits(tokenizer: Path, text: int) -> Limits:
    """What a tokenizer may use for loading and for `text` bytes: an amount that grows with its files and the text.

    UserError for a file of the tokenizer that is too large, or not a regular one.
    """
    paths = [tokenizer / name for name in (*TOKENIZER_FILES, "config.json")] if tokenizer.is_dir() else [tokenizer]
    size = 0
    for path in paths:
        if path.exists():
            with open_regular(path) as file:
                size += os.fstat(file.fileno()).st_size
    if size > MAX_JSON:
        raise UserError(f"{tokenizer}: its files have {size} bytes, more than the {MAX_JSON} allowed; use another one")
    seconds = TOKENIZER_SECONDS + size * TOKENIZER_SECONDS_PER_MB / 1e6 + text * TEXT_SECONDS_PER_MB / 1e6
    return Limits(seconds, TOKENIZER_MEMORY + size * TOKENIZER_MEMORY_PER_BYTE + text * TEXT_MEMORY_PER_BYTE)


@contextlib.contextmanager
def tokenizer_errors(tokenizer: Path) -> Iterator[None]:
    """Adds to a UserError of the sandbox that the tokenizer at this path is to blame."""
    try:
        yield
    except UserError as error:
        reason = str(error).removeprefix(f"{tokenizer}: ")
        raise UserError(f"{tokenizer}: the tokenizer cannot be used ({reason}); save it again") from error


def rows_by_token(donor: dict[str, int], target: dict[str, int], n_source: int, n_target: int) -> Tensor:
    """int64 [n_target]: the donor's embedding row for each token string of the target, -1 if the donor has none.

    donor, target: token string -> row. n_source, n_target: rows of the donor's and of the target's embedding."""
    index = torch.full((n_target,), -1)
    for token, row in target.items():
        if row < n_target and donor.get(token, n_source) < n_source:
            index[row] = donor[token]
    return index
