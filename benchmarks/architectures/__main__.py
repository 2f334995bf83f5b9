"""`python -m benchmarks.architectures`, or `make walk`: every architecture through every transfer method, as a page."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks.architectures.table import write_page
from benchmarks.architectures.walk import Row, architectures, set_up_process, walk_architecture

ROWS = Path("build/walk.jsonl")  # of an interrupted walk
PAGE = Path("benchmarks/results/architectures.md")


def main() -> int:
    """Walks, resuming an interrupted walk, and writes the page. The exit code is 1 where a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", help="model types to walk; then no page is written")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    args = parser.parse_args()
    set_up_process()
    rows: list[Row] = []
    if not args.architectures and ROWS.is_file():
        rows = [json.loads(line) for line in ROWS.read_text().splitlines() if line.endswith("}")]
        print(f"{len(rows)} architectures are done already ({ROWS}; remove it to start again)")
    done = {(row["kind"], row["architecture"]) for row in rows}
    todo = [pair for pair in architectures() if pair not in done]
    if args.architectures:
        todo = [pair for pair in todo if pair[1] in args.architectures]
    ROWS.parent.mkdir(exist_ok=True)
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(args.workers, set_up_process, maxtasksperchild=20) as pool:
        for i, row in enumerate(pool.imap_unordered(walk_architecture, todo), 1):
            rows.append(row)
            print(f"[{i}/{len(todo)}, {time.monotonic() - start:.0f} s] {_progress(row)}", flush=True)
            if not args.architectures:
                with ROWS.open("a") as f:
                    f.write(json.dumps(row) + "\n")
    failed = sum(not cell["ok"] for row in rows for cell in row.get("cells", {}).values())
    if not args.architectures:
        versions = f"transformers {version('transformers')} and torch {version('torch').partition('+')[0]}"
        PAGE.write_text(write_page(rows, versions))
        ROWS.unlink(missing_ok=True)
        print(f"{PAGE}: {len(rows)} architectures, {failed} cells failed")
    return int(failed > 0)


def _progress(row: dict[str, object]) -> str:
    name = f"{row['kind']} {row['architecture']}"
    if "reason" in row:
        return f"{name}: not built: {row['reason']}"
    cells = row["cells"]
    assert isinstance(cells, dict)
    failed = [f"{column}: {cell['text']}" for column, cell in cells.items() if not cell["ok"]]
    return f"{name}: " + ("; ".join(failed) or f"{len(cells)} cells ({row['seconds']} s)")


if __name__ == "__main__":
    sys.exit(main())
