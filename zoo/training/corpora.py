"""Corpora: files as token tensors, and the text that every Python ships."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.vocabulary import BYTE_VOCAB, encode_text


def python_reference() -> bytes:
    """Python's language reference (`pydoc_data.topics`): topics in alphabetical order, every paragraph once.

    Topics overlap, and a paragraph in both the training and the held-out text would lower the held-out loss."""
    from pydoc_data.topics import topics

    paragraphs = (p.strip("\n") for name in sorted(topics) for p in topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(p for p in paragraphs if p)).encode()


def split_held_out(data: bytes, block: int = 4096, every: int = 9) -> tuple[bytes, bytes]:
    """Splits a text into (training, held out). Every `every`-th block of `block` bytes is held out, so both parts cover
    the whole text."""
    blocks = [data[i : i + block] for i in range(0, len(data), block)]
    held = range(0, len(blocks), every)
    return b"".join(b for i, b in enumerate(blocks) if i not in held), b"".join(blocks[i] for i in held)


def reference_corpus() -> bytes:
    """Python's language reference, with the embedded zoo's held-out text at the end.

    That is more than a tenth, so no donor of the embedded zoo has seen the last tenth of this text."""
    return b"".join(split_held_out(python_reference()))


def byte_tokens(data: bytes) -> Tensor:
    """The bytes of a text as token ids, int64 [len(data)]."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def encode_corpus(path: str | Path, tokenizer: str | Path | None, vocab: int) -> Tensor:
    """A text file as token ids, int64 [N], for a model with a vocabulary of `vocab` tokens.

    tokenizer: folder of the tokenizer; None reads the bytes, if `vocab` is 256. Raises UserError for a missing file, a
    missing tokenizer, or a tokenizer that produces token ids outside the vocabulary."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such corpus; give a text file with --corpus")
    if tokenizer is None:
        if vocab != BYTE_VOCAB:
            raise UserError(
                f"no tokenizer for a vocabulary of {vocab} tokens: give one with --tokenizer, or put it beside the "
                f"target's config.json (text is read as bytes only for a vocabulary of {BYTE_VOCAB})"
            )
        tokens = byte_tokens(path.read_bytes())
    else:
        tokens = _tokenize(path, Path(tokenizer))
    if len(tokens) and int(tokens.max()) >= vocab:
        raise UserError(
            f"{tokenizer}: the tokenizer produces token id {int(tokens.max())} for {path}, but the target's vocabulary "
            f"has {vocab} tokens; give the target's own tokenizer"
        )
    return tokens


def _tokenize(path: Path, folder: Path) -> Tensor:
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start}; convert it, or use a model of bytes") from error
    return encode_text(text, folder)
