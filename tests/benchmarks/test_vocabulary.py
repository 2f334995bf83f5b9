"""The page of targets with another tokenizer: its numbers are those of the committed runs."""

from __future__ import annotations

import json

from benchmarks import paths
from benchmarks.vocabulary.table import write_page
from zoo.vocabularies.build import DEFAULT_RULE

RUNS = json.loads((paths.RESULTS / "vocabulary.json").read_text())


def test_the_page_is_written_from_the_committed_runs() -> None:
    committed = (paths.RESULTS / "vocabulary.md").read_text()
    without_version = [line for line in committed.splitlines() if "with torch" not in line]
    assert [line for line in write_page(RUNS).splitlines() if "with torch" not in line] == without_version


def test_the_default_rule_is_within_the_spread_of_the_best() -> None:
    for pair in ("stories260K to BPE of 1,000", "stories260K to BPE of 4,000"):
        best: dict[str, float] = {}
        for key, values in RUNS.items():
            run = json.loads(key)
            if run["pair"] == pair and run["seed"] == 0 and run["lr"] is not None:
                best[run["variant"]] = min(best.get(run["variant"], 99.0), values["final"])
        assert best[DEFAULT_RULE] < min(best.values()) + 0.03 and best[DEFAULT_RULE] < best["match"] - 0.5
