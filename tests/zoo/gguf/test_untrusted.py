"""Truncated, lying and hostile GGUF files: one line each, at once, and nothing is written."""

from __future__ import annotations

import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.support.gguf_files import MODELS, Q, TinyModel, write_gguf
from zoo.add import add
from zoo.errors import UserError
from zoo.gguf.header import read_gguf_header

LLAMA = MODELS["llama"]
Edit = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "a.gguf").read_bytes()


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A file that is read whole, so that no test below counts the imports of the libraries."""
    folder = tmp_path_factory.mktemp("imports")
    add([str(write_gguf(folder / "a.gguf"))], folder / "zoo", quiet=True)


def refused(file: Path) -> str:
    """The line that `zoo add` refuses a file with. It names the file, comes soon, and leaves nothing behind."""
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        add([str(file)], file.parent / "out", quiet=True)
    line = str(caught.value)
    assert time.process_time() - start < 3
    assert "\n" not in line and len(line) <= 400 and file.name in line
    assert not (file.parent / "out").exists() or not list((file.parent / "out" / "models").glob("[!.]*"))
    return line


def number(layout: str, value: Any) -> bytes:
    return struct.pack(f"<{layout}", value)


def text(value: str) -> bytes:
    return number("Q", len(value.encode())) + value.encode()


def small_file(keys: bytes, tensors: bytes, counts: tuple[int, int], data: bytes = b"") -> bytes:
    """A GGUF file from its parts, `counts` of tensors and keys."""
    header = b"GGUF" + number("I", 3) + struct.pack("<QQ", *counts) + keys + tensors
    return header + b"\0" * (-len(header) % 32) + data


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + number("I", len(shape)) + sizes + number("I", kind) + number("Q", offset)


TEXT_KEY = text("general.architecture") + number("I", 8) + text("llama")
LIST = number("I", 9)
HEADERS = {
    "empty": (b"", "ends inside the first four bytes"),
    "other-format": (b"PK\x03\x04" + b"\0" * 100, "does not start with GGUF"),
    "version-1": (b"GGUF" + number("I", 1) + b"\0" * 16, "is of GGUF version 1; versions 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + b"\0" * 16, "has the byte order of big-endian machines"),
    "many-tensors": (small_file(b"", b"", (2**63, 0)), "states 9223372036854775808 tensors; at most 200000"),
    "many-keys": (small_file(b"", b"", (0, 2**40)), "states 1099511627776 keys; at most 10000"),
    "long-key": (small_file(number("Q", 2**40), b"", (0, 1)), "the name of key 0 has 1099511627776 bytes"),
    "long-text": (small_file(text("k") + number("I", 8) + number("Q", 2**50), b"", (0, 1)), "more than the 256000000"),
    "not-utf-8": (small_file(text("k") + number("I", 8) + number("Q", 2) + b"\xff\xfe", b"", (0, 1)), "is not UTF-8"),
    "value-type": (small_file(text("k") + number("I", 99), b"", (0, 1)), "is of the type 99, which GGUF does not"),
    "long-list": (
        small_file(text("k") + LIST + number("I", 0) + number("Q", 2**60), b"", (0, 1)),
        "the value of 'k' makes more than 4000000 values in lists",
    ),
    "list-of-lists": (
        small_file(text("k") + LIST + number("I", 9) + number("Q", 3) + b"\0" * 99, b"", (0, 1)),
        "is a list of values of the type 9, which is not read",
    ),
    "key-twice": (small_file(TEXT_KEY * 2, b"", (0, 2)), "has the key 'general.architecture' twice"),
    "alignment": (
        small_file(text("general.alignment") + number("I", 4) + number("I", 33), b"", (0, 1)),
        "general.alignment is 33, which is not a power of two",
    ),
    "axes": (small_file(b"", tensor("a", (2,) * 9), (1, 0)), "tensor 'a' has 9 axes; GGUF allows 1 to 4"),
    "no-values": (small_file(b"", tensor("a", (4, 0)), (1, 0)), "tensor 'a' has the absurd shape [0, 4]"),
    "huge-shape": (small_file(b"", tensor("a", (2**40, 2**40)), (1, 0)), "tensor 'a' has the absurd shape"),
    "no-room": (small_file(b"", tensor("a", (2**30,)), (1, 0)), "'a' ends at byte 4294967360 of a file of 64 bytes"),
    "unknown-type": (small_file(b"", tensor("a", (32,), 77), (1, 0)), "is quantised as type 77, which is not known"),
    "unread-type": (small_file(b"", tensor("a", (256,), 15), (1, 0)), "'a' is quantised as Q8_K, which is not read"),
    "part-of-block": (small_file(b"", tensor("a", (33,), 8), (1, 0)), "rows of 33 values, which Q8_0 stores in blocks"),
    "tensor-twice": (small_file(b"", tensor("a", (8,)) * 2, (2, 0), b"\0" * 32), "lists the tensor 'a' twice"),
    "not-aligned": (small_file(b"", tensor("a", (8,), 0, 4), (1, 0), b"\0" * 64), "lies at byte 68, not aligned"),
    "overlap": (
        small_file(b"", tensor("a", (16,)) + tensor("b", (8,), 0, 32), (2, 0), b"\0" * 64),
        "tensor 'b' overlaps the one before it",
    ),
    "hole": (
        small_file(b"", tensor("a", (8,)) + tensor("b", (8,), 0, 96), (2, 0), b"\0" * 128),
        "tensor 'b' leaves a hole before it",
    ),
    "after-the-end": (
        small_file(b"", tensor("a", (8,)), (1, 0), b"\0" * 500),
        "468 bytes after the last tensor belong to none",
    ),
    "no-architecture": (small_file(b"", tensor("a", (8,)), (1, 0), b"\0" * 32), "has the architecture ''"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_header_is_named(tmp_path: Path, name: str) -> None:
    data, words = HEADERS[name]
    file = tmp_path / "a.gguf"
    file.write_bytes(data)
    assert words in refused(file)


def test_the_header_is_the_one_that_the_library_reads(tmp_path: Path) -> None:
    for name in MODELS:
        file = write_gguf(tmp_path / f"{name}.gguf", name)
        ours, theirs = read_gguf_header(file), gguf.GGUFReader(file)
        known = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
        assert ours.metadata == known
        assert {
            t.name: (t.type_name, t.shape, t.offset, t.nbytes) for t in ours.tensors.values()
        } == {
            t.name: (t.tensor_type.name, tuple(t.shape[::-1].tolist()), t.data_offset, t.n_bytes)
            for t in theirs.tensors
        }  # fmt: skip


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, valid: bytes) -> None:
    file = tmp_path / "a.gguf"
    ends = [*range(0, 400, 37), *range(400, 12_000, 911), *range(12_000, len(valid), len(valid) // 12), len(valid) - 40]
    for end in ends:
        file.write_bytes(valid[:end])
        line = refused(file)
        assert "ends inside" in line or "ends at byte" in line, (end, line)


def test_a_lying_size_takes_no_memory(tmp_path: Path, valid: bytes) -> None:
    """Every eight bytes of the start of the header in turn say an enormous number."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file = tmp_path / "a.gguf"
    for at in range(8, 600, 7):
        for value in (2**64 - 1, 2**31):
            file.write_bytes(valid[:at] + number("Q", value) + valid[at + 8 :])
            try:
                read_gguf_header(file)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) <= 400
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def changed(numbers: dict[str, Any] | None = None, shapes: dict[str, Any] | None = None) -> TinyModel:
    """The tiny Llama with other numbers and shapes; None removes one."""
    wanted = {k: v for k, v in {**LLAMA.numbers, **(numbers or {})}.items() if v is not None}
    kept = {k: v for k, v in {**LLAMA.shapes, **(shapes or {})}.items() if v is not None}
    return TinyModel("llama", wanted, kept, "llama")


MODELS_REFUSED = {
    "layers": (changed({"block_count": 2**31}), "num_hidden_layers"),
    "fewer-layers": (changed({"block_count": 1}), "'blk.1.attn_norm.weight' has no place in a model"),
    "no-heads": (changed({"attention.head_count": 0}), "states 0 attention heads"),
    "no-width": (changed({"embedding_length": None}), "has no llama.embedding_length"),
    "text-for-number": (changed({"block_count": "2"}), "llama.block_count is '2'; it must be a whole number"),
    "heads-differ": (changed({"attention.head_count_kv": [2, 1]}), "head_count_kv differs between layers"),
    "width": (changed({"embedding_length": 128}), "tensor 'token_embd.weight' has the shape [320, 256], its metadata"),
    "missing": (changed(shapes={"blk.1.ffn_up.weight": None}), "lacks the tensor for 'model.layers.1.mlp.up_proj"),
    "experts": (changed(shapes={"blk.0.ffn_gate_exps.weight": (256, 256)}), "ffn_gate_exps.weight' has no place"),
    "other-name": (changed(shapes={"blk.00.attn_q.bias": (256,)}), "'blk.00.attn_q.bias' has no place in a model"),
    "no-embedding": (changed(shapes={"token_embd.weight": None}), "has no tensor 'token_embd.weight'"),
    "value-size": (changed({"attention.value_length": 32}), "heads of other sizes for keys and values"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS_REFUSED)
def test_metadata_and_tensors_that_disagree_are_refused(tmp_path: Path, name: str) -> None:
    model, words = MODELS_REFUSED[name]
    assert words in refused(write_gguf(tmp_path / "a.gguf", model))


def test_an_architecture_that_is_not_read_names_those_that_are(tmp_path: Path) -> None:
    line = refused(write_gguf(tmp_path / "a.gguf", TinyModel("mamba", {}, {"a.weight": (4, 256)})))
    assert (
        "has the architecture 'mamba'; read from GGUF are Llama (and Mistral), Qwen2, Qwen3, Gemma 2, Gemma 3," in line
    )


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("ggml.scores", [0.0] * 3, "has 320 tokens and 3 scores"),
        ("ggml.token_type", [1] * 3, "has 320 tokens and 3 token_type"),
        ("ggml.eos_token_id", 320, "eos token 320 is outside its 320 tokens"),
        ("ggml.merges", ["t h e", "x"], "its tokenizer: "),
        ("ggml.scores", None, "has a vocabulary without merges or scores"),
        ("ggml.tokens", None, "has no tokenizer.ggml.tokens"),
        ("ggml.tokens", [1, 2], "tokenizer.ggml.tokens is [1, 2]; it must be a list of values that are each text"),
        ("chat_template", 7, "tokenizer.chat_template is 7; it must be text"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(tmp_path: Path, key: str, value: Any, words: str) -> None:
    assert words in refused(write_gguf(tmp_path / "a.gguf", metadata={f"tokenizer.{key}": value}))


def test_values_that_are_no_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.support.gguf_files as files

    def add_nan(writer: Any, name: str, shape: tuple[int, ...], *rest: Any) -> None:
        values = np.full(shape, np.nan if name == "blk.1.attn_norm.weight" else 0.5, np.float32)
        writer.add_tensor(name, values, raw_dtype=Q.F32)

    monkeypatch.setattr(files, "add_tensor", add_nan)
    line = refused(write_gguf(tmp_path / "a.gguf"))
    assert "tensor 'model.layers.1.input_layernorm.weight' holds NaN or infinity" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("missing.gguf", "missing.gguf: no such file, and not a file of a hub repository (org/name[@revision]:FILE)"),
        ("org/name@../x:a.gguf", "no such file, and not a file of a hub repository"),
        ("org/name:../../x.gguf", "does not name a file inside a repository"),
        ("m-00004-of-00003.gguf", "is part 4 of 3, which cannot be"),
    ],
)
def test_wrong_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    if given.startswith("m-"):
        (tmp_path / given).write_bytes(b"GGUF")
    with pytest.raises(UserError) as caught:
        add([given], tmp_path / "out", quiet=True)
    assert words in str(caught.value)


def test_a_revision_belongs_to_a_hub(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf")
    with pytest.raises(UserError, match="is a file, which has no revision 'main'; leave --revision out"):
        add([str(file)], tmp_path / "out", revision="main", quiet=True)


def test_a_full_disk_is_noticed_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    file = write_gguf(tmp_path / "a.gguf")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"\d+ bytes are needed and 1000 are free"):
        add([str(file)], tmp_path / "out", quiet=True)
