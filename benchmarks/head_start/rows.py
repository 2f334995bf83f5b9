"""One row per run, in Parquet: the tables are made from the rows, and an interrupted benchmark continues from them.

`headstart compare` keeps a file per run; a row holds all of it, so the file can be written again.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.head_start.tasks import EARLIER_LABELS, Comparison
from benchmarks.paths import ROOT
from headstart.report.scores import RunResult
from zoo.checkpoints.atomic import replace_file

KEYS = ("task", "target", "text", "budget")
SCHEMA = pa.schema(
    [
        *((key, pa.string()) for key in (*KEYS, "file", "method")),
        ("seed", pa.int64()),
        ("scale", pa.float64()),
        ("lr", pa.float64()),
        ("steps", pa.list_(pa.int64())),
        ("losses", pa.list_(pa.float64())),
        ("max_grad_norm", pa.float64()),
        ("diverged", pa.int64()),
        ("grad_spikes", pa.int64()),
        ("rms_start", pa.list_(pa.float64())),
        ("rms_end", pa.list_(pa.float64())),
        ("init", pa.string()),  # JSON: seconds, donors, novelty
        ("made", pa.string()),  # commit and versions
    ]
)


def to_row(comparison: Comparison, file: str, run: RunResult) -> dict[str, Any]:
    rms = run["activation_rms"]
    flat = {key: run[key] for key in ("method", "seed", "scale", "lr", "steps", "losses", "max_grad_norm", "diverged")}
    return {
        **{key: getattr(comparison, key) for key in KEYS},
        "file": file,
        **flat,
        "grad_spikes": run["grad_spikes"],
        "rms_start": rms["start"],
        "rms_end": rms["end"],
        "init": json.dumps(run["init"]),
        "made": code_version(),
    }


@cache
def code_version() -> str:
    """Commit (`-dirty` if code differs from it), Python and torch. Each row has it, because a benchmark of days may see
    several. Cached, because a process does not read its code again."""
    import platform

    import torch

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT)

    commit = git("rev-parse", "--short=10", "HEAD").stdout.strip() or "unknown"
    dirty = "-dirty" if git("diff", "--quiet", "HEAD", "--", "*.py").returncode == 1 else ""
    return f"{commit}{dirty}, Python {platform.python_version()}, torch {torch.__version__}"


def runs_digest(files: Iterable[str]) -> str:
    """Hash of the names of a comparison's run files. The names are hashes of everything that a run depends on."""
    return hashlib.sha256("\n".join(sorted(files)).encode()).hexdigest()[:16]


def to_run(row: dict[str, Any]) -> RunResult:
    keys = ("method", "scale", "seed", "lr", "steps", "losses", "max_grad_norm", "diverged", "grad_spikes")
    found: RunResult = {key: row[key] for key in keys}
    return found | {
        "activation_rms": {"start": row["rms_start"], "end": row["rms_end"]},
        "init": json.loads(row["init"]),
    }


def read(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist() if path.is_file() else []


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes all rows at once, in an order that does not depend on which run ended first."""
    ordered = sorted(rows, key=lambda r: (*(r[key] for key in KEYS), r["method"], r["seed"], r["scale"], r["lr"]))
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ordered, SCHEMA), buffer, compression="zstd")
    replace_file(path, buffer.getvalue())


def of_comparison(rows: Sequence[dict[str, Any]], comparison: Comparison) -> list[dict[str, Any]]:
    return [r for r in rows if all(r[key] == getattr(comparison, key) for key in KEYS)]


def write_run_files(rows: Sequence[dict[str, Any]], comparison: Comparison, runs: Path) -> None:
    """Writes the missing run files of a comparison. `compare` continues from those whose names match its own runs and
    ignores the others."""
    for r in of_comparison(rows, comparison):
        path = runs / r["file"]
        if not path.exists():
            replace_file(path, (json.dumps(to_run(r)) + "\n").encode())


def replace_comparison(
    rows: Sequence[dict[str, Any]], comparison: Comparison, runs: Path, files: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """`rows` with those of this comparison replaced by the contents of its run files: all files, or those in `files`,
    because files of earlier donors or settings may remain. Rows of EARLIER_LABELS stay."""
    before = {r["file"]: r for r in of_comparison(rows, comparison)}
    kept = {file: r for file, r in before.items() if r["method"] in EARLIER_LABELS}
    names = sorted(path.name for path in runs.glob("*.json")) if files is None else files
    paths = [runs / name for name in names if name not in kept]
    found = [before.get(path.name) or to_row(comparison, path.name, json.loads(path.read_text())) for path in paths]
    others = [r for r in rows if any(r[key] != getattr(comparison, key) for key in KEYS)]
    return [*others, *kept.values(), *found]
