"""Corpora as token tensors, and the text that every Python ships."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from zoo.checkpoints.files import read_json
from zoo.errors import UserError
from zoo.limits import MAX_CORPUS
from zoo.training.documents import BLANK_LINE, Corpus, TextSource, file_kind, read_corpus
from zoo.vocabulary import BYTE_VOCAB, byte_tokens, encode_text

MAX_END_OF_TEXT = 100  # characters of the token that ends a text


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


def encode_corpus(corpus: str | Path | TextSource, tokenizer: str | Path | None, vocab: int) -> Tensor:
    """A corpus as token ids, int64 [N], for a model with a vocabulary of `vocab` tokens.

    tokenizer: folder of the tokenizer; None reads the bytes, if `vocab` is 256. Raises UserError for a corpus that
    cannot be read, a missing tokenizer, or a tokenizer that produces token ids outside the vocabulary."""
    source = corpus if isinstance(corpus, TextSource) else TextSource(str(corpus))
    return encode_read_corpus(read_for_tokenizer(source, tokenizer, vocab), source.address, tokenizer, vocab)


def read_for_tokenizer(source: TextSource, tokenizer: str | Path | None, vocab: int, most: int = MAX_CORPUS) -> Corpus:
    """The text of a source, at most its first `most` bytes. Documents of a data set are joined by the tokenizer's
    end-of-text token, if it has one among the `vocab` tokens."""
    path = Path(source.address)
    if tokenizer is None or (path.is_file() and file_kind(path) == "text"):
        return read_corpus(source, most=most)
    return read_corpus(source, end_of_text(Path(tokenizer), vocab) or BLANK_LINE, most)


def encode_read_corpus(corpus: Corpus, address: str, tokenizer: str | Path | None, vocab: int) -> Tensor:
    """A text that was read, as `encode_corpus`. address: of the corpus, for errors."""
    if tokenizer is None:
        if vocab != BYTE_VOCAB:
            raise UserError(
                f"no tokenizer for a vocabulary of {vocab} tokens: give one with --tokenizer, or put it beside the "
                f"target's config.json (text is read as bytes only for a vocabulary of {BYTE_VOCAB})"
            )
        tokens = byte_tokens(corpus.text)
    else:
        tokens = encode_text(corpus.decode(address), Path(tokenizer))
    if len(tokens) and int(tokens.max()) >= vocab:
        raise UserError(
            f"{tokenizer}: the tokenizer produces token id {int(tokens.max())} for {address}, but the target's "
            f"vocabulary has {vocab} tokens; give the target's own tokenizer"
        )
    return tokens


def end_of_text(tokenizer: Path, vocab: int) -> str | None:
    """The token by which a tokenizer (a folder or a tokenizer.json) marks the end of a text.

    None if it has none that is one of the first `vocab` tokens; transformers adds one that the tokenizer lacks."""
    config = (tokenizer if tokenizer.is_dir() else tokenizer.parent) / "tokenizer_config.json"
    token = read_json(config).get("eos_token") if config.is_file() else None
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str) or not token or len(token) > MAX_END_OF_TEXT:
        return None
    ids = encode_text(token, tokenizer)
    return token if len(ids) == 1 and int(ids[0]) < vocab else None
