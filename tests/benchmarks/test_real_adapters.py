"""The page of LoRA initialisations on a real model: its numbers are those of the committed runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import paths
from benchmarks.real.adapters_page import best_lr, paired_answers, write_page

FACTS = json.loads((paths.RESULTS / "real_adapters.json").read_text())


def test_the_page_is_written_from_the_committed_runs() -> None:
    assert write_page(FACTS) == (paths.RESULTS / "real_adapters.md").read_text()


def test_every_committed_run_starts_at_the_loss_of_the_base() -> None:
    for run in FACTS["runs"]:
        assert run["before"] == pytest.approx(FACTS["base"]["losses"][: len(run["before"])], abs=2e-5), run["init"]
        assert sum(run["losses"]) < sum(FACTS["base"]["losses"]), run["init"]


def test_answers_are_paired_by_question() -> None:
    assert paired_answers([1, 1, 0, 0, 0], [1, 0, 1, 1, 0]) == (1, 2, pytest.approx(1.0))
    assert paired_answers([0] * 6, [1] * 5 + [0]) == (0, 5, pytest.approx(2 / 2**5))
    assert paired_answers([1, 0], [1, 0]) == (0, 0, 1.0)


def run(init: str, seed: int, lr: float, losses: list[float]) -> dict[str, Any]:
    seconds = {"start": 2.0, "training": 9.0}
    return {"init": init, "seed": seed, "lr": lr, "before": [5.0], "losses": losses, "cpu_seconds": seconds}


def test_differences_are_paired_by_window_at_the_best_rate_of_each() -> None:
    runs = [
        run("default", 0, 1e-3, [4.0, 2.0]), run("default", 0, 1e-2, [9.0, 9.0]), run("default", 1, 1e-3, [4.2, 2.2]),
        run("pissa", 0, 1e-3, [3.9, 2.0]), run("pissa", 0, 1e-2, [3.0, 1.0]), run("pissa", 1, 1e-2, [3.2, 1.2]),
    ]  # fmt: skip
    assert best_lr(runs, "default", 0) == 1e-3 and best_lr(runs, "pissa", 0) == 1e-2
    answers = {
        "default, seed 0": {"lr": 1e-3, "ARC-easy": [1, 0, 0, 0]},
        "pissa, seed 0": {"lr": 1e-2, "ARC-easy": [1, 1, 0, 1]},
    }
    settings = {"rank": 8, "steps": 20, "batch_size": 2, "sequence": 128, "windows": 2}
    page = write_page({"settings": settings, "base": {"losses": [5.0, 5.0]}, "runs": runs, "answers": answers})
    assert "| `pissa` | 2.1000 | -1.0000 [-1.0000, -1.0000] | 0.01 | 2 |" in page
    assert "| `default`: PEFT's own, B zero | 3.1000 | – | 0.001 | 2 |" in page
    assert page.index("`pissa`") < page.index("`default`: PEFT's own, B zero |")
    assert "| `pissa, seed 0` | 0.750 | +2 −0, p = 0.50 |" in page and "2 seeds" in page
