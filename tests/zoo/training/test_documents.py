"""Corpora in other formats than plain text give the tokens of the text file with the same documents."""

from __future__ import annotations

import csv
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.support.hub_server import Repo, serve, use_hub
from zoo.checkpoints.hub import hub_session
from zoo.errors import UserError
from zoo.sandbox import shared
from zoo.training import documents
from zoo.training.corpora import encode_corpus, end_of_text
from zoo.training.documents import TextSource, binary_problem, read_corpus, split_of
from zoo.vocabulary import byte_tokenizer

DOCUMENTS = ["Once upon a time,\nthere was a café.", " 2 + 2 = 4 \r\n", '{"text": "quoted"}', "ends\n\n", "日本語"]
END = "<|end|>"


def write_json_lines(path: Path, texts: list[str], column: str = "text") -> None:
    lines = [json.dumps({"id": i, column: text, "meta": {"n": [i]}}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")


def write_json(path: Path, texts: list[str], column: str = "text") -> None:
    path.write_text(json.dumps([{"id": i, column: text} for i, text in enumerate(texts)], ensure_ascii=False))


def write_parquet(path: Path, texts: list[str], column: str = "text") -> None:
    pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path, row_group_size=2)


def write_csv(path: Path, texts: list[str], column: str = "text") -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", column], *([i, text] for i, text in enumerate(texts))])


WRITERS: dict[str, Callable[..., None]] = {
    "jsonl": write_json_lines, "json": write_json, "parquet": write_parquet, "csv": write_csv,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes, and a token that ends a text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = byte_tokenizer()
    made.add_special_tokens([END])
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": {"__type": "AddedToken", "content": END}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def tokens_of(source: Any, tokenizer: Path | None = None) -> torch.Tensor:
    return encode_corpus(source, tokenizer, 256 if tokenizer is None else 257)


@pytest.mark.parametrize("ending", WRITERS)
def test_a_data_set_gives_the_tokens_of_the_text_file(ending: str, tmp_path: Path, tokenizer: Path) -> None:
    path, column = tmp_path / f"corpus.{ending}", "text" if ending != "csv" else "body"
    WRITERS[ending](path, DOCUMENTS, column)
    source = TextSource(str(path), "train", None if column == "text" else column)
    for folder, between in ((None, "\n\n"), (tokenizer, END)):
        (tmp_path / "same.txt").write_bytes(between.join(DOCUMENTS).encode())
        expected = tokens_of(tmp_path / "same.txt", folder)
        assert torch.equal(tokens_of(source, folder), expected)
    assert int((expected == 256).sum()) == 4, "one token between two documents"
    about = read_corpus(source).about
    assert about == {
        "format": "json" if ending == "jsonl" else ending, "separator": "\n\n", "column": column,
        "documents": 5, "bytes": len("\n\n".join(DOCUMENTS).encode()), "whole": True,
    }  # fmt: skip


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "txt"])
def test_a_folder_is_read_in_the_order_of_its_names_and_by_its_splits(ending: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    parts = {"train-00000-of-00002": DOCUMENTS[:2], "train-00001-of-00002": DOCUMENTS[2:3], "my-dev": DOCUMENTS[3:]}
    for name, texts in parts.items():
        path = folder / "data" / f"{name}.{ending}"
        if ending == "txt":
            path.write_bytes("\n\n".join(texts).encode())
        else:
            WRITERS[ending](path, texts)
    (folder / "README.md").write_text("---\nconfigs: [{config_name: default, data_files: ../secret.txt}]\n---\n")
    (folder / "set.py").write_text("raise SystemExit('code of the data set runs')")
    (folder / ".hidden.txt").write_text("hidden")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    for split, texts in (("train", DOCUMENTS[:3]), ("validation", DOCUMENTS[3:]), (None, DOCUMENTS[:3])):
        assert read_corpus(TextSource(str(folder), split)).text == "\n\n".join(texts).encode()
    with pytest.raises(UserError, match=r"set: has no split 'test'; give one with --split: train, validation"):
        read_corpus(TextSource(str(folder), "test"))
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before, "nothing is written beside the corpus"


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_name_is_not_a_pattern(ending: str, tmp_path: Path) -> None:
    """`datasets` would read the other files too, or find none."""
    for number, name in enumerate(("a*", "a[1]", "a?", "a::b", "{a,b}")):
        WRITERS[ending](tmp_path / f"{name}.{ending}", [f"document {number}"])
    for number, name in enumerate(("a*", "a[1]", "a?", "a::b", "{a,b}")):
        assert read_corpus(TextSource(str(tmp_path / f"{name}.{ending}"))).text == f"document {number}".encode()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_files_without_rows_are_left_out(ending: str, tmp_path: Path) -> None:
    WRITERS[ending](tmp_path / f"1.{ending}", DOCUMENTS)
    if ending == "parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "0.parquet")
    else:
        (tmp_path / "0.jsonl").touch()
    assert read_corpus(TextSource(str(tmp_path))).text == "\n\n".join(DOCUMENTS).encode()
    assert read_corpus(TextSource(str(tmp_path / f"0.{ending}"))).text == b""


def test_a_library_that_crashes_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    shared.close()  # so that the child process has this TMPDIR
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(UserError, match=r"deep\.jsonl: makes the library that reads it crash"):
        read_corpus(TextSource(str(tmp_path / "deep.jsonl")))
    assert list((tmp_path / "temporary").iterdir()) == []


def test_splits_by_name() -> None:
    names = {
        "corpus.txt": "train", "a/b.txt": "train", "valid.jsonl": "validation", "dev/part-1.txt": "validation",
        "data/test-00000-of-00001.parquet": "test", "data/unsupervised-00001-of-00003.parquet": "unsupervised",
        "my_training_set.csv": "train", "contest.txt": "train", "test/train.txt": "train",
    }  # fmt: skip
    assert {name: split_of(name) for name in names} == names


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("body", r"corpus.jsonl: has no column 'body'; name one with --text-column: 'id', 'text', 'meta'"),
        ("id", r"corpus.jsonl: row 1: 'id' is a int, not a text; name another --text-column"),
    ],
)
def test_a_wrong_column_is_refused_with_those_that_exist(column: str, message: str, tmp_path: Path) -> None:
    write_json_lines(tmp_path / "corpus.jsonl", DOCUMENTS)
    with pytest.raises(UserError, match=message):
        read_corpus(TextSource(str(tmp_path / "corpus.jsonl"), column=column))


def test_rows_without_a_text_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    assert read_corpus(TextSource(str(tmp_path / "a.jsonl"))).text == b"a\n\nb"
    assert "1 rows without a text are left out" in caplog.text


CONTENTS: dict[str, tuple[str, bytes, str]] = {
    "zip": ("a.txt", b"PK\x03\x04\x14\x00", "is a zip archive, not text"),
    "gzip": ("a.jsonl", b"\x1f\x8b\x08\x00abc", "is a gzip archive, not text"),
    "image": ("a.txt", b"\x89PNG\r\n\x1a\n", "is an image, not text"),
    "PDF": ("a.txt", b"%PDF-1.7\n", "is a PDF document, not text"),
    "zero bytes": ("corpus", b"abc\0def", "holds zero bytes, so it is not text"),
    "late zero byte": ("corpus", b"a" * 70_000 + b"\0", "holds a zero byte at 70000, so it is not text"),
    "binary": ("a.csv", bytes(range(1, 256)), "holds binary data, not text"),
    "no Parquet": ("a.parquet", b"text", "is not Parquet, although it is named so"),
    "half a Parquet": ("a.parquet", b"PAR1 and nothing more", "a.parquet: cannot be read as parquet"),
    "no JSON lines": ("a.jsonl", b"plain text\nin a file\n", "a.jsonl: cannot be read as json"),
    "JSON of another shape": ("a.json", b'{"text": [1, 2]}', "a.json: row 1: 'text' is a list, not a text"),
    "deep JSON": ("a.jsonl", b"[" * 200_000, "a.jsonl: cannot be read as json"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_not_text_is_refused_by_its_content(name: str, tmp_path: Path) -> None:
    file, content, message = CONTENTS[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_corpus(TextSource(str(tmp_path / file)))
    assert file in str(caught.value) and "Traceback" not in str(caught.value)


def test_text_in_any_encoding_is_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for text in (
        "naïve café ".encode("latin-1"),
        "Привет".encode("koi8-r"),
        b"\x1b[1mbold\x1b[0m\f",
        b"",
        b"\xef\xbb\xbfx",
    ):
        assert binary_problem(text) is None
        (tmp_path / "a.txt").write_bytes(text)
        assert read_corpus(TextSource(str(tmp_path / "a.txt"))).text == text
    assert not caplog.text


def test_content_counts_before_the_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(tmp_path / "a.txt", DOCUMENTS)
    assert read_corpus(TextSource(str(tmp_path / "a.txt"))).text == "\n\n".join(DOCUMENTS).encode()
    write_json_lines(tmp_path / "b.txt", DOCUMENTS)
    assert read_corpus(TextSource(str(tmp_path / "b.txt"))).text == (tmp_path / "b.txt").read_bytes()
    assert "b.txt: looks like JSON lines and is read as plain text; name it .jsonl" in caplog.text


def test_other_refusals(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for source, message in (
        (TextSource(str(tmp_path / "a.txt"), split="test"), "is plain text, which has no split 'test'"),
        (TextSource(str(tmp_path / "a.txt"), column="text"), "is plain text, which has no column 'text'"),
        (TextSource(str(tmp_path / "none.txt")), "none.txt: no such corpus"),
    ):
        with pytest.raises(UserError, match=message):
            read_corpus(source)
    folder = tmp_path / "mixed"
    folder.mkdir()
    with pytest.raises(UserError, match="mixed: holds no file of text"):
        read_corpus(TextSource(str(folder)))
    (folder / "a.txt").write_text("text")
    write_parquet(folder / "b.parquet", DOCUMENTS)
    with pytest.raises(UserError, match="mixed: holds Parquet and plain text; keep files of one kind"):
        read_corpus(TextSource(str(folder)))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: is a pipe"):
        read_corpus(TextSource(str(tmp_path / "pipe")))


def test_only_a_prefix_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = "\n\n".join(DOCUMENTS).encode()
    write_json_lines(tmp_path / "a.jsonl", DOCUMENTS)
    for most in (5, 36, 37, 38, 39, len(whole) - 1, len(whole)):
        found = read_corpus(TextSource(str(tmp_path / "a.jsonl")), most=most)
        assert found.text == whole[:most] and found.about["whole"] == (most == len(whole))
        assert whole.decode().startswith(found.decode("a")), "a character that is cut in two is left out"
    with (tmp_path / "large.txt").open("wb") as file:
        file.write(b"text " * 20_000)
        file.truncate(1 << 40)  # a terabyte, of which nothing but the start is read
    found = read_corpus(TextSource(str(tmp_path / "large.txt")), most=400)
    assert found.text == b"text " * 80 and not found.about["whole"]
    assert not caplog.text
    monkeypatch.setattr(documents, "MAX_CORPUS", 400)
    read_corpus(TextSource(str(tmp_path / "large.txt")), most=400)
    assert "large.txt: only the first 0 MB of text are read" in caplog.text


def test_the_end_of_a_text(tokenizer: Path, tmp_path: Path) -> None:
    assert end_of_text(tokenizer, 257) == end_of_text(tokenizer / "tokenizer.json", 257) == END
    assert end_of_text(tokenizer, 256) is None
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert end_of_text(tmp_path, 256) is None
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert end_of_text(tmp_path, 256) is None, "transformers would add it as token 256"


def test_a_data_set_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    files = {}
    for name, texts in {"train-00000-of-00002": DOCUMENTS[:2], "train-00001-of-00002": DOCUMENTS[2:]}.items():
        write_parquet(tmp_path / "part.parquet", texts)
        files[f"data/{name}.parquet"] = (tmp_path / "part.parquet").read_bytes()
    files |= {"test.jsonl": b'{"text": "held out"}\n', "README.md": b"---\nlicense: mit\n---\n", "set.py": b"exit()"}
    several = {"en/train.txt": b"english", "de/train.txt": b"deutsch", "README.md": b""}
    with serve() as hub, hub_session(timeout=20):
        use_hub(monkeypatch, hub.url, tmp_path / "home")
        repo = hub.repos["org/set"] = Repo({n: d for n, d in files.items() if n != "test.jsonl"})
        hub.repos["org/mixed"], hub.repos["org/several"] = Repo(files), Repo(several)
        repo.branches["v1"] = repo.commit
        for address in ("org/set", "org/set@v1", f"org/set@{repo.commit}"):
            found = read_corpus(TextSource(address))
            assert found.text == "\n\n".join(DOCUMENTS).encode()
            assert found.about["revision"] == repo.commit and found.about["format"] == "parquet"
        hub.log.clear()
        assert read_corpus(TextSource("org/set"), most=20).text == DOCUMENTS[0].encode()[:20]
        assert not any("00001-of-00002" in line for line in hub.log), "the second file is not needed"
        assert read_corpus(TextSource("org/several/de")).text == b"deutsch"
        for source, message in (
            (TextSource("org/set", split="test"), "data set org/set: has no split 'test'.*: train"),
            (TextSource("org/set@v2"), "data set org/set@v2: the repository has no such revision"),
            (TextSource("org/none"), "data set org/none: no such "),
            (TextSource("org/mixed"), "data set org/mixed: holds JSON and Parquet"),
            (TextSource("org/several"), "holds several sets; add one to the address after a slash: de, en"),
        ):
            with pytest.raises(UserError, match=message):
                read_corpus(source)
    assert not [r for r in caplog.records if r.levelno > logging.WARNING]
