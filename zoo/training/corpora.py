"""Corpora: files as token tensors, and the text that every Python ships."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.vocabulary import BYTE_VOCAB, first_line


def python_reference() -> bytes:
    """Python's language reference (`pydoc_data.topics`), its topics in alphabetical order, every paragraph once:
    topics overlap, and a paragraph that is both learned from and held out would flatter the loss."""
    from pydoc_data.topics import topics

    paragraphs = (p.strip("\n") for name in sorted(topics) for p in topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(p for p in paragraphs if p)).encode()


def split_held_out(data: bytes, block: int = 4096, every: int = 9) -> tuple[bytes, bytes]:
    """(train, held out): every `every`-th block of `block` bytes is held out, so that both cover the whole text."""
    blocks = [data[i : i + block] for i in range(0, len(data), block)]
    held = range(0, len(blocks), every)
    return b"".join(b for i, b in enumerate(blocks) if i not in held), b"".join(blocks[i] for i in held)


def reference_corpus() -> bytes:
    """Python's language reference with what the nursery holds out at its end. That is more than a tenth, so who holds
    out the last tenth of it measures on text that no donor of the nursery has seen."""
    return b"".join(split_held_out(python_reference()))


def byte_tokens(data: bytes) -> Tensor:
    """bytes -> int64 [len(data)], each token its byte."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def encode_corpus(path: str | Path, tokenizer: str | Path | None, vocab: int) -> Tensor:
    """A text file -> int64 [N] for a model of `vocab` tokens, by the tokenizer of a folder, or as bytes where there is
    none and `vocab` is 256. UserError where the file is missing or too short, where no tokenizer is known, or where
    the tokenizer makes ids that the model has not."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such corpus; give a text file with --corpus")
    if tokenizer is None:
        if vocab != BYTE_VOCAB:
            raise UserError(
                f"no tokenizer for a vocabulary of {vocab}: give one with --tokenizer, or put it beside the target's "
                f"config.json (only a vocabulary of {BYTE_VOCAB} is read as bytes)"
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
        raise UserError(f"{folder}: no tokenizer can be loaded from here: {first_line(error)}") from error
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
