"""Corpora: the embedded text, and files as token tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zoo.errors import UserError
from zoo.training.corpora import encode_corpus, python_reference, reference_corpus, split_held_out
from zoo.vocabulary import byte_tokens, read_vocabulary, save_byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(path)
    return path


def test_the_reference_repeats_no_paragraph_and_is_held_out_everywhere() -> None:
    text = python_reference()
    paragraphs = text.decode().split("\n\n")
    assert len(text) > 200_000 and len(set(paragraphs)) == len(paragraphs)
    learned, held = split_held_out(text)
    assert len(learned) + len(held) == len(text)
    assert 0.1 < len(held) / len(text) < 0.13, "the last tenth of reference_corpus() is held out"
    assert reference_corpus() == learned + held
    # every held-out block is a block of the text, and none of them is among what is learned
    for start in range(0, len(held) - 4096, 4096):
        assert text.count(held[start : start + 4096]) == 1 and held[start : start + 4096] not in learned


def test_bytes_and_the_byte_tokenizer_agree(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Grüße,\r\n\n  world\n", newline="")
    plain = encode_corpus(path, None, 256)
    assert plain.dtype == torch.int64 and plain.tolist() == list(path.read_bytes())
    assert torch.equal(encode_corpus(path, folder, 256), plain)
    assert torch.equal(byte_tokens(path.read_bytes()), plain)


def test_a_real_tokenizer(shared_data: Path) -> None:
    folder = next(p for p in sorted((shared_data / "models").iterdir()) if (p / "tokenizer.json").exists())
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (shared_data / "corpora" / "tinystories_sample.txt").read_text()[:2000]
    path = shared_data / "corpora" / "tinystories_sample.txt"
    tokens = encode_corpus(path, folder, len(tokenizer))
    start = tokenizer(text, add_special_tokens=False)["input_ids"][:50]
    assert tokens[:50].tolist() == start


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"caf\xe9")
    assert encode_corpus(path, None, 256).tolist() == [99, 97, 102, 233], "bytes need no encoding"
    with pytest.raises(UserError, match="is not UTF-8 at byte 3"):
        encode_corpus(path, folder, 256)
    with pytest.raises(UserError, match="--tokenizer"):
        encode_corpus(path, None, 512)
    with pytest.raises(UserError, match="no such corpus"):
        encode_corpus(tmp_path / "none.txt", None, 256)
    path.write_text("zzz")
    with pytest.raises(UserError, match=r"token id 122 .* has 100 tokens"):
        encode_corpus(path, folder, 100)
    with pytest.raises(UserError, match="the tokenizer cannot be used"):
        encode_corpus(path, tmp_path, 256)
    save_byte_tokenizer(tmp_path)
    content = (tmp_path / "tokenizer.json").read_text()
    for damaged in (content[: len(content) // 2], '{"model": {"type": "BPE"}}', ""):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(UserError, match="the tokenizer cannot be used"):
            encode_corpus(path, tmp_path, 256)
        with pytest.raises(UserError, match=r"is not a tokenizer|not valid JSON"):
            read_vocabulary(tmp_path)
