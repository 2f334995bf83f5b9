"""What a comparison reads: the corpus, the tokenizer, and hashes of the zoo and the trained model."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from headstart.compare.trials import open_zoo, training_token_count
from zoo.donors.folder import FolderDonor
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.training.corpora import HELD_OUT, text_sha256
from zoo.training.documents import TextSource, read_corpus
from zoo.vocabulary import BYTE_VOCAB, find_tokenizer, fits_padded

MAX_CALIBRATION = 100_000  # bytes at the beginning of the corpus, for methods that look at activations
CALIBRATION = 0.8  # largest share of the corpus for them: the last tenth of the tokens is held out


def find_target_tokenizer(
    given: str | Path | None, target: str | Path | dict[str, Any], zoo: str | Path | None, vocab: int
) -> Path | None:
    """The folder of the tokenizer: the given one, else the target's, else the one that the donors with the target's
    vocabulary share. None for bytes. Raises UserError where the donors have different ones."""
    found = find_tokenizer(given, target)
    if found is not None:
        return found
    donors = _donors_with_vocabulary(zoo, vocab)
    if not donors:
        return None
    if any(donor.vocabulary() != donors[0].vocabulary() for donor in donors):
        if vocab == BYTE_VOCAB:
            return None
        raise UserError(f"{zoo}: the donors have different tokenizers; give the target's own with --tokenizer")
    return donors[0].folder


def _donors_with_vocabulary(zoo: str | Path | None, vocab: int) -> list[FolderDonor]:
    """The donors that have a tokenizer and `vocab` tokens, else those whose tokenizer fits with padding."""
    donors = Zoo.open(zoo).donors if zoo is not None else ()
    tokens = {donor: donor.vocabulary() for donor in donors if isinstance(donor, FolderDonor)}
    sizes = {donor: meta.vocab for donor in tokens if (meta := donor.blueprint.metadata) is not None}
    exact = [donor for donor, found in tokens.items() if found is not None and sizes.get(donor) == vocab]
    return exact or [donor for donor, found in tokens.items() if found is not None and fits_padded(found, vocab)]


def check_lengths(corpus: str | Path, tokens: Tensor, sequence: int, config: dict[str, Any]) -> None:
    """Raises UserError where the held-out text is shorter than a window, or a window longer than the context."""
    held_out = len(tokens) - training_token_count(tokens)
    if held_out < sequence + 1:
        least = math.ceil((sequence + 1) / HELD_OUT)
        raise UserError(f"{corpus}: {len(tokens)} tokens are too few; give at least {least} for windows of {sequence}")
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(positions, int) and sequence > positions:
        raise UserError(
            f"--sequence {sequence}: the target has {positions} positions; give at most {positions} tokens per window"
        )


def write_calibration_text(text: bytes, folder: Path) -> Path:
    """Writes the beginning of a corpus, without any held-out text, to a file."""
    path = folder / "calibration.txt"
    beginning = text[: min(MAX_CALIBRATION, int(len(text) * CALIBRATION))]
    path.write_bytes(beginning.decode("utf-8", errors="ignore").encode())
    return path


def hash_text(text: str | Path | None) -> str | None:
    """sha256 of what is read of a text that is given to methods; None without one.

    Raises UserError where there is no such text."""
    return None if text is None else text_sha256(read_corpus(TextSource(str(text))).text)


def hash_zoo(zoo: str | Path | None, donor: str | None = None) -> str | None:
    """sha256 of the names and hashes of the donors of a zoo; without a zoo, of the `donor` outside one."""
    opened = open_zoo(zoo, donor)
    if opened is None:
        return None
    lines = "".join(f"{d.name} {d.sha256}\n" for d in opened.donors)
    return hashlib.sha256(lines.encode()).hexdigest()


def hash_model(model: str | Path | None) -> str | None:
    """sha256 of the files of a trained model's folder; a hub id itself."""
    if model is None or not Path(model).is_dir():
        return None if model is None else str(model)
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(model).rglob("*") if p.is_file()):
        with path.open("rb") as f:
            digest.update(f"{path.relative_to(model)} {hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
