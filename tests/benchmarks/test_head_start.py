"""The benchmark runs: rows hold whole runs, an interrupted benchmark continues from them, costs are measured."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from benchmarks.head_start import benchmark, costs, donor_losses, models, rows, tasks
from tests.headstart.compare.test_compare import TARGET, run
from tests.support.tiny import config, make_zoo
from zoo.add import add
from zoo.donors.zoo import Zoo
from zoo.targets.blueprint import Blueprint
from zoo.training.corpora import library_source, python_reference
from zoo.training.loop import evaluate
from zoo.vocabulary import byte_tokens, save_byte_tokenizer

SMALL = replace(
    tasks.small_comparison(), target="tiny", config=TARGET, lrs=(1e-2,), methods=("default", "normal", "hypercloning")
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def test_a_row_holds_a_whole_run(tmp_path: Path) -> None:
    first = run("normal", 1, 2.5e-3, [5.0, 4.0, 3.0]) | {"init": {"seconds": 0.5, "donors": [{"name": "é"}]}}
    broken = run("default", 0, 1e-2, [5.0], scale=4.0, diverged=7)
    broken["activation_rms"]["end"] = None
    runs = {"b.json": first, "a.json": broken}
    folder, file = tmp_path / "runs", tmp_path / "runs.parquet"
    rows.write(file, [rows.to_row(SMALL, name, found) for name, found in runs.items()])
    bytes_ = file.read_bytes()
    rows.write_run_files(rows.read(file), SMALL, folder)
    assert {path.name: json.loads(path.read_text()) for path in folder.iterdir()} == runs
    rows.write(file, rows.replace_comparison(rows.read(file), SMALL, folder))
    assert file.read_bytes() == bytes_
    other = replace(SMALL, budget="short")
    kept = rows.replace_comparison(rows.read(file), other, folder, ["a.json"])
    assert [r["file"] for r in rows.of_comparison(kept, other)] == ["a.json"] and len(
        rows.of_comparison(kept, SMALL)
    ) == 2
    assert not rows.of_comparison(rows.replace_comparison(kept, other, folder, []), other)


def test_rows_of_removed_code_stay(tmp_path: Path) -> None:
    """A comparison that is run again replaces the rows of what it runs, and keeps those of removed code."""
    labels = ("default", *tasks.EARLIER_LABELS)
    assert set(tasks.EARLIER_LABELS).isdisjoint(tasks.method_labels()) and "retrieval" in tasks.language_model_methods()
    before = [rows.to_row(SMALL, f"old-{i}.json", run(name, 0, 1e-3, [5.0, 4.0])) for i, name in enumerate(labels)]
    rows.write_run_files(before, SMALL, tmp_path)
    (tmp_path / "new.json").write_text(json.dumps(run("diffusion", 0, 1e-3, [5.0, 3.0])))
    for files in (["new.json"], None):  # of a finished call, and of an interrupted one
        found = rows.replace_comparison(before, SMALL, tmp_path, files)
        kept = [r for r in found if r["method"] in tasks.EARLIER_LABELS]
        assert kept == before[1:] and sum(r["method"] == "diffusion" for r in found) == 1
        assert ("default" in {r["method"] for r in found}) == (files is None)
    was = {"methods": {"autoencoder-v1": 1, "normal": 2, "retrieval": 3}, "samples": [{"label": "autoencoder-v1"}]}
    again = benchmark.with_earlier_labels({"methods": {"normal": 4, "retrieval": 5}}, was)
    assert again == {"methods": {"autoencoder-v1": 1, "normal": 4, "retrieval": 5}}
    new = {"samples": [{"label": "normal"}, {"label": "retrieval"}]}
    assert benchmark.with_earlier_labels(new, was)["samples"] == [*new["samples"], *was["samples"]]
    assert benchmark.with_earlier_labels(new, {}) == new and len(new["samples"]) == 2
    assert tasks.method_of_label("autoencoder-v1") == "autoencoder"
    assert tasks.method_of_label("retrieval:condition=mean") == "retrieval"


def test_an_interrupted_benchmark_continues(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headstart.compare import compare, shared_training

    monkeypatch.setattr(models, "prepare_models", lambda *a, **b: {"zoo": zoo.path, "model": None})
    monkeypatch.setattr(tasks, "BUDGETS", {"short": 3, "long": 6})
    monkeypatch.setattr(tasks, "corpus_bytes", lambda name, data: python_reference()[:20_000])
    monkeypatch.setattr(tasks, "SCALES", (1.0,))
    monkeypatch.setattr(compare, "default_workers", lambda: 1)  # no processes, which import everything again
    first = benchmark.run_comparison(SMALL, tmp_path / "one", None, small=True)
    assert list(first["methods"]) == ["default", "normal"] and "hypercloning" in first["refused"]
    found = rows.read(tmp_path / "one" / "runs.parquet")
    assert len(found) == 6 and {r["seed"] for r in found} == {0, 1, 2}
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "runs.parquet").rename(tmp_path / "two" / "runs.parquet")

    def assert_no_jobs(function: Any, jobs: Any, *rest: Any, **options: Any) -> None:
        assert not jobs

    monkeypatch.setattr(shared_training, "run_jobs", assert_no_jobs)
    second = benchmark.run_comparison(SMALL, tmp_path / "two", None, small=True)
    assert second["methods"] == first["methods"]
    assert rows.read(tmp_path / "two" / "runs.parquet") == found


def test_every_target_is_compared_and_unseen() -> None:
    names = {c.name for c in tasks.comparisons()}
    assert len(names) == len(list(tasks.comparisons()))
    for text, targets in (
        ("reference", tasks.UNSEEN_TARGETS),
        ("source", tasks.UNSEEN_TARGETS),
        ("shakespeare", tasks.UNSEEN_TARGETS),
    ):
        task = "A" if text == "reference" else "B"
        assert {f"{task}-{t}-{text}-{b}" for t in targets for b in tasks.BUDGETS} <= names
    assert set(tasks.SMALL_METHODS) <= set(tasks.language_model_methods()) and len(tasks.SMALL_METHODS) == 9
    assert tasks.BUDGETS["long"] == 4 * tasks.BUDGETS["short"] and len(tasks.SEEDS) >= 3
    donors = tasks.donor_recipes()
    for name, unseen in tasks.UNSEEN_TARGETS.items():
        target = Blueprint.from_config(unseen).metadata
        assert target is not None
        shape = (target.width, target.layers, target.heads, target.kv_heads, target.ffn)
        assert shape not in {(d.width, d.layers, d.heads, d.kv_heads, d.ffn) for d in donors}, name
    assert all(d.heads == d.kv_heads for d in donors) and max(d.width for d in donors) < 160
    assert min(d.width for d in donors) > 32 and max(d.layers for d in donors) < 8


def test_library_source_is_long_enough() -> None:
    source = library_source()
    assert 1_000_000 < len(source) < 4_000_000 and b"class ArgumentParser" in source


def test_losses_of_donors_without_further_training(tmp_path: Path) -> None:
    """Those with the target's tokens, measured as a comparison measures."""
    corpus, known, other = tmp_path / "text.txt", tmp_path / "known", tmp_path / "other"
    corpus.write_bytes(python_reference()[:60_000])
    for folder in (known, other):
        LlamaForCausalLM(config(vocab_size=256)).save_pretrained(folder)
    save_byte_tokenizer(known)
    (tmp_path / "target").mkdir()
    save_byte_tokenizer(tmp_path / "target")
    add([str(known), str(other)], tmp_path / "zoo", quiet=True)
    found = donor_losses.donor_losses(Zoo.open(tmp_path / "zoo"), tmp_path / "target", corpus)
    tokens = byte_tokens(corpus.read_bytes())
    held = tokens[int(len(tokens) * 0.9) :]
    expected = evaluate(LlamaForCausalLM.from_pretrained(known), held, tasks.SEQUENCE, limit=tasks.WINDOWS)
    assert found == {"known": pytest.approx(expected, abs=1e-6)}


def test_memory_of_a_command_excludes_its_parent() -> None:
    held = bytearray(300 << 20)  # what this process holds is not the child's
    small = costs.process_usage([sys.executable, "-S", "-c", "pass"])
    large = costs.process_usage([sys.executable, "-S", "-c", "x = bytearray(100 << 20)"])
    assert small["mib"] < 60 and 90 < large["mib"] - small["mib"] < 130 and len(held)
    refusal = costs.process_usage([sys.executable, "-S", "-c", "import sys; print('no', file=sys.stderr); sys.exit(2)"])
    assert refusal == {"refused": "no"}
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        costs.process_usage([sys.executable, "-S", "-c", "1 / 0"])


def test_costs_use_the_first_target_that_a_method_accepts(zoo: Zoo, tmp_path: Path) -> None:
    own, targets = dict(zoo.donors[0].config), {}
    for name, more in (("wide", {"hidden_size": 4096}), ("own", {})):
        targets[name] = tmp_path / name
        targets[name].mkdir()
        (targets[name] / "config.json").write_text(json.dumps(own | more))
    paths, kept = {"zoo": zoo.path, "model": tmp_path}, tmp_path / "kept"
    found = costs.measure_costs(["weight-selection"], targets, paths, tmp_path, kept)
    cost = found["weight-selection"]
    assert cost["target"] == "own" and cost["mib"] > 100 and 0 < cost["fit_seconds"] < cost["seconds"]
    assert costs.measure_costs(["weight-selection"], {}, {}, tmp_path, kept) == found
    assert cost["parameters_per_second"] > 0 and 0 < cost["of_randn"] < 2
