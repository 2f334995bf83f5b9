"""The tables of the READMEs are what the committed figures and the classes say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import convolutions
from benchmarks import methods as benchmark
from headstart.methods import LORA, METHODS

ROOT = Path(__file__).resolve().parents[1]


def between(path: Path, mark: str) -> str:
    found = re.search(f"<!-- {mark} -->\n(.*)\n<!-- /{mark} -->", path.read_text(), re.DOTALL)
    assert found, f"{path} has no {mark}"
    return found[1]


def test_the_table_of_all_methods_is_that_of_the_committed_figures() -> None:
    figures = json.loads(benchmark.RESULTS.read_text())
    table = between(ROOT / "README.md", "benchmark")
    assert table == benchmark.benchmark_table(figures, json.loads(benchmark.CONVOLUTIONS.read_text()))
    named = {row.split("|")[1].split(",")[0].strip() for row in table.splitlines()[2:]}
    assert named == set(METHODS) - set(LORA)
    assert figures["seeds"] == [0, 1, 2] and all(len(m["finals"]) == 3 for m in figures["methods"].values() if m["lr"])


def test_the_list_of_methods_is_that_of_the_classes() -> None:
    assert between(ROOT / "baselines" / "README.md", "methods") == benchmark.method_table()


def test_the_other_benchmarks_are_shown_as_committed() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert convolutions.table(json.loads(convolutions.RESULTS.read_text())["methods"]) in text
    fits = json.loads((ROOT / "benchmarks" / "fits.json").read_text())
    for row in fits["rows"]:
        assert f"| {row['method']} | {row['seconds']:.3f} | {row['ratio']:.2f} |" in text
    assert fits["values"] == 1_000_000
    assert max(row["seconds"] for row in fits["rows"] if row["method"] != "auto-fit") < 1


def test_a_readme_without_its_marks_is_refused() -> None:
    with pytest.raises(SystemExit, match="no <!-- benchmark -->"):
        benchmark.placed("# nothing", "benchmark", "| a |")
