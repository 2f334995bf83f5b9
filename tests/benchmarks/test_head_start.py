"""The benchmark: rows hold whole runs, an interrupted one goes on from them, controls are what they say, and the page
is that of the committed figures."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.head_start import benchmark as head_start
from benchmarks.head_start import costs, donors, figures, rows, scored, tables, tasks
from benchmarks.head_start.marks import placed
from benchmarks.novelty import audits, controls
from benchmarks.novelty import tables as audit_tables
from benchmarks.peers.scoring import loss_of
from benchmarks.peers.weights import Weights, own_tensors
from headstart.compare import scores
from headstart.generate.generate import complete
from tests.headstart.compare.test_compare import TARGET, run
from tests.support.tiny import config, make_zoo
from zoo.add import add
from zoo.donors.store import Zoo
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.training.loop import evaluate
from zoo.training.text import byte_tokens, python_reference, save_byte_tokenizer

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
    from headstart.compare import compare

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
    assert set(tasks.SMALL) <= set(tasks.plain()) and len(tasks.SMALL) == 9
    assert tasks.BUDGETS["long"] == 4 * tasks.BUDGETS["short"] and len(tasks.SEEDS) >= 3
    donors = tasks.donors()
    for name, unseen in tasks.UNSEEN.items():
        target = Blueprint.from_config(unseen).metadata
        assert target is not None
        shape = (target.width, target.layers, target.heads, target.kv_heads, target.ffn)
        assert shape not in {(d.width, d.layers, d.heads, d.kv_heads, d.ffn) for d in donors}, name
    assert all(d.heads == d.kv_heads for d in donors) and max(d.width for d in donors) < 160
    assert min(d.width for d in donors) > 32 and max(d.layers for d in donors) < 8


def test_the_library_is_a_text() -> None:
    source = tasks.library_source()
    assert 1_000_000 < len(source) < 4_000_000 and b"class ArgumentParser" in source


def loss(sampler: Any, zoo: Zoo, blueprint: Blueprint, seed: int = 0) -> float:
    assert blueprint.config is not None and blueprint.metadata is not None
    tokens = byte_tokens(python_reference()[:4000]) % blueprint.metadata.vocab
    tensors = {name: t.float() for name, t in complete(sampler, blueprint, seed)}
    return loss_of(blueprint.config, tensors, tokens, windows=8)


def test_a_donor_with_hardly_any_noise_is_the_donor(zoo: Zoo) -> None:
    blueprint = zoo.donors[0].blueprint
    alike = [d for d in zoo.donors if [s.shape for s in d.blueprint.specs] == [s.shape for s in blueprint.specs]]
    assert blueprint.config is not None and blueprint.metadata is not None
    tokens = byte_tokens(python_reference()[:4000]) % blueprint.metadata.vocab
    own = {d.name: loss_of(d.config, own_tensors(d), tokens, windows=8) for d in alike}
    sampler = controls.Noise(amount=1e-6).fit(zoo, blueprint)
    assert set(sampler.donors) == set(own)
    for seed in range(4):
        assert loss(sampler, zoo, blueprint, seed) == pytest.approx(own[sampler.donors[sampler.one(seed)]], abs=1e-4)
    loud = controls.Noise(amount=0.5).fit(zoo, blueprint)
    assert loss(loud, zoo, blueprint) != pytest.approx(loss(sampler, zoo, blueprint), abs=1e-3)


def test_mixing_asks_for_two_donors_of_the_shape(zoo: Zoo) -> None:
    with pytest.raises(UserError, match="needs 2 donors of the target's shape, has 0"):
        controls.Average().fit(zoo, Blueprint.from_pretrained_config(config(hidden_size=28, layers=3)))


def test_heads_and_neurons_are_matched() -> None:
    """A model whose heads and neurons are in another order is brought back to the first's order, tensor by tensor."""
    blueprint = Blueprint.from_config(tasks.llama(32, 2, 4, 4, 40, vocab=48, head=8))
    generator = torch.Generator().manual_seed(0)
    tensors = {s.name: torch.randn(s.shape, generator=generator) for s in blueprint.specs if s.role != "norm"}
    first = Weights("first", blueprint, tensors, None)
    moved = dict(tensors)
    heads, neurons = torch.randperm(4, generator=generator), torch.randperm(40, generator=generator)
    for name, tensor in tensors.items():
        axis = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
        if "self_attn" in name:
            moved[name] = controls._permuted(tensor, axis, 4, heads)
        elif "mlp" in name:
            moved[name] = controls._permuted(tensor, axis, 40, neurons)
    assert not torch.equal(moved["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.1.mlp.up_proj.weight"])
    found = controls.matched(Weights("moved", blueprint, moved, None), first)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    tokens = torch.randint(48, (400,), generator=generator)
    norms = {s.name: torch.ones(s.shape) for s in blueprint.specs if s.role == "norm"}
    losses = [loss_of(blueprint.config, t | norms, tokens, windows=4) for t in (tensors, moved)]  # type: ignore[arg-type]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_mixtures_of_donors_in_numbers() -> None:
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


def sample(distance: float, trained: float | None, loss: float = 3.0, digest: str = "a", **more: Any) -> dict[str, Any]:
    errors = {"error_iou": 0.5, "error_same": 0.2, "error_expected": 0.3, "mosaic": distance / 2}
    told = {"shape": "seen", "label": "x", "sizes": {"vocab": 1.0, "qk": 0.5}, "digest": digest}
    ends = {"0.002": trained, "0.006": None}
    return told | errors | {"distance": distance, "trained": ends, "loss": loss} | more


def test_novel_and_performant_are_counted() -> None:
    drawn = [sample(0.5, 1.0), sample(1.5, 1.0, 1.0), sample(2.5, None, digest="b"), sample(4.5, 1.9)]
    others = [sample(9, 1, label="y"), sample(9, 1, shape="unseen")]
    found = {"donors": {"median": 1.0, "mosaic": 1.0}, "samples": [*drawn, *others]}
    s = audits.shares(found, "x", "seen", ready=2.5, trains=2.0)
    assert (s["n"], s["distinct"], s["ready"], s["performant"]) == (4, 2, 1, 3)
    assert s["distance"] == pytest.approx(2.25) and s["size"] == 0.75 and s["trained"] is None
    both = [sample(1.5, 3.0) | {"trained": {"0.002": 3.0, "0.006": end}} for end in (1.0, 2.0)]
    better = audits.shares(found | {"samples": both}, "x", "seen", ready=2.5, trains=2.0)
    assert (better["rate"], better["trained"], better["performant"]) == ("0.006", 1.5, 2)
    assert s["mosaic"] == pytest.approx(1.125) and s["beyond"] == 1
    assert s["novel"] == {"1": 3, "2": 2, "3": 1, "4": 1} and s["both"] == {"1": 2, "2": 1, "3": 1, "4": 1}


def ladder(*ends: tuple[float, list[float | None]], scale: float = 1.0) -> list[dict[str, Any]]:
    return [
        {"lr": lr, "scale": scale, "seed": seed, "losses": [5.0, end], "diverged": 3 if end is None else None}
        for lr, finals in ends
        for seed, end in enumerate(finals)
    ]


def test_the_largest_rate_that_is_borne() -> None:
    def borne(runs: list[dict[str, Any]], within: float = 0.25) -> str:
        return tables.largest_borne(runs, within)

    good = [2.0, 2.1, 2.0]
    assert borne(ladder((2e-3, good), (6e-3, good), (2e-2, [2.2, 2.1, 2.9]))) == "0.006", "every seed, not their mean"
    assert borne(ladder((2e-3, good), (6e-3, [2.0, None, 2.0]), (2e-2, good))) == "0.002", "stops at the first failure"
    assert borne(ladder((2e-3, [3.0] * 3), (6e-3, good), (2e-2, [None] * 3))) == "0.006", "too small is not unstable"
    assert borne(ladder((2e-3, good), (0.2, good))) == "0.2 or more"
    assert borne(ladder((2e-3, [None] * 3))) == "none" and borne([]) == "–"
    two = ladder((2e-3, [2.5] * 3), (2e-2, [2.5] * 3)) + ladder((2e-3, good), (2e-2, [None] * 3), scale=4.0)
    assert borne(two) == "0.002", "at the scale whose best loss is lower"
    apart = ladder((2e-3, [1.0, 2.0, 3.0]), (6e-3, [1.05, 2.05, 3.05]), (2e-2, [1.2, 2.0, 3.0]))
    assert borne(apart, 0.1) == "0.006" and borne(apart) == "0.02", "a seed beside itself"


def test_donors_as_they_are(tmp_path: Path) -> None:
    """Those with the target's tokens, measured as a comparison measures."""
    corpus, known, other = tmp_path / "text.txt", tmp_path / "known", tmp_path / "other"
    corpus.write_bytes(python_reference()[:60_000])
    for folder in (known, other):
        LlamaForCausalLM(config(vocab_size=256)).save_pretrained(folder)
    save_byte_tokenizer(known)
    (tmp_path / "target").mkdir()
    save_byte_tokenizer(tmp_path / "target")
    add([str(known), str(other)], tmp_path / "zoo", quiet=True)
    found = donors.as_they_are(Zoo.open(tmp_path / "zoo"), tmp_path / "target", corpus)
    tokens = byte_tokens(corpus.read_bytes())
    held = tokens[int(len(tokens) * 0.9) :]
    expected = evaluate(LlamaForCausalLM.from_pretrained(known), held, tasks.SEQUENCE, limit=tasks.WINDOWS)
    assert found == {"known": pytest.approx(expected, abs=1e-6)}


def test_tables_of_rows(tmp_path: Path) -> None:
    """Of made-up runs, one method of which diverged and one refused."""
    done = [c for c in tasks.comparisons() if c.target == tasks.MAIN and c.task == "A" and c.budget != "ladder"]
    found, facts = [], {"comparisons": {}, "cores": 2, "versions": {"torch": "2"}, "made_from": {"embedded": "a"}}
    facts["cost"] = {"methods": {"normal": {"refused": "x"}}, "made_from": "a"}
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
            "made_from": "a", "target": c.config, "parameters": 5, "steps": c.steps, "corpus": {"tokenizer": "bytes"},
            "batch_size": 4, "sequence": 64, "as_they_are": {"a": 2.75, "b": 2.5, "c": None},
            "refused": {"pruning": "/somewhere/zoo: too narrow"},
            "runs": rows.digest(r["file"] for r in rows.of(found, c)),
        }  # fmt: skip
    facts["trained"] = {"embedded": 330.0}
    made = {mark: make(scored.Found.of(found, facts)) for mark, make in tables.PARTS.items()}
    page = made["A-reference-long"].splitlines()
    assert page[2].endswith("scale 1\\*; 3.000 at scale 1) |") and page[3] == "| best donor, as it is | 2.500 |"
    order = [line.split(" | ")[0] for line in page[4:7]]
    assert order == ["| diffusion", f"| {tasks.CONTROLS[0]}", "| normal"]
    assert page[4].startswith("| diffusion | -1.000 ± 0.000, ") and "| kde | diverged |" in page
    assert "| pruning | refused |" in page and "| mimetic | – |" in page
    assert "+0.200 ± 0.000" in made["conditioning"] and made["B-source-long"] == ""
    assert "\n| normal | – | – | 0 | 0 | 5.00 |" in made["methods"] and "kde" not in made["methods"]
    assert (
        "26 rows, 13 different runs" in made["counted"] and "330 seconds" in made["overview"] and made["novelty"] == ""
    )
    text = tables.details(scored.Found.of(found, facts))
    assert "- pruning refused: zoo: too narrow" in text and "| kde | – | – | diverged |" in text
    pictures = figures.all_of(scored.Found.of(found, facts).entries)
    assert set(pictures) == {"head_starts"} and pictures["head_starts"][:4] == b"\x89PNG"
    assert (
        made["head_starts"] == "![head starts](benchmarks/results/figures/head_starts.png)"
        and made["activations"] == ""
    )
    partly = [r for r in found if not (r["method"] == "normal" and r["seed"] == 2)]
    assert tables.details(scored.Found.of(partly, facts)).count("##") == 0, (
        "comparisons that lack a run, or have one too many, are not told"
    )
    dead = [r | {"diverged": 3, "losses": [5.0]} if r["method"] == "default" else r for r in found]
    without = scored.Found.of(dead, facts)
    alone = {mark: make(without) for mark, make in tables.PARTS.items()}
    assert "| default, tuned | diverged |" in alone["A-reference-long"]
    assert "| normal | 2.510; the default diverged |" in alone["A-reference-long"] and tables.details(
        scored.Found.of(dead, facts)
    )


def test_what_is_new_is_told() -> None:
    found, facts = [], {"comparisons": {}, "made_from": {"embedded": "a"}}
    for c in tasks.comparisons():
        if c.task == "A" and c.target in ("seen", tasks.MAIN) and c.budget in tasks.BUDGETS:
            runs = [run("default", seed, 1e-3, [5.0, 4.0, 3.0 if c.budget == "short" else 2.0]) for seed in tasks.SEEDS]
            found += [rows.row(c, f"{c.name}-{r['seed']}", r) for r in runs]
            digest = rows.digest(r["file"] for r in rows.of(found, c))
            facts["comparisons"][c.name] = {"runs": digest, "made_from": "a"}
    drawn = [
        sample(1.5, 1.9, 2.9, shape=shape, label=label)
        for shape in audits.SHAPES
        for label in audits.labels(shape)
        for _ in range(2)
    ]
    apart = {"median": 1.0, "mosaic": 0.7, "iou": 0.7, "expected": 0.5, "same": 0.4}
    facts["novelty"] = {"donors": apart, "samples": drawn, "steps": 50, "made_from": "a"}
    text = audit_tables.novelty(scored.Found.of(found, facts))
    assert not audit_tables.novelty(scored.Found.of(found, facts | {"made_from": {"embedded": "b"}})), "other donors"
    line = "2 (1) | 2.90 | 1.900 (0.002) | 0.75 | 1.500 | 0.750 | 0.50 (0.30; 0.20) | 2 | 2 | 2, 2 | 0, 0 | 0, 0 | 0, 0"
    assert f"| seen | diffusion | {line} | 2 |" in text
    assert text.count("\n| seen |") == len(audits.labels("seen"))


def test_samples_are_measured(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One control and one method, on the shape of a donor."""
    (tmp_path / "text.txt").write_bytes(python_reference()[:30_000])
    (tmp_path / "model").mkdir()
    shape = zoo.donors[0].blueprint.config
    assert shape is not None
    monkeypatch.setattr(audits, "SHAPES", {"seen": shape})
    monkeypatch.setattr(audits, "encode_corpus", lambda path, *rest: byte_tokens(Path(path).read_bytes()) % 48)
    monkeypatch.setattr(tasks, "BUDGETS", {"short": 2, "long": 8})
    place = audits.place(zoo.path, tmp_path / "model", tmp_path / "model", tmp_path / "text.txt", tmp_path / "kept")
    Path(place.kept).mkdir(parents=True)
    found = {}
    for label in ("a donor with 5% noise", "normal"):
        one = audits.Sample("seen", label, 0)
        audits.measure(place, one, lambda n: None)
        found[label] = json.loads((Path(place.kept) / one.file).read_text())
    noisy, normal = found.values()
    assert noisy["distance"] < 0.2 < 0.5 < normal["distance"] and noisy["loss"] not in noisy["trained"].values()
    assert noisy["mosaic"] <= noisy["distance"] and set(noisy["trained"]) == {"0.002", "0.006"}
    assert 0 <= noisy["error_iou"] <= 1 and noisy["digest"] != normal["digest"]
    assert noisy["error_iou"] > normal["error_iou"] or noisy["error_same"] > normal["error_same"]
    assert 0.4 < audits.donors_apart(place)["mosaic"] <= audits.donors_apart(place)["median"]


def test_the_memory_of_a_command_is_its_own() -> None:
    held = bytearray(300 << 20)  # what this process holds is not the child's
    small = costs.usage_of([sys.executable, "-S", "-c", "pass"])
    large = costs.usage_of([sys.executable, "-S", "-c", "x = bytearray(100 << 20)"])
    assert small["mib"] < 60 and 90 < large["mib"] - small["mib"] < 130 and len(held)
    told = costs.usage_of([sys.executable, "-S", "-c", "import sys; print('no', file=sys.stderr); sys.exit(2)"])
    assert told == {"refused": "no"}
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        costs.usage_of([sys.executable, "-S", "-c", "1 / 0"])


def test_costs_are_those_of_the_first_target_that_a_method_takes(zoo: Zoo, tmp_path: Path) -> None:
    own, targets = dict(zoo.donors[0].config), {}
    for name, more in (("wide", {"hidden_size": 4096}), ("own", {})):
        targets[name] = tmp_path / name
        targets[name].mkdir()
        (targets[name] / "config.json").write_text(json.dumps(own | more))
    paths, kept = {"zoo": zoo.path, "model": tmp_path}, tmp_path / "kept"
    found = costs.costs(["weight-selection"], targets, paths, tmp_path, kept)
    cost = found["weight-selection"]
    assert cost["target"] == "own" and cost["mib"] > 100 and 0 < cost["fit_seconds"] < cost["seconds"]
    assert costs.costs(["weight-selection"], {}, {}, tmp_path, kept) == found
    assert cost["parameters_per_second"] > 0 and 0 < cost["of_randn"] < 2


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


def test_the_pages_are_those_of_their_figures() -> None:
    found, facts = rows.read(head_start.RUNS), head_start.read_facts()
    whole = scored.Found.of(found, facts)
    for path, mark, make in tables.parts():
        text = path.read_text()
        assert placed(text, mark, make(whole) or "Not measured yet.") == text, (path.name, mark)
    assert tables.details(whole) == tables.DETAILS.read_text()
