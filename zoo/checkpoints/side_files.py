"""The files of a checkpoint besides its weights: the config, and what belongs to its tokenizer."""

from __future__ import annotations

from collections.abc import Collection

# Each of these alone, or with the next group, is a tokenizer. The classes of transformers look for them by these names.
SENTENCEPIECE_FILES = (
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "sentencepiece.model", "source.spm",
)  # fmt: skip
VOCABULARY_FILES = ("tokenizer.json", *SENTENCEPIECE_FILES, "vocab.json", "vocab.txt", "tekken.json")
SLOW_TOKENIZER_FILES = (*VOCABULARY_FILES[1:], "target.spm", "target_vocab.json", "merges.txt", "bpe.codes")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    *SLOW_TOKENIZER_FILES,
)  # fmt: skip
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of more templates, NAME.jinja
ADDED_LATER = tuple(name for name in ("chat_template.jinja", *SLOW_TOKENIZER_FILES) if name != "tokenizer.model")


def side_files(names: Collection[str]) -> list[str]:
    """Those of the names of a folder's files that belong to its checkpoint, without its weights.

    A tokenizer.json makes the files of the same tokenizer in older formats needless. facts.json is about the training:
    {"loss", "tokens", "seed"}.
    """
    wanted = ("config.json", "generation_config.json", *TOKENIZER_FILES, "facts.json")
    needless = SLOW_TOKENIZER_FILES if "tokenizer.json" in names else ()
    return [name for name in wanted if name in names and name not in needless]


def vocabulary_file(names: Collection[str]) -> str | None:
    """The name of the file that holds a tokenizer's vocabulary, None where there is none."""
    return next((name for name in VOCABULARY_FILES if name in names), None)


def names_in_earlier_hash(names: Collection[str]) -> list[str]:
    """The files that a checkpoint's content hash covered before chat templates and slow tokenizers were among them."""
    return [name for name in names if name not in ADDED_LATER]
