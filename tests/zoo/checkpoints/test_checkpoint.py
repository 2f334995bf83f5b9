"""Checkpoints from strangers: headers that lie, indexes that lead away, and what is read of the honest ones."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zoo.checkpoints import checkpoint as checkpoint_module
from zoo.checkpoints import headers
from zoo.checkpoints.checkpoint import Checkpoint, is_finite
from zoo.checkpoints.headers import DTYPES, INDEX, read_header, read_index
from zoo.errors import UserError
from zoo.limits import MAX_NAMES_COMPARED

Make = Callable[..., Path]


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def f32(begin: int, end: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": f32(0, 8, 2)}, 4, "ends at byte 8"),
        ({"a": f32(0, 2**62, 2**60)}, 4, "ends at byte"),
        ({"a": f32(0, 8, 2), "b": f32(4, 12, 2)}, 12, "overlaps"),
        ({"a": f32(0, 8, 2), "b": f32(0, 8, 2)}, 8, "overlaps"),
        ({"a": f32(0, 4, 1), "b": f32(8, 12, 1)}, 12, "hole"),
        ({"a": f32(4, 8, 1)}, 8, "hole"),
        ({"a": f32(0, 4, 1)}, 9, "belong to none"),
        ({"a": f32(0, 8, 3)}, 8, "needs 12 bytes"),
        ({"a": f32(8, 0, 2)}, 8, "data_offsets"),
        ({"a": f32(-8, 0, 2)}, 8, "data_offsets"),
        ({"a": f32(0, 8, -2)}, 8, "shape"),
        ({"a": f32(0, 8, -1, -2)}, 8, "shape"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, 8, "shape"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4, "shape"),
        ({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, 8, "shape"),
        ({"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}, 8, "dtype"),
        ({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, 8, "dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "no dtype, shape and data_offsets"),
        ({"a": f32(0, 0, 0, 2**62, 2**62)}, 0, "absurd"),
        ({"a": 7}, 8, "no dtype"),
        ([1], 0, "not a JSON object"),
        (b"{", 0, "not valid JSON"),
        (b"\xff\xfe", 0, "not valid JSON"),
        (b"[" * 100_000, 0, "not valid JSON"),
        (b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":7}', 4, "comes twice"),
        (b'{"a":{"dtype":"F32","shape":[9' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', 4, "not valid JSON"),
    ],
)
def test_an_inconsistent_header_is_refused(tmp_path: Path, header: object, data: int, words: str) -> None:
    path = raw(tmp_path / "x.safetensors", header, bytes(data))
    with pytest.raises(UserError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"])
def test_a_valid_dtype_that_is_not_read_is_not_called_damaged(tmp_path: Path, dtype: str) -> None:
    path = raw(tmp_path / "x.safetensors", {"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, 8]}}, bytes(8))
    with pytest.raises(
        UserError, match=f"'a' has the dtype {dtype}, which is not supported; give a checkpoint in float32"
    ):
        read_header(path)


def test_headers_are_bounded_before_they_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real bound of 200,000 tensors, each would take gigabytes or minutes when it is parsed."""
    monkeypatch.setattr(headers, "MAX_TENSORS", 1000)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    bombs = {
        "lists": b"[" + b"[]," * 3500 + b"[]]",
        "objects": b"[" + b"{}," * 2500 + b"{}]",
        "keys": b"{" + b",".join(b'"%d":0' % i for i in range(5001)) + b"}",
        "tensors": json.dumps({str(i): empty for i in range(2001)}, separators=(",", ":")).encode(),
    }
    monkeypatch.setattr(json, "loads", lambda *args, **kwargs: pytest.fail("was parsed"))
    for name, content in bombs.items():
        path = raw(tmp_path / f"{name}.safetensors", content)
        with pytest.raises(UserError, match="lists more than 1000 tensors, which is too many"):
            read_header(path)
    assert headers.MAX_HEADER == 40_000_000


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": f32(0, 4, *[1] * 100_000)}, r"'a' has a shape of 100000 axes; at most 64"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0] * 100_000}}, "a list of 100000 elements"),
        ({"a": {"dtype": "x" * 100_000, "shape": [1], "data_offsets": [0, 4]}}, "dtype 'xxx.*…, which is none of"),
        ({"a" * 100_000: f32(0, 4, 1)}, "'aaa.*… has a name of 100000 characters"),
        ({str(i): f32(0, 0, 0) for i in range(1001)}, "lists 1001 tensors; at most 1000"),
    ],
    ids=["axes", "offsets", "dtype", "name", "tensors"],
)
def test_what_is_too_large_is_counted_and_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: object, words: str
) -> None:
    monkeypatch.setattr(headers, "MAX_TENSORS", 1000)
    path = raw(tmp_path / "x.safetensors", header, bytes(4))
    with pytest.raises(UserError, match=words) as caught:
        read_header(path)
    assert len(str(caught.value)) <= 400 and "\n" not in str(caught.value)


def test_an_index_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "MAX_TENSORS", 1000)
    monkeypatch.setattr(headers, "MAX_SHARDS", 100)
    for count, files, words in ((1001, 7, "lists 1001 tensors; at most"), (101, 101, "lists 101 files; at most 100")):
        weight_map = {f"t{i}": f"{i % files}.safetensors" for i in range(count)}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=words):
            read_index(tmp_path / INDEX)


def test_the_tensors_of_all_files_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of one tensor per file can name files of a hundred thousand, or one file by a thousand links."""
    save_file({f"t{i}": torch.zeros(1) for i in range(30)}, tmp_path / "0.safetensors")
    for i in range(1, 4):
        (tmp_path / f"{i}.safetensors").symlink_to("0.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(4)}}))
    assert sorted(Checkpoint.open(tmp_path).entries) == ["t0", "t1", "t2", "t3"]
    monkeypatch.setattr("zoo.checkpoints.checkpoint.MAX_TENSORS", 100)
    with pytest.raises(UserError, match="its files list more than 100 tensors"):
        Checkpoint.open(tmp_path)


def test_an_unknown_tensor_among_many_is_not_compared_with_all(tmp_path: Path) -> None:
    """Comparing a name with a hundred thousand others takes minutes."""
    (tmp_path / "config.json").write_text("{}")
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(MAX_NAMES_COMPARED + 1)]
    for count, words in (
        (20, "did you mean 'model.layers.0.mlp.down_proj.weight'"),
        (len(names), "known: model.*more"),
    ):
        raw(tmp_path / "model.safetensors", {name: f32(0, 0, 0) for name in names[:count]})
        with pytest.raises(UserError, match=words):
            Checkpoint.open(tmp_path).read("model.layers.0.mlp.down_proj.weights")


@pytest.mark.parametrize("content", [b"", b"\0\0\0", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 3) + b"{}"])
def test_a_header_of_absurd_length_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors"):
        read_header(path)


def test_a_header_is_not_read_beyond_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as f:  # sparse: 200 MB that say that they are a header
        f.write(struct.pack("<Q", 199_000_000))
        f.truncate(200_000_000)
    with pytest.raises(UserError, match="states a header of 199000000 bytes"):
        read_header(path)


def test_no_damage_gets_past_us_that_the_library_refuses(tmp_path: Path) -> None:
    """Random damage to a header: never an error of another kind than UserError, and whatever we accept, the reference
    implementation accepts too, with the same names, shapes and bytes."""
    honest = tmp_path / "honest.safetensors"
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(2, 2).bfloat16(), "d": torch.tensor(1.5)}
    save_file(tensors, honest)
    content = honest.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    accepted = 0
    for _ in range(1500):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            damaged[rng.randrange(end)] = rng.choice((rng.randrange(256), *b'0123456789,:"[]{}'))
        path = tmp_path / "damaged.safetensors"
        path.write_bytes(damaged[: rng.choice((len(damaged), len(damaged), rng.randrange(len(damaged))))])
        try:
            entries = read_header(path)
        except UserError:
            continue
        accepted += 1
        with safe_open(path, "pt") as f:
            assert set(f.keys()) == set(entries)
            for name, entry in entries.items():
                assert tuple(f.get_slice(name).get_shape()) == entry.shape
                assert f.get_tensor(name).dtype == entry.dtype
    assert 0 < accepted < 1500


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_is_read_as_the_library_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensors = {"a": torch.ones(3, 5).to(dtype), "scalar": torch.ones(()).to(dtype), "none": torch.ones(0, 4).to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        ours = checkpoint.read(name)
        assert ours.dtype == tensor.dtype and ours.shape == tensor.shape
        assert torch.equal(ours.double(), tensor.double())


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b.safetensors", "..", "", 7]
)
def test_an_index_stays_in_its_folder(tmp_path: Path, file: object) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError, match="only files in its own folder"):
        read_index(tmp_path / INDEX)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 7}', "{\0}", '{"a": 1, "a": 2}']
)
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        read_index(tmp_path / INDEX)


def test_an_index_that_names_a_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    with pytest.raises(UserError, match="convert it to safetensors"):
        read_index(tmp_path / INDEX)


def test_links_stay_in_their_folder_but_the_hubs_cache_may_link_its_blobs(tmp_path: Path, tiny_llama: Make) -> None:
    source = tiny_llama(tmp_path / "source")
    repo = tmp_path / "models--org--name"
    snapshot, local = repo / "snapshots" / "abc", tmp_path / "local"
    for folder in (snapshot, local, repo / "blobs"):
        folder.mkdir(parents=True)
    for i, path in enumerate(source.iterdir()):
        path.rename(repo / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
        (local / path.name).symlink_to(repo / "blobs" / str(i))
    assert len(Checkpoint.open(snapshot).entries) == 20
    with pytest.raises(UserError, match="leads out of its folder"):
        Checkpoint.open(local)
    (snapshot / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="leads out of its folder"):
        Checkpoint.open(snapshot)


def test_shards_are_read_as_one(tmp_path: Path, tiny_llama: Make) -> None:
    whole = Checkpoint.open(tiny_llama(tmp_path / "whole"))
    parts = Checkpoint.open(tiny_llama(tmp_path / "parts", max_shard_size="40KB"))
    assert len({e.file for e in parts.entries.values()}) > 2
    assert set(whole.names) == set(parts.names)
    assert all(torch.equal(whole.read(n), parts.read(n)) for n in whole.names)
    assert whole.parameters == parts.parameters


def test_an_index_and_its_shards_must_agree(tmp_path: Path, tiny_llama: Make) -> None:
    folder = tiny_llama(tmp_path / "a", max_shard_size="40KB")
    index = json.loads((folder / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    other = next(f for f in index["weight_map"].values() if f != index["weight_map"][name])
    (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {name: other}}))
    with pytest.raises(UserError, match=r"lacks .*; download both again"):
        Checkpoint.open(folder)
    (folder / INDEX).write_text(json.dumps(index))
    (folder / other).unlink()
    with pytest.raises(UserError, match=other):
        Checkpoint.open(folder)


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(UserError, match="convert it to safetensors"):
        Checkpoint.open(tmp_path)


def test_a_folder_without_config_says_what_to_give(tmp_path: Path, tiny_llama: Make) -> None:
    with pytest.raises(UserError, match="no such folder"):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no config\.json"):
        Checkpoint.open(tmp_path)
    tiny_llama(tmp_path / "inner")
    with pytest.raises(UserError, match=str(tmp_path / "inner")):
        Checkpoint.open(tmp_path)
    (tmp_path / "inner" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors file"):
        Checkpoint.open(tmp_path / "inner")


@pytest.mark.parametrize("text", ["", "[]", "{", "7", '{"a": 1, "a": 2}'])
def test_a_broken_config_is_refused(tmp_path: Path, tiny_llama: Make, text: str) -> None:
    folder = tiny_llama(tmp_path / "a")
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        Checkpoint.open(folder)


def test_a_pipe_is_refused_as_a_weight_file(tmp_path: Path, tiny_llama: Make) -> None:
    folder = tiny_llama(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_refused_on_reading(
    tmp_path: Path, tiny_llama: Make, value: float, dtype: torch.dtype
) -> None:
    folder = tiny_llama(tmp_path / "a")
    tensors = {n: t.to(dtype) for n, t in load_file(folder / "model.safetensors").items()}
    tensors["model.norm.weight"][3] = value
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    checkpoint.read("model.embed_tokens.weight")
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        checkpoint.read("model.norm.weight")


def test_a_gguf_file_is_refused_with_what_to_give(tmp_path: Path) -> None:
    from zoo.checkpoints.sources import resolve_source
    from zoo.targets.configs import read_config

    advice = "a GGUF file becomes a donor with `headstart zoo add FILE.gguf --zoo DIR`; then give that zoo"
    file = tmp_path / "folder" / "model-Q4_K.GGUF"
    file.parent.mkdir()
    file.write_bytes(b"GGUF\x03")
    with pytest.raises(UserError) as caught:
        Checkpoint.open(file.parent)
    assert str(caught.value) == f"{file.parent}: has no config.json; {advice}"
    for call, given in ((resolve_source, file), (read_config, file), (resolve_source, "org/name@main:model.gguf")):
        with pytest.raises(UserError) as caught:
            call(str(given))
        assert str(caught.value) == f"{given}: {advice}"
    (file.parent / "config.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        Checkpoint.open(file.parent)
    assert str(caught.value) == f"{file.parent}: {advice}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 4097, -1])
def test_one_value_that_is_not_finite_is_found(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, value: float, place: int
) -> None:
    monkeypatch.setattr(checkpoint_module, "VALUES_CHECKED", 4096)
    values = torch.linspace(-3, 3, 10_000).to(dtype).view(100, 100)
    assert is_finite(values) and is_finite(values.T)
    values.view(-1)[place] = value
    assert not is_finite(values) and not is_finite(values.T)


def test_integers_and_empty_tensors_are_finite() -> None:
    assert (
        is_finite(torch.arange(3)) and is_finite(torch.empty(0)) and is_finite(torch.empty(0, 4, dtype=torch.float16))
    )
