"""Runs the comparisons of the generator's benchmark and keeps their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.generator.models import control_donor, train_generator, zoo_folder
from benchmarks.generator.tasks import LONGER, seeds
from benchmarks.head_start import rows, tasks
from benchmarks.head_start.tasks import Comparison
from benchmarks.paths import RESULTS
from headstart.compare.compare import compare
from headstart.config import CompareConfig
from zoo.donors.zoo import Zoo

ROWS = RESULTS / "generator.parquet"
SCALES = {"S-carried": (1.0, 4.0, 8.0)}  # of the default, where its rows are not committed already


def run_comparison(comparison: Comparison, work: Path, data: Path | None) -> dict[str, Any]:
    """Runs what a comparison lacks, writes its rows to ROWS and returns its results."""
    generates = "-" not in comparison.task
    if generates:
        paths = train_generator(work, comparison.zoo, data)
    else:
        paths = {"zoo": zoo_folder(work, comparison.zoo, data)}
    out = work / "generator" / comparison.name
    rows.write_run_files(rows.read(ROWS), comparison, out / "runs")
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
                default_scales=SCALES.get(comparison.task, (1.0,)),
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


def _labels(comparison: Comparison, zoo: Path) -> tuple[str, ...]:
    """The methods of a comparison; those of a control from the donor that suits the target."""
    if not comparison.zoo.endswith(LONGER):
        return comparison.methods
    donor = control_donor(Zoo.open(zoo).donors, comparison.target)
    return tuple(f"{method}:donor={donor.name}" for method in comparison.methods)
