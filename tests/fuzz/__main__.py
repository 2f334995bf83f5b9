"""`python -m tests.fuzz --minutes 30`: all readers with fresh seeds, as long as one likes. `make fuzz` calls it.

Prints the counts, and writes every input that failed to a folder: its file, and the verdict beside it.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import tempfile
import time
import warnings
from pathlib import Path

from tests.fuzz.campaign import Count, fuzz
from tests.fuzz.readers import READERS

TURN = 20.0  # seconds for a reader before the next one has its turn
OUTCOMES = ("accepted", "refused")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("readers", nargs="*", default=list(READERS), help=f"of {', '.join(READERS)} [default: all]")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long, over all readers")
    parser.add_argument("--seed", type=int, default=None, help="repeats the run of that seed [default: a fresh one]")
    parser.add_argument(
        "--failures", type=Path, default=Path("fuzz-failures"), help="the folder for inputs that failed"
    )
    parser.add_argument("--table", type=Path, default=None, help="a Markdown file for the counts")
    given = parser.parse_args()
    seed = secrets.randbelow(2**31) if given.seed is None else given.seed
    print(f"seed {seed}")
    counts = _run(given.readers, seed, given.minutes * 60)
    failures = [failure for count in counts.values() for failure in count.failures]
    for number, failure in enumerate(failures):
        path = given.failures / f"{number:04d}-{failure.reader}-{Path(failure.file).name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(failure.data)
        path.with_name(path.name + ".txt").write_text(f"{failure.file}\n{failure.verdict}\n", errors="backslashreplace")
    table = _table(counts, seed)
    print(table)
    if given.table is not None:
        given.table.write_text(table)
    print(f"{len(failures)} inputs failed" + (f"; they are in {given.failures}" if failures else ""))
    return int(bool(failures))


def _run(readers: list[str], seed: int, seconds: float) -> dict[str, Count]:
    """The readers in turns until the time is up. Every turn has seeds of its own."""
    counts = {reader: Count() for reader in readers}
    end, turn = time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory(prefix="headstart-fuzz-") as folder:
        while (left := end - time.monotonic()) > 0:
            share = min(TURN, max(2.0, left / len(readers)))
            for reader in readers:
                found = fuzz(reader, Path(folder) / reader, seed + 7919 * turn, share)
                counts[reader].outcomes += found.outcomes
                counts[reader].failures += found.failures
                print(f"{reader}: {counts[reader].inputs} inputs, {len(counts[reader].failures)} failed", flush=True)
            turn += 1
    return counts


def _table(counts: dict[str, Count], seed: int) -> str:
    lines = [
        f"Damaged files, seed {seed}: accepted, refused in one line, or failed "
        "(a traceback, too much time or memory, a write outside).",
        "",
        "| reader | inputs | accepted | refused | failed |",
        "|---|---|---|---|---|",
    ]
    total: Count = Count()
    for reader, count in [*counts.items(), ("all", total)]:
        known = [count.outcomes[outcome] for outcome in OUTCOMES]
        lines.append(f"| {reader} | {count.inputs:,} | {known[0]:,} | {known[1]:,} | {count.inputs - sum(known):,} |")
        total.outcomes += count.outcomes
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    raise SystemExit(main())
