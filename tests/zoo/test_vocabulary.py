"""Byte tokenizers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from zoo.vocabulary import save_byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(path)
    return path


def test_tokenizer_is_a_fast_one_whose_ids_are_bytes(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast and len(tokenizer) == 256
    rng = random.Random(0)
    every = "".join(chr(c) for c in range(0x2000))  # all bytes that UTF-8 has below three-byte sequences, and some
    wild = "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(2000))
    for text in (every, wild, "", " a  b\n\tc ", "naïve — 你好 🙂", "<s>[INST]</s>"):
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode()), "nothing is added, split or normalised"
        assert tokenizer.decode(ids) == text


def test_every_byte_has_a_token_of_its_own(folder: Path) -> None:
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    assert sorted(vocabulary.values()) == list(range(256)) and vocabulary["a"] == ord("a")
