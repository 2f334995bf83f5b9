"""The pairs of a donor and another tokenizer: targets, texts, and the tokenizers that are trained for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.checkpoints.files import read_json
from zoo.limits import MAX_CONFIG

STORIES, WIKIPEDIA = "tinystories_sample.txt", "wikitext2_valid.txt"
HELD_OUT = 0.1  # share of a text, at its end, that nothing is trained on
BPE_SIZES = (1000, 4000)
REAL = {"SmolLM2 135M": "smollm2", "Gemma 3 270M": "gemma3"}  # name -> folder
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Pair:
    """A donor, and a target of its shape with another tokenizer."""

    donor_name: str
    tokenizer_name: str
    donor: Path
    tokenizer: Path  # a folder
    text: Path
    trains: bool  # whether the target is trained, or only its loss before training is measured

    @property
    def name(self) -> str:
        return f"{self.donor_name} to {self.tokenizer_name}"

    def target(self) -> dict[str, Any]:
        """The donor's config with the other tokenizer's number of tokens and its special tokens."""
        config = read_json(self.donor / "config.json", MAX_CONFIG)
        vocab = read_json(self.tokenizer / "config.json", MAX_CONFIG)["vocab_size"]
        none = {f"{role}_token_id": None for role in ("bos", "eos", "pad")}
        return {**config, **none, "vocab_size": vocab}

    @property
    def auxiliary(self) -> Path | None:
        """A trained model with the target's tokenizer, whose embedding says which tokens are alike."""
        return None if self.trains else self.tokenizer


def find_pairs(data: Path, models: Path | None, work: Path) -> list[Pair]:
    """All pairs. data: a folder of models and corpora; models: a folder of smollm2 and gemma3, or None; work: for the
    trained tokenizers."""
    stories = data / "corpora" / STORIES
    donor = data / "models" / "stories260K"
    pairs = [
        Pair("stories260K", f"BPE of {size:,}", donor, train_bpe(stories, size, work), stories, True)
        for size in BPE_SIZES
    ]
    if models is not None:
        text = data / "corpora" / WIKIPEDIA
        (first, a), (second, b) = ((name, models / folder) for name, folder in REAL.items())
        pairs += [Pair(first, second, a, b, text, False), Pair(second, first, b, a, text, False)]
    return pairs


def split_text(text: Path) -> tuple[bytes, bytes]:
    """(training text, held-out text)."""
    data = text.read_bytes()
    cut = data.rfind(b"\n", 0, int(len(data) * (1 - HELD_OUT))) + 1
    return data[:cut], data[cut:]


def train_bpe(text: Path, size: int, work: Path) -> Path:
    """The folder of a byte-level BPE of `size` tokens, trained on the training text, as the tokenizers library does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = work / f"bpe-{size}"
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(split_text(text)[0].decode().splitlines(keepends=True), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps({"vocab_size": size}) + "\n")
    return folder
