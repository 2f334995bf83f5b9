"""The tables of the READMEs are what the committed figures and the classes say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import convolutions
from benchmarks.head_start.marks import placed
from headstart.samplers import LORA, METHODS

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_name_every_method() -> None:
    for page, mark in (("README.md", "benchmark"), ("baselines/README.md", "methods")):
        table = re.search(f"<!-- {mark} -->\n(.*)\n<!-- /{mark} -->", (ROOT / page).read_text(), re.DOTALL)
        assert table, f"{page} has no {mark}"
        named = {row.split("|")[1].split(",")[0].strip(" `") for row in table[1].splitlines()[2:]}
        assert named == set(METHODS) - (set(LORA) if mark == "benchmark" else set())


def test_the_other_benchmarks_are_shown_as_committed() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert convolutions.table(json.loads(convolutions.RESULTS.read_text())["methods"]) in text
    fits = json.loads((ROOT / "benchmarks" / "results" / "fits.json").read_text())
    for row in fits["rows"]:
        assert f"| {row['method']} | {row['seconds']:.3f} | {row['ratio']:.2f} |" in text
    assert fits["values"] == 1_000_000
    assert max(row["seconds"] for row in fits["rows"] if row["method"] != "auto-fit") < 1


def test_a_readme_without_its_marks_is_refused() -> None:
    with pytest.raises(SystemExit, match="no <!-- benchmark -->"):
        placed("# nothing", "benchmark", "| a |")
