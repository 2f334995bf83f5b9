"""Text: the corpus that every Python ships, bytes as tokens, and files as token tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import UserError

BYTES = 256  # ids 0..255 are the bytes themselves


def python_reference() -> bytes:
    """Python's language reference (`pydoc_data.topics`), its topics in alphabetical order, every paragraph once:
    topics overlap, and a paragraph that is both learned from and held out would flatter the loss."""
    from pydoc_data.topics import topics

    paragraphs = (p.strip("\n") for name in sorted(topics) for p in topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(p for p in paragraphs if p)).encode()


def hold_out(data: bytes, block: int = 4096, every: int = 9) -> tuple[bytes, bytes]:
    """(train, held out): every `every`-th block of `block` bytes is held out, so that both cover the whole text."""
    blocks = [data[i : i + block] for i in range(0, len(data), block)]
    held = range(0, len(blocks), every)
    return b"".join(b for i, b in enumerate(blocks) if i not in held), b"".join(blocks[i] for i in held)


def reference_corpus() -> bytes:
    """Python's language reference with what the nursery holds out at its end. That is more than a tenth, so who holds
    out the last tenth of it measures on text that no donor of the nursery has seen."""
    return b"".join(hold_out(python_reference()))


def byte_tokens(data: bytes) -> Tensor:
    """bytes -> int64 [len(data)], each token its byte."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def byte_characters() -> list[str]:
    """The printable stand-in of every byte in byte-level tokenizers (GPT-2's table), by byte value."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {b: chr(b) for b in printable}
    table |= {b: chr(BYTES + n) for n, b in enumerate(b for b in range(BYTES) if b not in table)}
    return [table[b] for b in range(BYTES)]


def byte_tokenizer() -> Any:
    """A `tokenizers.Tokenizer` whose ids are the 256 bytes of UTF-8: byte-level BPE without merges, nothing added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_byte_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which AutoTokenizer loads as a fast tokenizer."""
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def find_tokenizer(given: str | Path | None, target: str | Path | dict[str, Any]) -> Path | None:
    """The folder of the tokenizer that is given, or that lies beside the target's config. UserError where the given
    one has no tokenizer.json, the one file whose tokens can be matched by their strings."""
    if given is not None:
        path = Path(given)
        folder = path.parent if path.is_file() else path
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{given}: no tokenizer.json there; save one with save_pretrained")
        return folder
    if isinstance(target, dict):
        return None
    path = Path(target)
    folder = path if path.is_dir() else path.parent
    return folder if path.exists() and (folder / "tokenizer.json").is_file() else None


def encode_corpus(path: str | Path, tokenizer: str | Path | None, vocab: int) -> Tensor:
    """A text file -> int64 [N] for a model of `vocab` tokens, by the tokenizer of a folder, or as bytes where there is
    none and `vocab` is 256. UserError where the file is missing or too short, where no tokenizer is known, or where
    the tokenizer makes ids that the model has not."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such corpus; give a text file with --corpus")
    if tokenizer is None:
        if vocab != BYTES:
            raise UserError(
                f"no tokenizer for a vocabulary of {vocab}: give one with --tokenizer, or put it beside the target's "
                f"config.json (only a vocabulary of {BYTES} is read as bytes)"
            )
        tokens = byte_tokens(path.read_bytes())
    else:
        tokens = _tokenize(path, Path(tokenizer))
    if len(tokens) and int(tokens.max()) >= vocab:
        raise UserError(
            f"{tokenizer}: the tokenizer makes id {int(tokens.max())} on {path}, but the target has {vocab} tokens; "
            "give the tokenizer that belongs to the target"
        )
    return tokens


def _tokenize(path: Path, folder: Path) -> Tensor:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library has no exception of its own
        raise UserError(f"{folder}: no tokenizer can be loaded from here: {_reason(error)}") from error
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}; convert it, or use a byte model") from error
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a corpus is longer than any context, and that is fine here
    try:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    finally:
        logging.set_verbosity(verbosity)
    return torch.tensor(ids, dtype=torch.int64)


def read_vocabulary(tokenizer: str | Path) -> dict[str, int]:
    """token string -> id, of a tokenizer.json or the folder that holds one."""
    from tokenizers import Tokenizer

    path = Path(tokenizer)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer; save one with save_pretrained")
    try:
        return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the tokenizers library has no exception of its own
        raise UserError(f"{path}: is no tokenizer ({_reason(error)}); save it again with save_pretrained") from error


def rows_by_token(donor: dict[str, int], target: dict[str, int], rows: int, wanted: int) -> Tensor:
    """[wanted] int64: the donor's row for every token string of the target, -1 where the donor has none.

    rows: of the donor's embedding; wanted: of the target's."""
    index = torch.full((wanted,), -1)
    for token, row in target.items():
        if row < wanted and donor.get(token, rows) < rows:
            index[row] = donor[token]
    return index


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{lines[0] if lines else type(error).__name__}"[:200]
