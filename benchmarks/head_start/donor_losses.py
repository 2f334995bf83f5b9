"""Losses of donors on the text of a comparison, without further training."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.scoring import donor_loss
from headstart.compare.trials import training_token_count
from zoo.donors.zoo import Zoo
from zoo.training.corpora import encode_corpus
from zoo.vocabulary import find_tokenizer, read_vocabulary


def donor_losses(zoo: Zoo, target: Path, corpus: Path) -> dict[str, float | None]:
    """{donor: loss on the held-out part of the corpus}, nats per token, for the donors that have the vocabulary of the
    target (a folder); None for a loss that is not finite."""
    folder = find_tokenizer(None, target)
    assert folder is not None
    own = read_vocabulary(folder)
    tokens = encode_corpus(corpus, folder, max(own.values()) + 1)
    held = tokens[training_token_count(tokens) :]
    return {d.name: donor_loss(d, held) for d in zoo.donors if d.vocabulary() == own}
