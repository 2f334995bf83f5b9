"""Is the similarity of layers a power law in really trained models, and does an adapter follow it (2509.00046)?

    python -m benchmarks.real.singular_vectors --models MODELS

MODELS: a folder of smollm2 and gemma3, checkpoints with their tokenizers. Ten minutes on one core; it resumes. Writes
benchmarks/results/real_singular_vectors.json, .md, and figures/real_singular_vectors.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.facts import read_facts, write_facts
from benchmarks.paths import RESULTS
from benchmarks.real.models import DONORS
from benchmarks.real.singular_vectors.figure import draw_distances
from benchmarks.real.singular_vectors.measure import (
    OWN,
    PAPER,
    PUBLISHED,
    RANKS,
    Stacks,
    compare_layers,
    measure_adapters,
)
from benchmarks.real.singular_vectors.page import write_page
from headstart.analyze.jobs import to_json_values
from zoo.donors.folder import StandaloneDonor
from zoo.statistics.grouping import Grouping
from zoo.training.loop import reproducible

FACTS, PAGE = RESULTS / "real_singular_vectors.json", RESULTS / "real_singular_vectors.md"
FIGURE = RESULTS / "figures" / "real_singular_vectors.png"
BASE = "smollm2"  # the model that adapters are for
DIGITS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    given = parser.parse_args()
    facts: dict[str, Any] = read_facts(FACTS)
    with reproducible():
        measure_all(given.models, facts)
    PAGE.write_text(write_page(facts))
    FIGURE.write_bytes(draw_distances(facts))
    print(PAGE.read_text())


def measure_all(models: Path, facts: dict[str, Any]) -> None:
    """Adds to `facts` what it lacks: {models: donor -> rank -> kind -> `compare_layers`, adapters: reference ->
    `measure_adapters`}. It is stored after every part."""
    for name in DONORS:
        found = facts.setdefault("models", {}).setdefault(name, {})
        missing = [rank for rank in RANKS if str(rank) not in found]
        wants_adapters = [
            r for r in (name, PAPER) if r not in facts.get("adapters", {}) and (r == name or name == BASE)
        ]
        if not missing and not wants_adapters:
            continue
        stacks = Stacks.of_donor(StandaloneDonor.open(str(models / name), quiet=True))
        for rank in missing:
            used = stacks.rank(rank)
            found[str(rank)] = {"rank": used} | {
                kind: compare_layers(own, used) for kind, own in stacks.by_kind.items()
            }
            store(facts)
            print(name, rank, flush=True)
        for reference in wants_adapters:
            own = Grouping.from_json(found["16"][OWN]["grouping"])
            grouping = PUBLISHED if reference == PAPER else own
            adapters = facts.setdefault("adapters", {})
            adapters[reference] = {"grouping": grouping.to_json()} | measure_adapters(
                models / BASE, stacks.by_kind[OWN], grouping
            )
            store(facts)
            print("adapters", reference, flush=True)


def store(facts: dict[str, Any]) -> None:
    write_facts(FACTS, to_json_values(facts, DIGITS))


if __name__ == "__main__":
    main()
