"""Byte tokenizers, vocabularies, and tokenizers from outside."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.errors import UserError
from zoo.vocabulary import encode_text, is_byte_tokenizer, read_vocabulary, save_byte_tokenizer


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


MODELS: dict[str, dict[str, Any]] = {
    "BPE": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    "WordPiece": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"[UNK]": 0, "a": 1, "##b": 2},
        "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
    "WordLevel": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"[UNK]": 0, "ab": 1}},
    "Unigram": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]]},
}  # fmt: skip


def write_tokenizer(folder: Path, **parts: Any) -> Path:
    """A tokenizer.json of these parts (model, normalizer, …) and, for transformers, its tokenizer_config.json."""
    content = {"version": "1.0", "added_tokens": [], "model": MODELS["BPE"], **parts}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("kind", MODELS)
def test_a_vocabulary_read_from_json_is_that_of_the_tokenizers_library(kind: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    new = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    path = write_tokenizer(
        tmp_path, model=MODELS[kind], added_tokens=[{"id": len(MODELS[kind]["vocab"]), "content": "<s>", **new}]
    )
    expected = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    assert len(expected) == len(MODELS[kind]["vocab"]) + 1
    assert read_vocabulary(path) == read_vocabulary(tmp_path) == expected


def test_the_real_vocabularies(shared_data: Path) -> None:
    from tokenizers import Tokenizer

    paths = sorted((shared_data / "models").glob("*/tokenizer.json"))
    assert len(paths) > 3
    for path in paths:
        assert read_vocabulary(path) == Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)


@pytest.mark.parametrize(
    "parts",
    [
        {"model": None},
        {"model": []},
        {"model": {"vocab": None}},
        {"model": {"vocab": {"a": "0"}}},
        {"model": {"vocab": {"a": True}}},
        {"model": {"vocab": {"a": -1}}},
        {"model": {"vocab": {"a": 2**40}}},
        {"model": {"vocab": [["a"], ["b", 0.0]]}},
        {"model": {"vocab": [[1, 0.0]]}},
        {"model": {"vocab": ["a"]}},
        {"added_tokens": {"a": 1}},
        {"added_tokens": [["a", 1]]},
        {"added_tokens": [{"content": "a"}]},
        {"added_tokens": [{"content": None, "id": 1}]},
        {"added_tokens": [{"content": "a", "id": 1.5}]},
    ],
)
def test_a_damaged_vocabulary_is_refused_in_one_line(parts: dict[str, Any], tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path, **parts)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        read_vocabulary(path)


def test_only_our_own_byte_tokenizer_is_trusted(folder: Path, tmp_path: Path) -> None:
    text = "Grüße,\r\n\n  world 🙂\n"
    assert is_byte_tokenizer(folder) and encode_text(text, folder).tolist() == list(text.encode())
    assert encode_text("", folder).shape == (0,)
    for name, change in (
        ("tokenizer.json", lambda content: content["model"]["vocab"].update(a=98, b=97)),
        ("tokenizer_config.json", lambda content: content.update(bos_token="a")),
    ):
        save_byte_tokenizer(tmp_path)
        content = json.loads((tmp_path / name).read_text())
        change(content)
        (tmp_path / name).write_text(json.dumps(content))
        assert not is_byte_tokenizer(tmp_path)
    save_byte_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"zz": 256}')
    assert not is_byte_tokenizer(tmp_path)


def test_a_tokenizer_from_outside_encodes_in_a_child_as_in_this_process(folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    path = write_tokenizer(tmp_path, normalizer={"type": "Lowercase"})
    for text in ("abAB", "", "ba" * 1000):
        tokens = encode_text(text, path)
        assert tokens.dtype == torch.int64
        assert tokens.tolist() == Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids


def replaced_by(count: int) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * count}


BOMBS: dict[str, dict[str, Any]] = {
    "a normaliser that doubles": {"normalizer": {"type": "Sequence", "normalizers": [replaced_by(2)] * 60}},
    "a normaliser that prepends": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "a" * 10_000}, replaced_by(1000), replaced_by(1000)],
        }
    },
    "a pattern that backtracks": {
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False,
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_tokenizer_that_is_a_bomb_ends_in_one_line_within_seconds(
    bomb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.vocabulary.TOKENIZER_SECONDS", 0.5)
    path = write_tokenizer(tmp_path, **BOMBS[bomb])
    before = time.process_time()
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizer cannot be used") as caught:
        encode_text("a" * 40 + "b", path)
    assert time.process_time() - before < 1 and len(str(caught.value)) <= 400


def test_a_tokenizer_of_pipes_or_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    import os

    path = write_tokenizer(tmp_path)
    with (tmp_path / "merges.txt").open("wb") as file:
        file.truncate(10**10)
    with pytest.raises(UserError, match="its files have 1000000"):
        encode_text("a", tmp_path)
    (tmp_path / "merges.txt").unlink()
    os.mkfifo(tmp_path / "merges.txt")
    with pytest.raises(UserError, match="is a pipe"):
        encode_text("a", tmp_path)
    assert encode_text("ab", path).tolist() == [2]
