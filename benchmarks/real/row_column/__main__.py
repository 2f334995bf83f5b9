"""Rows and columns of really trained models, and models grown from them (2408.08681).

    python -m benchmarks.real.row_column --models MODELS --data DATA [--only statistics laws growth]

MODELS: a folder of smollm2 and gemma3, checkpoints with their tokenizers. DATA: a folder of models/ and corpora/.
Twenty minutes on one core; it resumes. Writes benchmarks/results/real_row_column.json, .md and two figures.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.facts import read_facts, write_facts
from benchmarks.paths import RESULTS
from benchmarks.real.models import DONORS
from benchmarks.real.row_column.figures import draw_patterns, draw_statistics
from benchmarks.real.row_column.growth import CASES, case_key, measure_growth
from benchmarks.real.row_column.laws import comparisons, measure_comparison
from benchmarks.real.row_column.page import write_page
from benchmarks.real.row_column.statistics import measure_statistics
from headstart.analyze.jobs import to_json_values
from zoo.training.loop import reproducible

FACTS, PAGE = RESULTS / "real_row_column.json", RESULTS / "real_row_column.md"
FIGURES = {"statistics": "real_row_column.png", "patterns": "real_row_column_patterns.png"}
PARTS = ("statistics", "laws", "growth")
DIGITS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/real"))
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for part, key, measure in jobs(given):
        facts = read_facts(FACTS)
        if key not in facts.setdefault(part, {}):
            with reproducible():
                facts[part][key] = to_json_values(measure(), DIGITS)
            print(part, key, str(facts[part][key])[:200], flush=True)
            write_facts(FACTS, facts)
    write_results(read_facts(FACTS))


def jobs(given: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(part, key, what measures it) of all that is asked for."""
    if "statistics" in given.only:
        for name in DONORS:
            yield "statistics", name, partial(measure_statistics, given.models / name)
    if "laws" in given.only:
        for comparison in comparisons(given.models, given.data, given.work):
            yield "laws", comparison.name, partial(measure_comparison, comparison)
    if "growth" in given.only:
        for case in CASES:
            yield "growth", case_key(case), partial(measure_growth, case, given)


def write_results(facts: dict[str, Any]) -> None:
    """The page and the figures."""
    PAGE.write_text(write_page(facts))
    for name, draw in (("statistics", draw_statistics), ("patterns", draw_patterns)):
        (RESULTS / "figures" / FIGURES[name]).write_bytes(draw(facts["statistics"]))


if __name__ == "__main__":
    main()
