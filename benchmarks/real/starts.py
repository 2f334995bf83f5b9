"""Every method at step 0 on really trained donors: results/real_starts.md.

    python -m benchmarks.real.starts --models MODELS --data DATA [--work DIR] [--only smollm2/smaller …]

MODELS: a folder of smollm2 and gemma3, checkpoints with their tokenizers; DATA: a folder of corpora. It resumes. All of
it takes about two and a half hours of one core, one of them `learned-pruning`. Memory is that of `headstart generate`,
and of the target in float32.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.facts import read_facts, write_facts
from benchmarks.head_start.costs import process_usage
from benchmarks.head_start.tasks import language_model_methods
from benchmarks.pages import cells
from benchmarks.paths import RESULTS
from benchmarks.real.models import (
    DONORS,
    SEQUENCE,
    TARGETS,
    WINDOWS,
    RealTarget,
    held_out_windows,
    loss_of_folder,
    target_folder,
    training_text,
)
from headstart import samplers
from zoo.training.loop import reproducible

FACTS, PAGE = RESULTS / "real_starts.json", RESULTS / "real_starts.md"
TRAINED = ("autoencoder", "diffusion")  # need a model that is trained on the donor
CUT = ("weight-selection", "pruning", "subcloning", "sliced", "row-column", "retrieval")
GROWN = ("net2wider", "hypercloning", "stacking", "row-column", "retrieval")
WITH_TEXT = ("sliced:text", "pruning:text", "subcloning:text")
OTHERS = {  # of each target, beside the default; all methods are measured on `smaller`
    "own": ("normal", "permuted", *CUT, *GROWN[:3]),
    "untied": (*CUT, *WITH_TEXT),
    "shallower": (*CUT, "pruning:text"),
    "gqa": ("net2wider", "row-column", "retrieval", "weight-selection"),
    "deeper": GROWN,
    "wider": GROWN,
}
TELLING = ("normal", "weight-selection", "pruning", "subcloning", "sliced", "row-column", "net2wider", "stacking")


def labels(donor: str, target: str) -> list[str]:
    """The methods that are measured, with `:text` where a method reads one."""
    if target == "smaller" and donor == "smollm2":
        own = [name for name in language_model_methods() if name not in TRAINED and name != "learned-pruning"]
        return [*own, *WITH_TEXT, "learned-pruning:text"]
    if donor == "gemma3":
        return ["default", *TELLING, "pruning:text"]
    return ["default", *OTHERS[target]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/real"))
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of DONOR/TARGET/METHOD")
    given = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for donor, target, label in cases(given.only):
        facts = read_facts(FACTS)
        found = facts.setdefault(donor, {}).setdefault(target.name, {})
        if label not in found:
            found[label] = measure(donor, target, label, given)
            print(donor, target.name, label, found[label], flush=True)
            write_facts(FACTS, facts)
    PAGE.write_text(page(read_facts(FACTS)))


def cases(only: list[str]) -> Iterator[tuple[str, RealTarget, str]]:
    for donor, targets in TARGETS.items():
        for target in targets:
            for label in labels(donor, target.name):
                name = f"{donor}/{target.name}/{label}"
                if not only or any(name.startswith(prefix) for prefix in only):
                    yield donor, target, label


def measure(donor: str, target: RealTarget, label: str, given: argparse.Namespace) -> dict[str, Any]:
    """{loss, seconds, cpu_seconds, mib} of `headstart generate`, or {refused: its message}."""
    method, _, reads = label.partition(":")
    folder = target_folder(given.models, donor, target, given.work)
    command = [sys.executable, "-m", "headstart", "generate", "--target", str(folder), "--method", method, "--quiet"]
    if samplers.get(method).needs:
        command += ["--donor", str(given.models / donor)]
    if reads:
        command += ["--text", str(training_text(given.data, given.work))]
    with tempfile.TemporaryDirectory(dir=given.work) as scratch:
        out = Path(scratch) / "out"
        found = process_usage([*command, "--out", str(out)])
        if "refused" in found:
            return {"refused": found["refused"].splitlines()[-1]}
        with reproducible():
            loss = loss_of_folder(out, held_out_windows(given.data, given.models, donor))
    return {"loss": loss if math.isfinite(loss) else None} | {name: round(value, 1) for name, value in found.items()}


def page(facts: dict[str, Any]) -> str:
    """The page. facts: donor -> target -> label -> what `measure` returns."""
    sections = []
    for donor, targets in facts.items():
        for target in TARGETS[donor]:
            if target.name in targets:
                rows = [[f"`{label}`", *row(found)] for label, found in ranked(targets[target.name])]
                table = cells.table(["method", "loss", "CPU seconds", "peak memory, MiB"], rows)
                sections.append(f"## {DONORS[donor].title}, {target.name}: {target.about}\n\n{table}")
    return f"""# Starts from real donors

Written by `python -m benchmarks.real.starts`. Each method fills a target from one really trained donor with its
default settings. **loss**: nats per token before any training, on {WINDOWS * SEQUENCE:,} tokens of held-out WikiText.
**CPU seconds** and **peak memory**: of `headstart generate` with one thread, with the start of Python. `:text`: the
method reads the other part of WikiText. The donors' weights come from 4-bit files, so that their losses are a little
higher than those of the models on the hub. Windows begin with Gemma's token for a start, because it expects one.

{(chr(10) * 2).join(sections)}
"""


def ranked(found: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(found.items(), key=lambda item: (item[1].get("loss") is None, item[1].get("loss") or 0.0))


def row(found: dict[str, Any]) -> list[str]:
    if "refused" in found:
        return [f"refused: {found['refused']}", cells.MISSING, cells.MISSING]
    loss = "not finite" if found["loss"] is None else f"{found['loss']:.3f}"
    return [loss, f"{found['cpu_seconds']:.0f}", f"{found['mib']:,.0f}"]


if __name__ == "__main__":
    main()
