"""The benchmark: rows hold whole runs, an interrupted one goes on from them, controls are what they say, and the page
is that of the committed figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import audits, controls, figures, head_start, rows, tables, tasks
from benchmarks.peers.scoring import loss_of
from benchmarks.peers.weights import read
from headstart import scores
from headstart.generate import complete
from tests.headstart.test_compare import TARGET, run
from tests.tiny import make_zoo
from zoo.blueprint import Blueprint
from zoo.store import Zoo
from zoo.text import byte_tokens, python_reference

SMALL = replace(tasks.small(), target="tiny", config=TARGET, lrs=(1e-2,), methods=("default", "normal", "hypercloning"))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def test_a_row_holds_a_whole_run(tmp_path: Path) -> None:
    first = run("normal", 1, 2.5e-3, [5.0, 4.0, 3.0]) | {"init": {"seconds": 0.5, "donors": [{"name": "é"}]}}
    broken = run("default", 0, 1e-2, [5.0], scale=4.0, diverged=7)
    broken["activation_rms"]["end"] = None
    runs = {"b.json": first, "a.json": broken}
    folder, file = tmp_path / "runs", tmp_path / "runs.parquet"
    rows.write(file, [rows.row(SMALL, name, found) for name, found in runs.items()])
    bytes_ = file.read_bytes()
    rows.restore(rows.read(file), SMALL, folder)
    assert {path.name: json.loads(path.read_text()) for path in folder.iterdir()} == runs
    rows.write(file, rows.collect(rows.read(file), SMALL, folder))
    assert file.read_bytes() == bytes_
    other = replace(SMALL, budget="short")
    kept = rows.collect(rows.read(file), other, folder, ["a.json"])
    assert [r["file"] for r in rows.of(kept, other)] == ["a.json"] and len(rows.of(kept, SMALL)) == 2
    assert not rows.of(rows.collect(kept, other, folder, []), other)


def test_it_goes_on_from_its_rows(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headstart import compare

    monkeypatch.setattr(tasks, "prepare", lambda *a, **b: {"zoo": zoo.path, "model": None})
    monkeypatch.setattr(tasks, "BUDGETS", {"short": 3, "long": 6})
    monkeypatch.setattr(tasks, "text", lambda name, data: python_reference()[:20_000])
    monkeypatch.setattr(tasks, "SCALES", (1.0,))
    first = head_start.measure(SMALL, tmp_path / "one", None, small=True)
    assert list(first["methods"]) == ["default", "normal"] and "hypercloning" in first["refused"]
    found = rows.read(tmp_path / "one" / "runs.parquet")
    assert len(found) == 6 and {r["seed"] for r in found} == {0, 1, 2}
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "runs.parquet").rename(tmp_path / "two" / "runs.parquet")

    def nothing_is_left(function: Any, jobs: Any, *rest: Any) -> None:
        assert not jobs

    monkeypatch.setattr(compare, "run_jobs", nothing_is_left)
    second = head_start.measure(SMALL, tmp_path / "two", None, small=True)
    assert second["methods"] == first["methods"]
    assert rows.read(tmp_path / "two" / "runs.parquet") == found


def test_every_method_is_asked_for_every_target() -> None:
    names = {c.name for c in tasks.comparisons()}
    assert len(names) == len(list(tasks.comparisons()))
    for text, targets in (("reference", tasks.UNSEEN), ("source", tasks.UNSEEN), ("shakespeare", tasks.UNSEEN)):
        task = "A" if text == "reference" else "B"
        assert {f"{task}-{t}-{text}-{b}" for t in targets for b in tasks.BUDGETS} <= names
    assert set(tasks.SMALL) <= set(tasks.plain()) and len(tasks.SMALL) == 8
    assert tasks.BUDGETS["long"] == 4 * tasks.BUDGETS["short"] and len(tasks.SEEDS) >= 3
    donors = tasks.donors()
    for name, config in tasks.UNSEEN.items():
        target = Blueprint.from_config(config).metadata
        assert target is not None
        shape = (target.width, target.layers, target.heads, target.kv_heads, target.ffn)
        assert shape not in {(d.width, d.layers, d.heads, d.kv_heads, d.ffn) for d in donors}, name
    assert all(d.heads == d.kv_heads for d in donors) and max(d.width for d in donors) < 160
    assert min(d.width for d in donors) > 32 and max(d.layers for d in donors) < 8


def test_the_library_is_a_text() -> None:
    source = tasks.library_source()
    assert 1_000_000 < len(source) < 4_000_000 and b"class ArgumentParser" in source


@pytest.fixture(scope="module")
def own(zoo: Zoo) -> tuple[Any, Blueprint]:
    donor = zoo.donors[0]
    return donor, donor.blueprint


def test_controls_are_what_they_say(zoo: Zoo, own: tuple[Any, Blueprint]) -> None:
    donor, blueprint = own
    alike = controls.of_shape(read(zoo, "canonical"), blueprint)
    assert donor.name in {d.name for d in alike}
    tokens = byte_tokens(python_reference()[:4000])
    vocab = blueprint.metadata.vocab  # type: ignore[union-attr]
    tokens = tokens % vocab

    def loss(sampler: Any, seed: int = 0) -> float:
        tensors = {name: t.float() for name, t in complete(sampler.fit(zoo, blueprint), blueprint, seed)}
        return loss_of(blueprint.config, tensors, tokens, windows=8)  # type: ignore[arg-type]

    losses = {
        d.name: loss_of(d.config, {s.name: d.read(s.name).float() for s in d.blueprint.specs}, tokens, windows=8)
        for d in zoo.donors
    }
    least = controls.Noise(amount=1e-6).fit(zoo, blueprint)
    assert loss(least) == pytest.approx(losses[least.donors[least.one(0)]], abs=1e-4)
    assert loss(controls.Noise(amount=0.5)) != pytest.approx(loss(least), abs=1e-3)
    if len(alike) < 2:
        with pytest.raises(Exception, match="needs 2 donors"):
            controls.Average().fit(zoo, blueprint)


def test_mixtures_of_donors_in_numbers() -> None:
    from benchmarks.peers.weights import Weights

    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 40, 50, generator=generator)
    donors = [Weights(str(i), None, {"w": v}, None) for i, v in enumerate(values)]  # type: ignore[arg-type]
    made = {}
    for cls in (controls.Noise, controls.Average, controls.Interpolation, controls.PerDimension):
        sampler = cls()
        sampler._donors = donors
        made[cls] = sampler.mix("w", 0), sampler.mix("w", 0), sampler.mix("w", 1)
        assert torch.equal(*made[cls][:2])
    assert torch.allclose(made[controls.Average][0], values.mean(0))
    noise = controls.Noise()
    noise._donors = donors
    change = made[controls.Noise][0] - values[noise.one(0)]
    assert float(change.square().mean().sqrt()) == pytest.approx(
        0.1 * float(values[noise.one(0)].square().mean().sqrt()), rel=0.05
    )
    many = torch.stack([_mixed(controls.PerDimension(), donors, seed) for seed in range(300)])
    assert torch.allclose(many.mean(0), values.mean(0), atol=0.4)
    assert float((many.std(0) / values.std(0)).mean()) == pytest.approx(1.0, abs=0.03)
    between = made[controls.Interpolation][0]
    distances = [(between - v).norm() for v in values]
    pairs = [(i, j) for i in range(3) for j in range(i) if torch.isclose(
        distances[i] + distances[j], (values[i] - values[j]).norm(), rtol=1e-4)]  # fmt: skip
    assert len(pairs) == 1


def _mixed(sampler: Any, donors: Any, seed: int) -> torch.Tensor:
    sampler._donors = donors
    return sampler.mix("w", seed)


def test_novel_and_performant_are_counted() -> None:
    sample = {"shape": "seen", "label": "x", "error_iou": 0.5, "error_same": 0.2, "loss": 3.0}
    drawn = [sample | {"distance": d, "trained": t} for d, t in ((0.5, 1.0), (1.5, 1.0), (2.5, 3.0), (4.5, 1.9))]
    found = {"donors": {"median": 1.0}, "samples": [*drawn, drawn[0] | {"label": "y"}, drawn[0] | {"shape": "unseen"}]}
    s = audits.shares(found, "x", "seen", bound=2.0)
    assert (s["n"], s["performant"]) == (4, 3) and s["distance"] == pytest.approx(2.25)
    assert s["novel"] == {"1": 3, "2": 2, "3": 1, "4": 1} and s["both"] == {"1": 2, "2": 1, "3": 1, "4": 1}


def test_the_largest_stable_rate() -> None:
    def entry(**lrs: float | None) -> dict[str, Any]:
        return {"x": {"lrs": {key.removeprefix("lr"): loss for key, loss in lrs.items()}}}

    short = entry(**{"lr0.001": 2.4, "lr0.003": 2.0})
    ladder = entry(**{"lr0.009": 2.1, "lr0.03": 2.2, "lr0.1": 2.3, "lr0.3": None})
    assert tables.largest_stable({"short": short, "ladder": ladder}, "x") == "0.03"
    ladder["x"]["lrs"]["0.3"] = 1.9
    assert tables.largest_stable({"short": short, "ladder": ladder}, "x") == "0.3 or more"
    worse = entry(**{"lr0.009": 2.9, "lr0.03": None, "lr0.1": None, "lr0.3": None})
    assert tables.largest_stable({"short": short, "ladder": worse}, "x") == "below 0.009"
    assert tables.largest_stable({"short": short}, "x") == "–"


def test_tables_of_rows(tmp_path: Path) -> None:
    """Of made-up runs, one method of which diverged and one refused."""
    done = [c for c in tasks.comparisons() if c.target == "gqa" and c.task == "A" and c.budget != "ladder"]
    found, facts = [], {"comparisons": {}, "cores": 2, "versions": {"torch": "2"}, "cost": {"normal": {"refused": "x"}}}
    facts["zoos"] = {"embedded": [{"parameters": 10, "tokens": 100}]}
    for c in done:
        for name, ends in (("default", 3.0), ("normal", 2.5), ("diffusion", 2.0), (tasks.CONTROLS[0], 2.2)):
            for seed in tasks.SEEDS:
                one = run(name, seed, 1e-3, [5.0, 4.0, ends + seed / 100], scale=1.0)
                found.append(rows.row(c, f"{name}-{seed}.json", one))
        broken = run("kde", 0, 1e-3, [5.0], diverged=3)
        broken["activation_rms"]["end"] = None
        found.append(rows.row(c, "kde.json", broken))
        facts["comparisons"][c.name] = {
            "target": c.config, "parameters": 5, "steps": c.steps, "corpus": {"tokenizer": "bytes"},
            "refused": {"pruning": "/somewhere/zoo: too narrow"},
        }  # fmt: skip
    made = {mark: make(found, facts) for mark, make in tables.PARTS.items()}
    page = made["A-reference-long"].splitlines()
    order = [line.split(" | ")[0] for line in page[2:6]]
    assert order == ["| default, tuned", "| diffusion", f"| {tasks.CONTROLS[0]}", "| normal"]
    assert page[3].startswith("| diffusion | -1.000 ± 0.000, ") and "| kde | diverged |" in page
    assert "| pruning | refused |" in page and "| mimetic | – |" in page
    assert "+0.200 ± 0.000" in made["conditioning"] and made["B-source-long"] == ""
    assert "| kde | – | – | 0 |" in made["methods"] and "26 runs" in made["counted"]
    text = tables.details(found, facts)
    assert "- pruning refused: zoo: too narrow" in text and "| kde | – | – | diverged |" in text
    pictures = figures.all_of(found)
    assert set(pictures) == {"head_starts.png"} and pictures["head_starts.png"][:4] == b"\x89PNG"


def test_cells_say_what_was_measured() -> None:
    runs = (
        [run("default", s, 1e-3, [5.0, 4.0, 3.0 + s / 100]) for s in range(3)]
        + [run("fast", s, 1e-3, [4.0, 3.5 - s / 10, 2.0]) for s in range(3)]
        + [run("slow", s, 1e-3, [5.0, 4.5, 3.5]) for s in range(3)]
        + [run("ready", s, 1e-3, [2.0, 2.0, 2.0]) for s in range(3)]
    )
    _, entries = scores.score(runs, budget=100)
    cell = tables._cell(entries["fast"], None)
    assert cell.startswith("-1.010 ± 0.025, 1.6× (")
    assert tables._cell(entries["slow"], None) == "+0.490 ± 0.025, never"
    assert tables._cell(entries["ready"], None).endswith("≥ 100×")
    assert tables._cell(None, "too wide") == "refused" and tables._cell(None, None) == "–"


def test_the_page_is_that_of_its_figures() -> None:
    found, facts = rows.read(head_start.RUNS), head_start.read_facts()
    text = tables.PAGE.read_text()
    for mark, make in tables.PARTS.items():
        assert tables.placed(text, mark, make(found, facts) or "Not measured yet.") == text, mark
    assert tables.details(found, facts) == tables.DETAILS.read_text()
