"""Runs the comparisons and the audits of the benchmark, and keeps what they measured.

Every comparison is a call of `headstart compare`, whose page is written to WORK/comparisons.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import facts as facts_file
from benchmarks.head_start import costs, donor_losses, models, rows, tasks
from benchmarks.head_start.results import AUDIT_NAMES, Facts
from benchmarks.head_start.tasks import Comparison
from benchmarks.novelty import audits
from benchmarks.paths import RESULTS
from headstart.compare.compare import compare
from headstart.compare.starts import donor_facts
from headstart.config import CompareConfig
from headstart.versions import package_versions
from zoo.donors.zoo import Zoo

RUNS = RESULTS / "head_start.parquet"
FACTS = RESULTS / "facts.json"
RECORDED_KEYS = ("target", "parameters", "corpus", "steps", "batch_size", "sequence", "windows", "refused")
SMALL_STEPS = 600  # training steps of the diffusion with --small


def run_all(work: Path, data: Path | None, only: Sequence[str], end: float | None) -> None:
    """Runs every selected comparison and audit that is not done; starts nothing after `end`, a monotonic time."""

    def in_time() -> bool:
        return end is None or time.monotonic() < end

    for comparison in tasks.comparisons():
        if is_selected(comparison, data, only) and in_time():
            print(comparison.name, flush=True)
            record_facts(run_comparison(comparison, work, data), comparison, work, data)
    for name in AUDIT_NAMES:
        if (name in only or not only) and in_time():
            print(name, flush=True)
            measured = AUDITS[name](work, data)
            paths = models.work_paths(work, "embedded")
            measured["made_from"] = audits.content_hash(paths["zoo"], paths["model"])
            facts = read_facts()
            write_facts(facts | {name: with_earlier_labels(measured, facts.get(name, {}))})


def is_selected(comparison: Comparison, data: Path | None, only: Sequence[str]) -> bool:
    """Whether a call asks for a comparison and has the data for it."""
    if data is None and (comparison.zoo == "real" or comparison.text not in ("reference", "source")):
        return False
    return not only or any(comparison.name.startswith(prefix) for prefix in only)


def run_comparison(comparison: Comparison, work: Path, data: Path | None, small: bool = False) -> dict[str, Any]:
    """Runs what a comparison lacks and returns its results. The rows go to RUNS; those of a small one to `work`."""
    paths = models.prepare_models(work, comparison.zoo, data, **({"steps": SMALL_STEPS} if small else {}))
    corpus = tasks.corpus_file(work, comparison.text, data)
    out = work / "comparisons" / comparison.name
    table = work / "runs.parquet" if small else RUNS
    rows.write_run_files(rows.read(table), comparison, out / "runs")
    files: list[str] | None = None
    try:
        config = CompareConfig(
            target=tasks.target_folder(work, comparison, data),
            methods=tuple(comparison.methods or tasks.method_labels(comparison.zoo)),
            corpus=corpus,
            out=out,
            zoo=paths["zoo"],
            model=paths["model"],
            steps=comparison.steps,
            seeds=tuple(tasks.SEEDS),
            lrs=tuple(comparison.lrs),
            default_scales=tuple(tasks.SCALES),
            tuning_seeds=len(tasks.SEEDS) if comparison.budget == "ladder" else tasks.TUNING_SEEDS,
            batch_size=tasks.BATCH_SIZE,
            sequence=tasks.SEQUENCE,
            windows=tasks.WINDOWS,
            keep_going=True,
            device="cpu",
        )
        results = compare(config, command=f"python -m benchmarks.head_start{' --small' if small else ''}")
        files = results["runs"]
    finally:  # an interrupted comparison keeps its finished runs
        rows.write(table, rows.replace_comparison(rows.read(table), comparison, out / "runs", files))
    return results


def record_facts(results: dict[str, Any], comparison: Comparison, work: Path, data: Path | None) -> None:
    """Adds to FACTS what the rows do not hold: what was compared, by which versions, and which methods refused."""
    facts = read_facts()
    facts["versions"] = package_versions() | {"python": platform.python_version()}
    facts["cores"] = os.cpu_count()
    zoo = Zoo.open(models.work_paths(work, comparison.zoo)["zoo"])
    facts.setdefault("zoos", {})[comparison.zoo] = [donor_facts(zoo, name) for name in zoo.names]
    facts.setdefault("trained", {})[comparison.zoo] = models.total_seconds(work, comparison.zoo)
    content = audits.content_hash(*(models.work_paths(work, comparison.zoo)[key] for key in ("zoo", "model")))
    facts.setdefault("made_from", {})[comparison.zoo] = content
    stored = rows.of_comparison(rows.read(RUNS), comparison)
    about = {key: results[key] for key in RECORDED_KEYS} | {
        "runs": rows.runs_digest(r["file"] for r in stored),
        "made_from": content,
    }
    before = facts.get("comparisons", {}).get(comparison.name, {"refused": {}})["refused"]
    about["refused"] = {k: why for k, why in before.items() if k in tasks.EARLIER_LABELS} | about["refused"]
    target = tasks.target_folder(work, comparison, data)
    about["as_they_are"] = donor_losses.donor_losses(zoo, target, tasks.corpus_file(work, comparison.text, data))
    facts.setdefault("comparisons", {})[comparison.name] = about
    write_facts(facts)


def with_earlier_labels(measured: dict[str, Any], before: Facts) -> dict[str, Any]:
    """An audit, with what an earlier one measured of EARLIER_LABELS that the new one lacks."""
    kept = dict(measured)
    for key in ("methods", "models"):  # label -> measurement
        found = {k: v for k, v in before.get(key, {}).items() if k in tasks.EARLIER_LABELS}
        kept |= {key: found | measured[key]} if key in measured else {}
    if "samples" in measured:  # [{label, …}]
        new = {sample["label"] for sample in measured["samples"]}
        lacking = set(tasks.EARLIER_LABELS) - new
        kept["samples"] = measured["samples"] + [s for s in before.get("samples", []) if s["label"] in lacking]
    return kept


def audit_novelty(work: Path, data: Path | None) -> dict[str, Any]:
    audit_peers(work, data)  # their samples are audited too
    paths, corpus = models.work_paths(work, "embedded"), tasks.corpus_file(work, "reference", data)
    trained = _peers_folder(work) / "models"
    return audits.run_audit(audits.audit_inputs(paths["zoo"], paths["model"], trained, corpus, work / "novelty"))


def audit_costs(work: Path, data: Path | None) -> dict[str, Any]:
    paths = models.prepare_models(work, "embedded", data)
    long = [c for c in tasks.comparisons() if (c.task, c.budget) == ("A", "long") and not c.methods]
    targets = {c.target: tasks.target_folder(work, c, data) for c in long}
    cache = work / "costs" / audits.content_hash(paths["zoo"], paths["model"])
    methods, corpus = tasks.language_model_methods(), tasks.corpus_file(work, "reference", data)
    return {"methods": costs.measure_costs(methods, targets, paths, corpus, cache)}


def audit_peers(work: Path, data: Path | None) -> dict[str, Any]:
    """Published generators beside ours, with as many parameters and seconds of training. Keeps earlier measurements."""
    from benchmarks.peers import measure as peer_measure

    paths = models.prepare_models(work, "embedded", data)
    seconds = models.total_seconds(work, "embedded")
    if seconds is None:
        raise SystemExit(
            f"{work}: the diffusion's training was interrupted, so its duration is unknown; give another --work"
        )
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # then a second of the peers' clock is a second of work, as for ours
    try:
        opened = Zoo.open(paths["zoo"])
        tokens = peer_measure.held_out_tokens(tasks.corpus_file(work, "reference", data), opened)
        folder, target = _peers_folder(work), tasks.UNSEEN_TARGETS[tasks.MAIN_TARGET]
        return peer_measure.measure(
            peer_measure.PeerMeasurement(
                opened, paths["model"], tokens, target, folder, seconds, seeds=tasks.SEEDS, quiet=False
            )
        )
    finally:
        torch.set_num_threads(before)


def _peers_folder(work: Path) -> Path:
    """The folder of peers trained on these donors for as long as this diffusion."""
    paths = models.work_paths(work, "embedded")
    return work / "peers" / audits.content_hash(paths["zoo"], paths["model"])


AUDITS = {"novelty": audit_novelty, "cost": audit_costs, "peers": audit_peers}


def read_facts() -> dict[str, Any]:
    return facts_file.read_facts(FACTS)


def write_facts(facts: dict[str, Any]) -> None:
    facts_file.write_facts(FACTS, facts, allow_nan=False)
