"""The text on which what a field writes is trained: what the donors learned from, else what they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoencoder.behaviour import make_skeleton
from autoencoder.donors import FOR_ALL, TrainingDonor
from zoo.donors.donor import Donor
from zoo.errors import UserError
from zoo.streams import stream_seed
from zoo.training.corpora import BLOCK, HELD_OUT, donor_text, encode_read_corpus, text_sha256
from zoo.training.documents import Corpus, TextSource, read_corpus
from zoo.training.text_features import text_features
from zoo.vocabulary import BYTE_VOCAB, byte_tokens


@dataclass(frozen=True)
class DonorText:
    """What a donor's part in training reads."""

    name: str
    tokens: Tensor  # int64 [N], in the donor's vocabulary
    sample: bytes | None  # the text as bytes, None where it is not known
    is_known: bool = True  # whether a donor learned from it; else the donor wrote it


SAMPLED = (64, 256)  # sequences sampled from a donor without a known text, and tokens of each
LEAST_TOKENS = 1024
LEAST_SCALE = 0.02  # of a component of the features of texts; below, it is the same text under two names


def read_texts(donors: Sequence[TrainingDonor], given: Mapping[str, Path], seed: int) -> list[DonorText]:
    """The text of each donor, without held-out parts.

    Given files come first (see `donors.given_corpora`), then the text that the donor's facts name, then sequences that
    are sampled from the donor itself. Raises UserError for a text of too few tokens, or of unknown tokens."""
    kept: dict[tuple[object, ...], DonorText | None] = {}  # reading and encoding a text takes seconds
    texts = []
    for donor in donors:
        name, facts = _text_name(donor, given), donor.donor.facts
        hashes = (facts.get("corpus_sha256"), facts.get("training_text_sha256"))
        key = (name, *hashes, donor.rows.numpy().tobytes())  # the rows tell vocabularies apart
        if key not in kept:
            kept[key] = _read(donor, given, name)
        texts.append(kept[key] or _sampled(donor, seed))
    return texts


def text_coordinates(texts: Sequence[DonorText], most: int) -> list[Tensor | None]:
    """The text of each donor as a few numbers [k], k <= most, with mean 0 and deviation 1 over the donors: the
    principal components of the features of all known texts. None for a donor of an unknown text, and for all if there
    is one text only."""
    samples = {text.name: text.sample for text in texts if text.is_known and text.sample is not None}
    if len(samples) < 2:
        return [None] * len(texts)
    features = torch.stack([text_features(sample) for sample in samples.values()])
    left, scales, _ = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    kept = scales[:most] > LEAST_SCALE
    if not kept.any():
        return [None] * len(texts)
    found = dict(zip(samples, left[:, :most][:, kept], strict=True))
    known = torch.stack([found[text.name] for text in texts if text.name in found])
    mean, deviation = known.mean(0), known.std(0, correction=0)
    return [(found[text.name] - mean) / deviation if text.name in found else None for text in texts]


def given_text_hashes(given: Mapping[str, Path]) -> list[str]:
    """A line for each given text, with the hash of its content: what a training run depends on."""
    return [f"{name}={text_sha256(read_corpus(TextSource(str(path))).text)}" for name, path in sorted(given.items())]


def _text_name(donor: TrainingDonor, given: Mapping[str, Path]) -> str:
    """The name of a donor's text: `all` for the file that is given for every donor."""
    return next((name for name in (donor.name, donor.corpus, FOR_ALL) if name in given), donor.corpus)


def _read(donor: TrainingDonor, given: Mapping[str, Path], name: str) -> DonorText | None:
    """The text called `name` in a donor's tokens; None if it is not known."""
    vocab = donor.shape.vocab
    if name == FOR_ALL:
        text = read_corpus(TextSource(str(given[FOR_ALL]))).text
        text = text[: len(text) - int(HELD_OUT * len(text))]  # what `compare` holds out
    else:
        known = donor_text(donor.donor.facts, given, donor.name)
        if known is None:
            return None
        text = known
    tokens = byte_tokens(text) if vocab == BYTE_VOCAB else _tokens_of(text, donor)
    if len(tokens) < LEAST_TOKENS:
        raise UserError(f"the text of {donor.name} has {len(tokens)} tokens; give at least {LEAST_TOKENS}")
    return DonorText(name, tokens, text)


def _tokens_of(text: bytes, donor: TrainingDonor) -> Tensor:
    """A text in the tokens of a donor that has a tokenizer."""
    folder = _tokenizer(donor.donor)
    if folder is None:
        raise UserError(f"{donor.name}: has no tokenizer, so that no text can be read for it; leave out --corpus")
    corpus = Corpus(whole_characters(text), {"whole": True})
    return encode_read_corpus(corpus, f"the text of {donor.name}", folder, donor.shape.vocab)


def whole_characters(text: bytes) -> bytes:
    """A text of UTF-8 without the characters that were cut where parts are held out. Another text as it is."""
    kept = text.decode(errors="ignore").encode()
    cuts = 2 + 2 * (len(text) // BLOCK)  # both sides of a joint, each at most three bytes of a character
    return kept if len(text) - len(kept) <= 3 * cuts else text


def _sampled(donor: TrainingDonor, seed: int) -> DonorText:
    tokens = sample_tokens(donor.donor, seed)
    sample = bytes(tokens.tolist()) if donor.shape.vocab == BYTE_VOCAB else None
    return DonorText(f"sampled from {donor.name}", tokens, sample, is_known=False)


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
    if donor.blueprint.metadata.positions:
        length = min(length, int(skeleton.module.config.max_position_embeddings) - 1)  # type: ignore[union-attr, arg-type]
    weights = skeleton.in_memory({name: donor.read(name, torch.float32) for name in skeleton.blueprint.names})
    skeleton.module.load_state_dict(weights, strict=False, assign=True)
    skeleton.module.tie_weights()  # type: ignore[operator]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, f"text of {donor.name}"))
        start = torch.randint(donor.blueprint.metadata.vocab, (count, 1))
        settings = GenerationConfig(do_sample=True, max_new_tokens=length, top_k=0, pad_token_id=0, eos_token_id=None)
        written = skeleton.module.eval().generate(start, generation_config=settings)  # type: ignore[operator]
    return written.flatten()
