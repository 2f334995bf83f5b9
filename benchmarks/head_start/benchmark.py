"""The benchmark: who gives a head start, how large, and is it new?

    python -m benchmarks.head_start --work DIR [--data DIR] [--only A-gqa …] [--hours H]
        trains the donors and the models of them into DIR (once), runs the comparisons and audits, keeps every run in
        benchmarks/results/head_start.parquet and the rest in facts.json, and writes BENCHMARKS.md; goes on where it was
        interrupted. Without --data (a folder of real models and texts) C and Shakespeare are left out. --hours:
        begins nothing after that time.
    python -m benchmarks.head_start --work DIR --small
        one target, the eight strongest methods, two learning rates: a quarter of an hour on two cores, into DIR
    python -m benchmarks.head_start --tables
        writes BENCHMARKS.md and the tables of the READMEs again from the committed figures

Every comparison is a call of `headstart compare`, whose pages stand in DIR/comparisons.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.head_start import costs, donors, rows, scored, tables, tasks
from benchmarks.head_start.tasks import Comparison
from benchmarks.novelty import audits
from benchmarks.paths import RESULTS
from headstart.compare.compare import compare
from headstart.compare.trials import donor_facts
from headstart.versions import package_versions
from zoo.checkpoints.writer import replace_file
from zoo.donors.store import Zoo

RUNS = RESULTS / "head_start.parquet"
FACTS = RESULTS / "facts.json"
KEPT = ("target", "parameters", "corpus", "steps", "batch_size", "sequence", "windows", "refused")
SMALL_STEPS = 600  # of the diffusion's training under --small


def measure(comparison: Comparison, work: Path, data: Path | None, small: bool = False) -> dict[str, Any]:
    """Runs what is missing of a comparison; the rows so far are in RUNS, or in `work` for a small one."""
    paths = tasks.prepare_models(work, comparison.zoo, data, **({"steps": SMALL_STEPS} if small else {}))
    corpus = _corpus(work, comparison.text, data)
    out = work / "comparisons" / comparison.name
    kept = work / "runs.parquet" if small else RUNS
    rows.write_run_files(rows.read(kept), comparison, out / "runs")
    files: list[str] | None = None
    try:
        results = compare(
            tasks.target_folder(work, comparison, data),
            paths["zoo"],
            comparison.methods or tasks.method_labels(comparison.zoo),
            corpus,
            steps=comparison.steps,
            seeds=tasks.SEEDS,
            lrs=comparison.lrs,
            out=out,
            model=paths["model"],
            batch_size=tasks.BATCH_SIZE,
            sequence=tasks.SEQUENCE,
            windows=tasks.WINDOWS,
            default_scales=tasks.SCALES,
            tuning_seeds=len(tasks.SEEDS) if comparison.budget == "ladder" else tasks.TUNING_SEEDS,
            keep_going=True,
            command=f"python -m benchmarks.head_start{' --small' if small else ''}",
        )
        files = results["runs"]
    finally:  # what was finished is kept
        rows.write(kept, rows.replace_comparison(rows.read(kept), comparison, out / "runs", files))
    return results


def keep(results: dict[str, Any], comparison: Comparison, work: Path, data: Path | None) -> None:
    """What the rows do not say, in FACTS: what was compared on what, by which versions, who refused."""
    facts = read_facts()
    facts["versions"] = package_versions() | {"python": platform.python_version()}
    facts["cores"] = os.cpu_count()
    zoo = Zoo.open(tasks.work_paths(work, comparison.zoo)["zoo"])
    facts.setdefault("zoos", {})[comparison.zoo] = [donor_facts(zoo, name) for name in zoo.names]
    facts.setdefault("trained", {})[comparison.zoo] = tasks.training_seconds(work, comparison.zoo)
    own = audits.identity(*(tasks.work_paths(work, comparison.zoo)[key] for key in ("zoo", "model")))
    facts.setdefault("made_from", {})[comparison.zoo] = own
    about = {key: results[key] for key in KEPT} | {"runs": rows.runs_digest(results["runs"]), "made_from": own}
    target = tasks.target_folder(work, comparison, data)
    about["as_they_are"] = donors.untrained_losses(zoo, target, _corpus(work, comparison.text, data))
    facts.setdefault("comparisons", {})[comparison.name] = about
    write_facts(facts)


def novelty(work: Path, data: Path | None) -> dict[str, Any]:
    peers(work, data)  # which are sampled too
    paths, corpus = tasks.work_paths(work, "embedded"), _corpus(work, "reference", data)
    trained = _peers_folder(work) / "models"
    return audits.audit(audits.place(paths["zoo"], paths["model"], trained, corpus, work / "novelty"))


def cost(work: Path, data: Path | None) -> dict[str, Any]:
    paths = tasks.prepare_models(work, "embedded", data)
    long = [c for c in tasks.comparisons() if (c.task, c.budget) == ("A", "long") and not c.methods]
    targets = {c.target: tasks.target_folder(work, c, data) for c in long}
    kept = work / "costs" / audits.identity(paths["zoo"], paths["model"])
    return {
        "methods": costs.costs(tasks.language_model_methods(), targets, paths, _corpus(work, "reference", data), kept)
    }


def peers(work: Path, data: Path | None) -> dict[str, Any]:
    """Published generators beside ours: as many parameters, as many seconds of training. What an earlier call measured
    is kept."""
    from benchmarks.peers import measure as peer

    paths = tasks.prepare_models(work, "embedded", data)
    seconds = tasks.training_seconds(work, "embedded")
    if seconds is None:
        raise SystemExit(f"{work}: the diffusion's training was interrupted, its time is not known; use another --work")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # on which a second of the peers' clock is one of work, as `took` counts them
    try:
        opened = Zoo.open(paths["zoo"])
        tokens = peer.held_out(_corpus(work, "reference", data), opened)
        kept, target = _peers_folder(work), tasks.UNSEEN_TARGETS[tasks.MAIN_TARGET]
        return peer.measure(
            peer.Setup(opened, paths["model"], tokens, target, kept, seconds, seeds=tasks.SEEDS, quiet=False)
        )
    finally:
        torch.set_num_threads(before)


def _peers_folder(work: Path) -> Path:
    """Of peers trained on these donors for as long as this diffusion."""
    paths = tasks.work_paths(work, "embedded")
    return work / "peers" / audits.identity(paths["zoo"], paths["model"])


AUDIT = {"novelty": novelty, "cost": cost, "peers": peers}


def _corpus(work: Path, name: str, data: Path | None) -> Path:
    path = work / "texts" / f"{name}.txt"
    if not path.exists():
        replace_file(path, tasks.corpus_bytes(name, data))
    return path


def read_facts() -> dict[str, Any]:
    return json.loads(FACTS.read_text()) if FACTS.is_file() else {}


def write_facts(facts: dict[str, Any]) -> None:
    replace_file(FACTS, (json.dumps(facts, indent=1, allow_nan=False) + "\n").encode())


def wanted(comparison: Comparison, data: Path | None, only: Sequence[str]) -> bool:
    if data is None and (comparison.zoo == "real" or comparison.text not in ("reference", "source")):
        return False
    return not only or any(comparison.name.startswith(prefix) for prefix in only)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for donors, models and runs")
    parser.add_argument("--data", type=Path, help="folder of real models and texts")
    parser.add_argument("--only", nargs="*", default=[], help="comparisons whose names begin so, or audits")
    parser.add_argument("--hours", type=float, help="begin nothing after that time")
    parser.add_argument("--small", action="store_true", help="one target, eight methods, two learning rates")
    parser.add_argument("--tables", action="store_true", help="only write BENCHMARKS.md again")
    a = parser.parse_args()
    began = time.monotonic()

    def in_time() -> bool:
        return a.hours is None or time.monotonic() - began < a.hours * 3600

    if not a.tables:
        if a.work is None:
            parser.error("give --work DIR, or --tables")
        rows.code_version()
        if a.small:
            measure(tasks.small_comparison(), a.work, a.data, small=True)
            print(a.work / "comparisons" / tasks.small_comparison().name / "report.html")
            return
        for comparison in tasks.comparisons():
            if wanted(comparison, a.data, a.only) and in_time():
                print(comparison.name, flush=True)
                keep(measure(comparison, a.work, a.data), comparison, a.work, a.data)
        for audit in scored.AUDITS:
            if (audit in a.only or not a.only) and in_time():
                print(audit, flush=True)
                found = AUDIT[audit](a.work, a.data)
                paths = tasks.work_paths(a.work, "embedded")
                found["made_from"] = audits.identity(paths["zoo"], paths["model"])
                write_facts(read_facts() | {audit: found})
    tables.write(rows.read(RUNS), read_facts())
