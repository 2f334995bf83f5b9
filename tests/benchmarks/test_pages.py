"""The pages of the benchmark: tables of made-up runs, and the committed pages against the committed runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.generator.runs import ROWS as GENERATOR_RUNS
from benchmarks.head_start import benchmark, rows, tasks
from benchmarks.head_start.results import BenchmarkResults
from benchmarks.pages import cells, claims, figures, learning_rates, training_tables, write
from benchmarks.pages.marks import fill_mark
from benchmarks.paths import ROOT
from headstart.report import scores
from headstart.samplers import LORA_METHODS, METHODS
from tests.headstart.compare.test_compare import run


def ladder(*ends: tuple[float, list[float | None]], scale: float = 1.0) -> list[dict[str, Any]]:
    return [
        {"lr": lr, "scale": scale, "seed": seed, "losses": [5.0, end], "diverged": 3 if end is None else None}
        for lr, finals in ends
        for seed, end in enumerate(finals)
    ]


def test_largest_stable_lr() -> None:
    def stable(runs: list[dict[str, Any]], within: float = 0.25) -> str:
        return training_tables.largest_stable_lr(runs, within)

    good = [2.0, 2.1, 2.0]
    assert stable(ladder((2e-3, good), (6e-3, good), (2e-2, [2.2, 2.1, 2.9]))) == "0.006", "every seed, not their mean"
    assert stable(ladder((2e-3, good), (6e-3, [2.0, None, 2.0]), (2e-2, good))) == "0.002", "stops at the first failure"
    assert stable(ladder((2e-3, [3.0] * 3), (6e-3, good), (2e-2, [None] * 3))) == "0.006", "too small is not unstable"
    assert stable(ladder((2e-3, good), (0.2, good))) == "0.2 or more"
    assert stable(ladder((2e-3, [None] * 3))) == "none" and stable([]) == "–"
    two = ladder((2e-3, [2.5] * 3), (2e-2, [2.5] * 3)) + ladder((2e-3, good), (2e-2, [None] * 3), scale=4.0)
    assert stable(two) == "0.002", "at the scale whose best loss is lower"
    apart = ladder((2e-3, [1.0, 2.0, 3.0]), (6e-3, [1.05, 2.05, 3.05]), (2e-2, [1.2, 2.0, 3.0]))
    assert stable(apart, 0.1) == "0.006" and stable(apart) == "0.02", "a seed beside itself"


def test_tables_of_rows(tmp_path: Path) -> None:
    """Of made-up runs, one method of which diverged and one refused."""
    done = [c for c in tasks.comparisons() if c.target == tasks.MAIN_TARGET and c.task == "A" and c.budget != "ladder"]
    found, facts = [], {"comparisons": {}, "cores": 2, "versions": {"torch": "2"}, "made_from": {"embedded": "a"}}
    facts["cost"] = {"methods": {"normal": {"refused": "x"}}, "made_from": "a"}
    facts["zoos"] = {"embedded": [{"parameters": 10, "tokens": 100}]}
    for c in done:
        for name, ends in (("default", 3.0), ("normal", 2.5), ("retrieval", 2.0), (tasks.RETRIEVAL_CONTROLS[0], 2.2)):
            for seed in tasks.SEEDS:
                one = run(name, seed, 1e-3, [5.0, 4.0, ends + seed / 100], scale=1.0)
                found.append(rows.to_row(c, f"{name}-{seed}.json", one))
        broken = run("kde", 0, 1e-3, [5.0], diverged=3)
        broken["activation_rms"]["end"] = None
        found.append(rows.to_row(c, "kde.json", broken))
        facts["comparisons"][c.name] = {
            "made_from": "a", "target": c.config, "parameters": 5, "steps": c.steps, "corpus": {"tokenizer": "bytes"},
            "batch_size": 4, "sequence": 64, "as_they_are": {"a": 2.75, "b": 2.5, "c": None},
            "refused": {"pruning": "/somewhere/zoo: too narrow"},
            "runs": rows.runs_digest(r["file"] for r in rows.of_comparison(found, c)),
        }  # fmt: skip
    facts["trained"] = {"embedded": 330.0}
    made = {mark: make(BenchmarkResults.from_rows(found, facts)) for mark, make in write.TABLE_PARTS.items()}
    page = made["A-reference-long"].splitlines()
    assert (
        page[2].endswith("scale 1\\*; 3.000 at scale 1) |") and page[3] == "| best donor, not trained further | 2.500 |"
    )
    order = [line.split(" | ")[0] for line in page[4:7]]
    assert order == ["| retrieval", f"| {tasks.RETRIEVAL_CONTROLS[0]}", "| normal"]
    assert page[4].startswith("| retrieval | -1.000 ± 0.000, ") and "| kde | diverged |" in page
    assert "| pruning | refused |" in page
    named = {line.split(" | ")[0] for line in page[4:]}
    assert named.isdisjoint({"| mimetic", "| diffusion", "| autoencoder"}), "without a run and not refused"
    assert "\n| diffusion | model | – | – | – |" in made["gains"], "the table of all methods names them"
    assert "+0.200 ± 0.000" in made["conditioning"] and made["B-source-long"] == ""
    assert "\n| normal | – | – | 0 | 0 | 5.00 |" in made["stability"] and "kde" not in made["stability"]
    assert "rows: 26, of 13 different runs" in made["run_counts"] and made["novelty"] == ""
    assert "330 seconds" in made["training_costs"] and "6e+03 FLOPs" in made["training_costs"]
    text = training_tables.details_page(BenchmarkResults.from_rows(found, facts))
    assert "- pruning refused: zoo: too narrow" in text and "| kde | – | – | diverged |" in text
    pictures = figures.draw_figures(BenchmarkResults.from_rows(found, facts).entries)
    assert set(pictures) == {"head_starts"} and pictures["head_starts"][:4] == b"\x89PNG"
    partly = [r for r in found if not (r["method"] == "normal" and r["seed"] == 2)]
    assert training_tables.details_page(BenchmarkResults.from_rows(partly, facts)).count("##") == 0, (
        "a comparison that lacks a run or has one too many is left out"
    )
    dead = [r | {"diverged": 3, "losses": [5.0]} if r["method"] == "default" else r for r in found]
    without = BenchmarkResults.from_rows(dead, facts)
    alone = {mark: make(without) for mark, make in write.TABLE_PARTS.items()}
    assert "| default, tuned | diverged |" in alone["A-reference-long"]
    assert "| normal | 2.510; the default diverged |" in alone["A-reference-long"]
    assert "| default | – | – | diverged |" in training_tables.details_page(without)


def test_method_cells() -> None:
    runs = (
        [run("default", s, 1e-3, [5.0, 4.0, 3.0 + s / 100]) for s in range(3)]
        + [run("fast", s, 1e-3, [4.0, 3.5 - s / 10, 2.0]) for s in range(3)]
        + [run("slow", s, 1e-3, [5.0, 4.5, 3.5]) for s in range(3)]
        + [run("ready", s, 1e-3, [2.0, 2.0, 2.0]) for s in range(3)]
    )
    _, entries = scores.score(runs, budget=100)
    cell = cells.method_cell(entries["fast"], None)
    assert cell.startswith("-1.010 ± 0.025, 1.6× (")
    assert cells.method_cell(entries["slow"], None) == "+0.490 ± 0.025, never"
    assert cells.method_cell(entries["ready"], None).endswith("≥ 100×")
    assert cells.method_cell(None, "too wide") == "refused" and cells.method_cell(None, None) == "–"


@pytest.fixture(scope="module")
def results() -> BenchmarkResults:
    return BenchmarkResults.from_rows(rows.read(benchmark.RUNS), benchmark.read_facts())


def test_the_committed_pages_are_those_of_the_committed_runs(results: BenchmarkResults) -> None:
    assert write.tables_page(results) == write.TABLES.read_text()
    for path, text in write.marked_pages(results):
        assert path.read_text() == text, path.name
    rates = learning_rates.learning_rates_table(results, rows.read(GENERATOR_RUNS))
    assert learning_rates.PATH.read_text() == rates
    assert not re.search(rf"\{{\{{|{write.NOT_MEASURED}", write.TABLES.read_text())


def test_every_table_stands_once_in_the_page() -> None:
    named = re.findall(r"\{\{([\w-]+)\}\}", write.TEMPLATE.read_text())
    assert sorted(named) == sorted([*write.TABLE_PARTS, "contents"])
    page = write.TABLES.read_text()
    anchors = re.findall(r"^ *- \[.+\]\(#(.+)\)$", page, re.MULTILINE)
    assert len(anchors) == len(set(anchors)) == len(re.findall(r"^##", page, re.MULTILINE))


def test_the_tables_name_every_method() -> None:
    def first_cells(text: str) -> set[str]:
        lines = [line for line in text.splitlines() if line.startswith("|")]
        return {line.split("|")[1].split(",")[0].strip(" `") for line in lines[2:]}

    page = write.TABLES.read_text()
    gains = page.partition("## Every method in one line")[2].partition("\n## ")[0]
    assert first_cells(gains) == set(METHODS) - set(LORA_METHODS) | set(tasks.EARLIER_VERSIONS)
    readme = (ROOT / "baselines" / "README.md").read_text()
    assert first_cells(readme.partition("<!-- methods -->")[2].partition("<!-- /methods -->")[0]) == set(METHODS)


def test_the_claims_say_what_the_runs_say(results: BenchmarkResults) -> None:
    """The words around the numbers, which are computed: each statement of direction is checked here."""
    text = claims.claims(results)
    assert text.count("\n\n") == 4 and max(map(len, text.splitlines())) <= 100
    everywhere = {b: [e for t in claims.TEXTS for e in results.comparisons_of(*t, b).values()] for b in tasks.BUDGETS}
    both = everywhere["short"] + everywhere["long"]
    transfer = claims.to_default(both, [label for label in tasks.row_labels() if claims.is_transfer(label)])
    assert transfer.above == 0 and transfer.unresolved == 1, "every shape and text but for one case"
    retrieval = claims.to_default(both, ["retrieval"])
    assert retrieval.below == len(retrieval.values) == 30
    flat = text.replace("\n   ", " ")
    assert "the earlier pipeline, in which a trained network chose the blocks" in flat
    rivals = claims.retrieval_against_best(both)
    assert rivals.above > rivals.below, "it does not beat the best transfer method"
    assert "`gqa` (4) and `deeper` (1)" in flat
    real = results.comparisons_of("C", "stories", "long")
    by_target = {c.target: e for c, e in real.items()}
    assert claims.retrieval_against_best([by_target["between"]]).above == 1
    assert claims.to_default([by_target["narrower"]], ["retrieval"]).unresolved == 1
    assert "retrieval" not in by_target["gpt2"] and claims.to_default([by_target["gpt2"]], ["row-column"]).below == 1
    marginals = [label for label in tasks.language_model_methods() if claims.is_marginal(label)]
    assert len(marginals) == 11
    assert claims.to_default(results.comparisons_of("A", "reference", "long").values(), marginals).below == 0
    assert claims.to_default(both, ["matrix-normal"]).above == 0
    assert claims.to_default(everywhere["long"], ["truncated-normal"]).below == 0
    assert "cases 0 do both" in text.replace("controls", "cases").replace("\n   ", " ") and "and 0 are novel" in text


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(SystemExit, match="no <!-- benchmark -->"):
        fill_mark("# nothing", "benchmark", "| a |")
