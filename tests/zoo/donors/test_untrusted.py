"""Zoos from outside: bombs in the manifest, wrong types in the records, paths that lead out of the folder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zoo.donors.index import list_donors
from zoo.donors.manifest import SCHEMA, join_rows, read_rows
from zoo.donors.records import read_record, seal
from zoo.errors import UserError
from zoo.limits import MAX_ROWS

ROW: dict[str, Any] = {
    "model": "donor", "revision": "r", "license": "mit", "tensor": "w", "role": "other", "layer": None, "shape": [2],
    "dtype": "float32", "file": "model.safetensors", "offset": 8, "nbytes": 8, "sha256": "0", "mean": None,
    "std": None, "kurtosis": None,
}  # fmt: skip


def write_manifest(folder: Path, *changes: dict[str, Any]) -> Path:
    path = folder / "manifest.parquet"
    pq.write_table(pa.Table.from_pylist([ROW | change for change in changes], schema=SCHEMA), path)
    return path


def test_a_sound_manifest_is_read(tmp_path: Path) -> None:
    assert read_rows(write_manifest(tmp_path, {}, {"layer": 3})).to_pylist() == [ROW, ROW | {"layer": 3}]


def test_a_manifest_of_twenty_million_rows_is_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    zeros = pa.Array.from_buffers(pa.int8(), 20_000_000, [None, pa.py_buffer(bytes(20_000_000))])
    pq.write_table(pa.table({"model": zeros}), path, compression="zstd")
    assert path.stat().st_size < 100_000
    start = time.process_time()
    with pytest.raises(UserError, match=f"20000000 rows, more than the {MAX_ROWS} allowed"):
        read_rows(path)
    assert time.process_time() - start < 2


def test_a_manifest_whose_texts_take_gigabytes_ends_at_the_limit_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 100_000]))
    pq.write_table(pa.table({"model": texts}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 10_000, "ten gigabytes when it is decoded"
    with pytest.raises(UserError, match=r"not a readable manifest .*MB of memory allowed"):
        read_rows(path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model": None}, "has rows without model"),
        ({"tensor": None}, "has rows without tensor"),
        ({"nbytes": None}, "has rows without nbytes"),
        ({"model": "../../outside"}, "has the model '../../outside', which is not a name without folders"),
        ({"file": "/etc/passwd"}, "has the file '/etc/passwd'"),
        ({"model": ""}, "has the model ''"),
        ({"offset": -1}, "has a negative offset"),
    ],
)
def test_a_manifest_with_impossible_rows_is_refused(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = write_manifest(tmp_path, {}, change)
    with pytest.raises(UserError, match=problem):
        read_rows(path)


def test_what_is_no_manifest_is_refused_in_one_line(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, {})
    sound = path.read_bytes()
    for data, problem in (
        (b"", "not a readable manifest"),
        (sound[:-10], "not a readable manifest"),
        (sound[:40] + b"\xff" * 40 + sound[80:], "not a readable manifest"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=problem):
            read_rows(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(UserError, match="is not the manifest of a zoo"):
        read_rows(path)
    pq.write_table(SCHEMA.empty_table(), path)
    with pytest.raises(UserError, match="has no rows"):
        join_rows([path])
    with pytest.raises(UserError, match="no such manifest"):
        read_rows(tmp_path / "none.parquet")


RECORD: dict[str, Any] = {
    "source": "s", "revision": "r", "license": "mit", "sha256": "0", "rows": "0",
    "files": {"config.json": {"size": 1, "sha256": "0"}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        *(({key: None}, f"{key} is None; it must be") for key in RECORD),
        ({"files": {"config.json": "0"}}, "files is "),
        ({"files": {"../config.json": RECORD["files"]["config.json"]}}, "which is outside its folder"),
        ({"files": {"config.json": {"size": "1", "sha256": "0"}}}, "size is '1'; it must be a whole number"),
        ({"files": {"config.json": {"size": 1}}}, "sha256 is missing"),
    ],
)
def test_a_record_of_other_types_is_refused_although_its_seal_is_right(
    change: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    for values in ({}, change):
        record = RECORD | values
        (tmp_path / "donor.json").write_text(json.dumps(record | {"seal": seal(record)}))
        if not values:
            assert read_record(tmp_path) == record | {"seal": seal(record)}
    with pytest.raises(UserError, match=problem):
        read_record(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"donors": None}, {"donors": [1]}, {"donors": [{}]}, {"fingerprint": 1}, {"donors": [{"name": "../x"}]},
    ],
)  # fmt: skip
def test_an_index_of_other_types_is_computed_again(change: dict[str, Any], filled: Path) -> None:
    expected = list_donors(filled)
    content = {k: v for k, v in json.loads((filled / "index.json").read_text()).items() if k != "seal"} | change
    (filled / "index.json").write_text(json.dumps(content | {"seal": seal(content)}, indent=1) + "\n")
    assert list_donors(filled) == expected
