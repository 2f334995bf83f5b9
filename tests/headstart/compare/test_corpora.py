"""Comparisons read corpora of several formats, and give methods the beginning of the training text only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from headstart.compare.inputs import read_inputs, write_calibration_text
from headstart.config import CompareConfig
from tests.headstart.compare.test_compare import TARGET
from zoo.errors import UserError


def test_json_lines_are_compared_as_the_text_with_the_same_documents(tmp_path: Path) -> None:
    documents = [f"Document {i} of the corpus.\n" * (i % 5 + 1) for i in range(60)]
    (tmp_path / "corpus.txt").write_bytes("\n\n".join(documents).encode())
    rows = [json.dumps({"id": i, "body": text}) for i, text in enumerate(documents)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows))
    plain = CompareConfig(
        target=TARGET, methods=("default",), corpus=tmp_path / "corpus.txt", out=tmp_path / "out", device="cpu"
    )
    lines = replace(plain, corpus=str(tmp_path / "corpus.jsonl"), split="train", text_column="body")
    assert "--split train --text-column body" in lines.to_command()
    expected, found = read_inputs(plain), read_inputs(lines)
    assert found.settings.fingerprint["tokens"] == expected.settings.fingerprint["tokens"]
    assert found.corpus.text == expected.corpus.text == (tmp_path / "corpus.txt").read_bytes()
    assert found.corpus.about["documents"] == 60 and found.corpus.about["column"] == "body"
    with pytest.raises(UserError, match="has no column 'text'; name one with --text-column: 'id', 'body'"):
        read_inputs(replace(lines, text_column=None))
    with pytest.raises(UserError, match=r"corpus\.txt: is plain text, which has no split 'test'; leave --split out"):
        read_inputs(replace(plain, split="test"))


def test_methods_get_the_first_100_kb_and_no_held_out_text(tmp_path: Path) -> None:
    long, short = b"a" * 1_000_000, "ä".encode() * 501
    assert write_calibration_text(long, tmp_path).read_bytes() == long[:100_000]
    assert write_calibration_text(short, tmp_path).read_bytes() == short[:800]  # 801 bytes would cut a character
