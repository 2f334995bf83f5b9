"""Corpora as token tensors, the two texts that every Python ships, and the texts that donors learned from."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.checkpoints.files import read_json
from zoo.errors import UserError
from zoo.limits import LEAST_TRAINING_TEXT, MAX_CORPUS, MAX_CORPUS_NAME
from zoo.training.documents import BLANK_LINE, Corpus, TextSource, file_kind, read_corpus
from zoo.vocabulary import BYTE_VOCAB, byte_tokens, encode_text

MAX_END_OF_TEXT = 100  # characters of the token that ends a text
CORPUS_NAME = re.compile(r"[a-z0-9]+([_-][a-z0-9]+)*")  # part of the names of donors
HELD_OUT = 0.1  # share of a given corpus, at its end, on which `compare` measures and nothing is trained
BLOCK = 4096  # bytes of a text that are held out together
REFERENCE_TITLE = "Python language reference (pydoc_data.topics)"  # `corpus` in the facts of general donors
# Modules of Python's library, together more than a megabyte; none is generated or a table.
LIBRARY_MODULES = (
    "argparse", "ast", "calendar", "codecs", "configparser", "copy", "csv", "dataclasses", "datetime", "decimal",
    "difflib", "dis", "doctest", "enum", "fractions", "functools", "gettext", "heapq", "inspect", "ipaddress",
    "locale", "mailbox", "optparse", "os", "pathlib", "pickle", "pickletools", "plistlib", "pprint", "random",
    "shutil", "socket", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading",
    "tokenize", "traceback", "turtle", "types", "typing", "uuid", "zipfile",
)  # fmt: skip


def python_reference() -> bytes:
    """Python's language reference (`pydoc_data.topics`): topics in alphabetical order, every paragraph once.

    Topics overlap, and a paragraph in both the training and the held-out text would lower the held-out loss."""
    from pydoc_data.topics import topics

    paragraphs = (p.strip("\n") for name in sorted(topics) for p in topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(p for p in paragraphs if p)).encode()


def library_source() -> bytes:
    """Source code of LIBRARY_MODULES, one after the other."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = (folder / f"{name}.py" for name in LIBRARY_MODULES)
    found = [path if path.is_file() else path.with_suffix("") / "__init__.py" for path in paths]
    return b"\n".join(path.read_bytes() for path in found if path.is_file())


EMBEDDED_TEXTS: dict[str, Callable[[], bytes]] = {"reference": python_reference, "source": library_source}


def split_held_out(data: bytes, block: int = BLOCK, every: int = 9) -> tuple[bytes, bytes]:
    """Splits a text into (training, held out). Every `every`-th block of `block` bytes is held out, so both parts cover
    the whole text."""
    blocks = [data[i : i + block] for i in range(0, len(data), block)]
    held = range(0, len(blocks), every)
    return b"".join(b for i, b in enumerate(blocks) if i not in held), b"".join(blocks[i] for i in held)


def reference_corpus() -> bytes:
    """Python's language reference, with the embedded zoo's held-out text at the end.

    That is more than a tenth, so no donor of the embedded zoo has seen the last tenth of this text."""
    return b"".join(split_held_out(python_reference()))


def read_training_texts(corpora: Mapping[str, str | Path]) -> dict[str, bytes]:
    """The texts of {name: file or folder}, training and held-out parts together.

    Raises UserError for a name that cannot be part of a donor's name or is that of an embedded text, for a file that
    does not exist or is not text, and for a text that is too short."""
    for name, path in corpora.items():
        check_corpus_name(name)
        if not Path(path).exists():
            raise UserError(f"{path}: no such file; give a file or a folder of text for the corpus {name!r}")
    texts = {}
    for name, path in corpora.items():
        texts[name] = read_corpus(TextSource(str(path))).text
        if len(texts[name]) < LEAST_TRAINING_TEXT:
            raise UserError(
                f"{path}: has {len(texts[name])} bytes of text, which is too short to train on; give at least "
                f"{LEAST_TRAINING_TEXT}"
            )
    return texts


def check_corpus_name(name: str) -> None:
    """UserError for a name that a given text cannot have."""
    if name in EMBEDDED_TEXTS:
        raise UserError(f"corpus {name!r}: is the name of an embedded text; choose another name")
    if not CORPUS_NAME.fullmatch(name) or len(name) > MAX_CORPUS_NAME:
        raise UserError(
            f"corpus {name!r}: donors are named after it, so use lower-case letters and digits, joined by '-' or '_', "
            f"at most {MAX_CORPUS_NAME} characters"
        )


def corpus_name(donor_facts: Mapping[str, Any]) -> str:
    """The name of the text that a donor was trained on, "" where its facts name none."""
    stated = donor_facts.get("corpus")
    return "reference" if stated == REFERENCE_TITLE else stated if isinstance(stated, str) else ""


def donor_text(donor_facts: Mapping[str, Any], given: Mapping[str, str | Path], donor_name: str = "") -> bytes | None:
    """The text that a donor was trained on, without its held-out part. None if it is not known.

    A file in `given` under the donor's name or the name of its corpus comes first, then the embedded text that the
    donor's facts name. A given file of a donor without facts is split as those of `headstart zoo train` are.
    Raises UserError if the text is not the one whose SHA-256 the facts hold.
    """
    name = corpus_name(donor_facts)
    path = next((given[key] for key in (donor_name, name) if key and key in given), None)
    if path is not None:
        text, where = read_corpus(TextSource(str(path))).text, str(path)
    elif name in EMBEDDED_TEXTS and isinstance(donor_facts.get("corpus_sha256"), str):
        text, where = EMBEDDED_TEXTS[name](), f"the text {name!r} of this Python"
    else:
        return None
    training, _ = split_held_out(text)
    learner = f"the donor {donor_name}" if donor_name else "a donor"
    for key, data in (("corpus_sha256", text), ("training_text_sha256", training)):
        if donor_facts.get(key) not in (None, text_sha256(data)):
            raise UserError(
                f"{where}: is not the text that {learner} was trained on (another SHA-256); give that text as "
                f"{name or 'NAME'}=FILE, or use the Python that trained the donor"
            )
    return training


def text_sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


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
