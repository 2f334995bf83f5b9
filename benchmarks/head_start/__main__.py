"""Runs the benchmark and writes its pages.

python -m benchmarks.head_start --work DIR [--data DIR] [--only A-gqa …] [--hours H]
    trains the donors and our models of them into DIR, once; runs the comparisons and audits; keeps every run in
    benchmarks/results/head_start.parquet and the rest in facts.json; writes the tables. An interrupted call
    continues. Without --data (a folder of real models and texts) C and Shakespeare are left out.
python -m benchmarks.head_start --work DIR --small
    one target, the eight strongest methods, two learning rates: a quarter of an hour on two cores, into DIR
python -m benchmarks.head_start --tables
    writes benchmarks/results/tables.md, the figures and the generated parts of other pages from the committed runs
python -m benchmarks.head_start --details
    writes benchmarks/results/details.md, which git ignores
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.head_start import benchmark, rows, tasks
from benchmarks.pages import write


def main() -> None:
    a = _parse_arguments()
    if not (a.tables or a.details):
        rows.code_version()  # before the code can change under a run of days
        if a.small:
            benchmark.run_comparison(tasks.small_comparison(), a.work, a.data, small=True)
            print(a.work / "comparisons" / tasks.small_comparison().name / "report.html")
            return
        end = None if a.hours is None else time.monotonic() + a.hours * 3600
        benchmark.run_all(a.work, a.data, a.only, end)
    content = rows.read(benchmark.RUNS), benchmark.read_facts()
    if a.details:
        write.write_details(*content)
    else:
        write.write_tables(*content)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for donors, models and runs")
    parser.add_argument("--data", type=Path, help="folder of real models and texts")
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of names of comparisons, or names of audits")
    parser.add_argument("--hours", type=float, help="start nothing after this time")
    parser.add_argument("--small", action="store_true", help="one target, eight methods, two learning rates")
    parser.add_argument("--tables", action="store_true", help="only write the tables again")
    parser.add_argument("--details", action="store_true", help="only write the page of details")
    arguments = parser.parse_args()
    if arguments.work is None and not (arguments.tables or arguments.details):
        parser.error("give --work DIR, --tables or --details")
    return arguments


if __name__ == "__main__":
    main()
