"""Runs the generator's benchmark and writes its page, benchmarks/results/generator.md.

python -m benchmarks.generator --work DIR --data DATA [--only A-heads B S-carried …] [--hours H]
    trains the donors, generators and controls into DIR, once; runs the comparisons, then the audit; keeps every run in
    benchmarks/results/generator.parquet and the rest in generator.json. An interrupted call continues. On two cores
    A takes an hour and a half, B an hour and S six.
python -m benchmarks.generator --work DIR --data DATA --audit
    only the audit: what the network, the metadata, the noise and the text change, sizes, distances, speed
python -m benchmarks.generator --tables
    writes the page from the committed runs

DATA is a folder of corpora (see benchmarks/README.md).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.generator import audit, page, runs, tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for donors, generators and runs")
    parser.add_argument("--data", type=Path, help="folder of corpora")
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of names of comparisons")
    parser.add_argument("--hours", type=float, default=1000.0, help="start nothing after this time")
    parser.add_argument("--audit", action="store_true", help="only run the audit")
    parser.add_argument("--tables", action="store_true", help="only write the page again")
    a = parser.parse_args()
    if not a.tables:
        if a.work is None or a.data is None:
            parser.error("give --work DIR and --data DATA, or --tables")
        end = time.monotonic() + a.hours * 3600
        if not a.audit:
            for comparison in tasks.comparisons():
                chosen = not a.only or any(comparison.name.startswith(prefix) for prefix in a.only)
                if chosen and time.monotonic() < end:
                    print(comparison.name, flush=True)
                    runs.run_comparison(comparison, a.work, a.data)
        if a.audit or not a.only:
            audit.run(a.work, a.data)
    page.write()


if __name__ == "__main__":
    main()
