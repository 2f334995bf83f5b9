"""Every kind of damage that verify has to find, and what it leaves alone."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.add import add
from zoo.donors.verify import stray_files, verify
from zoo.donors.zoo import Zoo
from zoo.errors import UserError

Make = Callable[..., Path]


def test_a_flipped_byte_is_found_wherever_it_is(filled: Path) -> None:
    """Any byte of any file of the zoo."""
    rng = random.Random(0)
    files = sorted(p for p in filled.rglob("*") if p.is_file() and p.name != ".lock")
    assert verify(filled) == []
    for path in files:
        original = path.read_bytes()
        places = {0, len(original) - 1, *(rng.randrange(len(original)) for _ in range(3))}
        for place in places:
            damaged = bytearray(original)
            damaged[place] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            if path.name == "index.json":
                (problem,) = verify(filled)
                assert problem.startswith(str(path)) and "headstart zoo list" in problem
                continue
            if path.name != "manifest.parquet":
                (problem,) = verify(filled)
                assert problem.startswith(f"{path.parent.name}: ") and str(path) in problem
                continue
            try:
                assert verify(filled)
            except UserError as error:
                assert str(path) in str(error)
        path.write_bytes(original)
    assert verify(filled) == []


def test_the_suggested_option_resolves_the_error(filled: Path, tmp_path: Path) -> None:
    source = str(tmp_path / "src" / "first")
    home = filled / "models" / "first"
    weights = home / "model.safetensors"
    original = weights.read_bytes()

    os.truncate(weights, len(original) // 2)
    (problem,) = verify(filled)
    assert f"zoo add {source}" in problem and str(weights) in problem
    add([source], filled, quiet=True)
    assert verify(filled) == [] and weights.read_bytes() == original

    weights.unlink()
    assert "is missing" in verify(filled)[0]
    add([source], filled, quiet=True)
    assert verify(filled) == []

    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    (problem,) = verify(filled)
    assert "model.norm.weight" in problem and "remove that file" in problem
    weights.unlink()
    add([source], filled, quiet=True)
    assert verify(filled) == []

    (home / "tensors.parquet").unlink()
    assert "tensors.parquet is missing" in verify(filled)[0]
    add([source], filled, quiet=True)
    assert verify(filled) == []

    (filled / "manifest.parquet").unlink()
    add([source], filled, quiet=True)
    assert verify(filled) == [] and len(Zoo.open(filled).donors) == 2


def test_a_donor_that_was_removed_is_missed_until_the_next_add(filled: Path, tmp_path: Path) -> None:
    shutil.rmtree(filled / "models" / "first")
    (problem,) = verify(filled)
    assert problem.startswith("first: ")
    with pytest.raises(UserError, match="first"):
        _ = Zoo.open(filled).donors
    add([str(tmp_path / "src" / "second")], filled, quiet=True)
    assert [d.name for d in Zoo.open(filled).donors] == ["second"] and verify(filled) == []


def test_unknown_files_are_noted_without_an_error(filled: Path) -> None:
    (filled / "models" / "first" / "notes.txt").write_text("mine")
    (filled / "models" / "third").mkdir()
    assert verify(filled) == []
    assert [n.rpartition("/")[2].split(":")[0] for n in stray_files(filled)] == ["notes.txt", "third"]
