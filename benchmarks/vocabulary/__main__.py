"""Which rule for tokens that a donor does not have is best: results/vocabulary.md.

    python -m benchmarks.vocabulary --data DATA [--models MODELS]     resumes; ten minutes on one core

DATA: a folder of models and corpora (see ../README.md). MODELS: a folder of smollm2 and gemma3, checkpoints with their
tokenizers, for the pairs of real models; without it these rows stay as the page has them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import paths
from benchmarks.facts import read_facts, write_facts
from benchmarks.vocabulary.measure import LRS, OWN, Run, measure, variants
from benchmarks.vocabulary.pairs import Pair, find_pairs
from benchmarks.vocabulary.table import write_page

PAGE, RESULTS = paths.RESULTS / "vocabulary.md", paths.RESULTS / "vocabulary.json"
SEEDS = (0, 1, 2)  # the learning rate is chosen on the first
ONE_SEED = ("omp", "focus")  # trained with one seed, to save time; with three they were behind on the first pair


def runs(pairs: list[Pair], found: dict[str, dict[str, Any]]) -> Iterator[tuple[Pair, Run]]:
    """All runs, each learning rate of the first seed before the other seeds at the best one."""
    for pair in pairs:
        for variant in variants(pair):
            yield pair, Run(pair.name, variant, 0, None)
    for pair in pairs:
        for variant in (v for v in variants(pair) if pair.trains and v != OWN):
            tuning = [Run(pair.name, variant, 0, lr) for lr in LRS]
            yield from ((pair, run) for run in tuning)
            best = min(tuning, key=lambda run: found[run.key()]["final"])
            if variant in ONE_SEED:
                continue
            yield from ((pair, Run(pair.name, variant, seed, best.lr)) for seed in SEEDS[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/vocabulary"))
    given = parser.parse_args()
    found: dict[str, dict[str, Any]] = read_facts(RESULTS)
    for pair, run in runs(find_pairs(given.data, given.models, given.work), found):
        if run.key() not in found:
            found[run.key()] = measure(pair, run)
            print(run, found[run.key()], flush=True)
            write_facts(RESULTS, found)
    PAGE.write_text(write_page(found))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
