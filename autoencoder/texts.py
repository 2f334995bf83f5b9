"""The text on which what a field writes is trained: what the donors learned from, else what they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from autoencoder.behaviour import make_skeleton
from autoencoder.donors import TrainingDonor
from zoo.donors.donor import Donor
from zoo.errors import UserError
from zoo.streams import stream_seed
from zoo.training.corpora import donor_text, encode_corpus
from zoo.training.documents import TextSource
from zoo.vocabulary import BYTE_VOCAB, byte_tokens

SAMPLED = (64, 256)  # sequences sampled from a donor without a known text, and tokens of each
LEAST_TOKENS = 1024


def read_texts(donors: Sequence[TrainingDonor], given: Mapping[str, Path], seed: int) -> list[tuple[str, Tensor]]:
    """For each donor the name of its text, and the text in the donor's tokens, int64 [N].

    Given files come first (see `donors.given_corpora`), then the text that the donor's facts name, then sequences that
    are sampled from the donor itself. Raises UserError for a text of too few tokens, or of unknown tokens."""
    texts: list[tuple[str, Tensor]] = []
    kept: dict[tuple[str, int], Tensor] = {}
    for donor in donors:
        name, key = _text_name(donor, given), donor.shape.vocab
        if name is None:
            texts.append((f"sampled from {donor.name}", sample_tokens(donor.donor, seed)))
            continue
        if (name, key) not in kept:
            kept[name, key] = _encode(donor, given, name)
        texts.append((name, kept[name, key]))
    return texts


def _text_name(donor: TrainingDonor, given: Mapping[str, Path]) -> str | None:
    for name in (donor.name, donor.corpus, ""):
        if name in given:
            return name or "the given text"
    return donor.corpus if donor_text(donor.donor.facts, {}, donor.name) is not None else None


def _encode(donor: TrainingDonor, given: Mapping[str, Path], name: str) -> Tensor:
    own = {key: path for key, path in given.items() if key}
    text = donor_text(donor.donor.facts, own, donor.name) if name != "the given text" else None
    if text is not None and donor.shape.vocab == BYTE_VOCAB:
        tokens = byte_tokens(text)
    else:
        path = given.get("") or given.get(donor.name) or given.get(donor.corpus)
        if path is None:
            raise UserError(f"{donor.name}: its text {name!r} is known only for byte-level donors; give --corpus FILE")
        tokens = encode_corpus(TextSource(str(path)), _tokenizer(donor.donor), donor.shape.vocab)
    if len(tokens) < LEAST_TOKENS:
        raise UserError(f"the text {name!r} of {donor.name} has {len(tokens)} tokens; give at least {LEAST_TOKENS}")
    return tokens


def _tokenizer(donor: Donor) -> Path | None:
    folder = getattr(donor, "folder", None)
    return folder if folder is not None and (Path(folder) / "tokenizer.json").is_file() else None


@torch.no_grad()
def sample_tokens(donor: Donor, seed: int) -> Tensor:
    """Sequences that a donor writes, one after the other: int64 [N]."""
    from transformers import GenerationConfig

    count, length = SAMPLED
    assert donor.blueprint.metadata is not None
    skeleton = make_skeleton(donor.config, donor.blueprint.metadata)
    weights = {name: donor.read(name, torch.float32) for name in skeleton.blueprint.names}
    skeleton.module.load_state_dict(weights, strict=False, assign=True)
    skeleton.module.tie_weights()  # type: ignore[operator]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, f"text of {donor.name}"))
        start = torch.randint(donor.blueprint.metadata.vocab, (count, 1))
        settings = GenerationConfig(do_sample=True, max_new_tokens=length, top_k=0, pad_token_id=0, eos_token_id=None)
        written = skeleton.module.eval().generate(start, generation_config=settings)  # type: ignore[operator]
    return written.flatten()
