"""Runs the comparisons of the generator's benchmark and keeps their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.generator.models import control_donor, train_generator, zoo_folder
from benchmarks.generator.tasks import LONGER, seeds
from benchmarks.head_start import benchmark, rows, tasks
from benchmarks.head_start.tasks import Comparison
from benchmarks.paths import RESULTS
from headstart.compare.compare import compare
from headstart.config import CompareConfig
from headstart.report.scores import REFERENCE
from zoo.donors.zoo import Zoo

ROWS = RESULTS / "generator.parquet"
SCALES = {"A": (1.0,), "S-carried": (1.0, 4.0, 8.0)}  # of the default; its tuned rows are committed for A and B
USUAL_SCALES = (1.0, 8.0)  # as it is, and the best of the benchmark's scales in most cases


def run_comparison(comparison: Comparison, work: Path, data: Path | None) -> dict[str, Any]:
    """Runs what a comparison lacks, writes its rows to ROWS and returns its results."""
    generates = "-" not in comparison.task
    if generates:
        paths = train_generator(work, comparison.zoo, data)
    else:
        paths = {"zoo": zoo_folder(work, comparison.zoo, data)}
    out = work / "generator" / comparison.name
    known = rows.read(ROWS)
    rows.write_run_files([*known, *default_rows(comparison, known)], comparison, out / "runs")
    files: Sequence[str] | None = None
    try:
        results = compare(
            CompareConfig(
                target=tasks.target_folder(work, comparison, data),
                methods=_labels(comparison, paths["zoo"]),
                corpus=tasks.corpus_file(work, comparison.text, data),
                out=out,
                zoo=paths["zoo"],
                model=paths["model"] if generates else None,
                steps=comparison.steps,
                seeds=seeds(comparison),
                lrs=comparison.lrs,
                default_scales=SCALES.get(comparison.task, USUAL_SCALES),
                tuning_seeds=tasks.TUNING_SEEDS,
                batch_size=tasks.BATCH_SIZE,
                sequence=tasks.SEQUENCE,
                windows=tasks.WINDOWS,
                keep_going=True,
                device="cpu",
            ),
            command="python -m benchmarks.generator",
        )
        files = results["runs"]
    finally:  # an interrupted comparison keeps its finished runs
        rows.write(ROWS, rows.replace_comparison(rows.read(ROWS), comparison, out / "runs", files))
    return results


def default_rows(comparison: Comparison, known: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the default from all comparisons of A, B and S, as rows of this one. Run files are named by what they
    depend on, so that those of the same target, text and steps serve here."""
    trained = [r for r in [*rows.read(benchmark.RUNS), *known] if r["method"] == REFERENCE]
    return [r | {"task": comparison.task} for r in trained if r["task"].partition("-")[0] in ("A", "B", "S")]


def _labels(comparison: Comparison, zoo: Path) -> tuple[str, ...]:
    """The methods of a comparison; those of a control from the donor that suits the target."""
    if not comparison.zoo.endswith(LONGER):
        return comparison.methods
    donor = control_donor(Zoo.open(zoo).donors, comparison.target)
    return tuple(f"{method}:donor={donor.name}" for method in comparison.methods)
