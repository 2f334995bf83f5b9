"""index.json: equal to a fresh computation, written again when it is outdated, and read without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.add import add
from zoo.donors.index import list_donors
from zoo.donors.summary import summarize_donors
from zoo.donors.verify import verify
from zoo.errors import UserError

Make = Callable[..., Path]
INDEX = "index.json"


@pytest.fixture
def no_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where the donors are read instead of the index."""

    def fail(path: Path) -> None:
        raise AssertionError("the donors were read")

    monkeypatch.setattr("zoo.donors.summary.summarize_donors", fail)


def test_adding_writes_an_index_that_equals_a_fresh_computation(filled: Path, no_summary: None) -> None:
    assert json.dumps(list_donors(filled)) == json.dumps(summarize_donors(filled))
    assert [donor["name"] for donor in list_donors(filled)] == ["first", "second"]


def test_a_zoo_without_an_index_gets_one_when_it_is_listed(filled: Path) -> None:
    written = (filled / INDEX).read_bytes()
    (filled / INDEX).unlink()
    assert verify(filled) == []
    assert list_donors(filled) == summarize_donors(filled)
    assert (filled / INDEX).read_bytes() == written


def test_an_index_follows_the_donors(filled: Path, tmp_path: Path, tiny_llama: Make) -> None:
    before, index = list_donors(filled), (filled / INDEX).read_bytes()
    add([str(tiny_llama(tmp_path / "src" / "third", seed=3))], filled, quiet=True)
    assert [donor["name"] for donor in list_donors(filled)] == ["first", "second", "third"]
    (filled / INDEX).write_bytes(index)  # that of the zoo before
    assert list_donors(filled) == summarize_donors(filled) != before
    assert (filled / INDEX).read_bytes() != index


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"donors": []}', b"\xff"])
def test_a_damaged_index_is_written_again(filled: Path, damage: bytes) -> None:
    donors, index = list_donors(filled), (filled / INDEX).read_bytes()
    for content in (damage, index.replace(b'"parameters": ', b'"parameters": 1')):
        (filled / INDEX).write_bytes(content)
        (problem,) = verify(filled)
        assert problem.startswith(f"{filled / INDEX}: is damaged")
        assert list_donors(filled) == donors
        assert (filled / INDEX).read_bytes() == index and verify(filled) == []


def test_an_index_does_not_hide_a_damaged_donor(filled: Path) -> None:
    weights = filled / "models" / "first" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        list_donors(filled)
    shutil.rmtree(filled / "models" / "first")
    with pytest.raises(UserError, match="first"):
        list_donors(filled)


def test_a_folder_that_cannot_be_written_is_listed_without_an_index(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (filled / INDEX).unlink()

    def read_only(self: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", read_only)
    assert list_donors(filled) == summarize_donors(filled)
    assert not (filled / INDEX).exists()


def test_a_folder_without_a_zoo_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a zoo"):
        list_donors(tmp_path)


def test_listing_a_zoo_imports_no_large_library(filled: Path) -> None:
    code = (
        "import sys; from zoo.donors.index import list_donors; assert len(list_donors(sys.argv[1])) == 2; "
        "print([m for m in ('torch', 'transformers', 'numpy', 'pyarrow') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code, str(filled)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]", found.stderr
