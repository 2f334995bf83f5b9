"""results/speed.md from all results/speed_*.json: `python -m benchmarks.speed.page`."""

from __future__ import annotations

import json
from typing import Any

from benchmarks import paths

PAGE = paths.RESULTS / "speed.md"


def page(parts: list[dict[str, Any]]) -> str:
    """The page of parts: {rows: [{what, seconds, reference, reference_seconds, ratio, wanted}],
    memory: [{what, gb, wanted}]}."""
    rows = [
        f"| {r['what']} | {r['seconds']:.2f} | {r['reference']} | {r['reference_seconds']:.2f} | {r['ratio']:.2f} |"
        f" {r['wanted']} |"
        for part in parts
        for r in part["rows"]
    ]
    memory = [f"| {m['what']} | {m['gb']:.2f} | {m['wanted']} |" for part in parts for m in part["memory"]]
    newline = "\n"
    return f"""# What the commands cost

Written by `python -m benchmarks.speed.page` from the results of `benchmarks/speed/` (each module says how it measures).
The donor is SmolLM2-135M in bfloat16; the target has 40 million parameters. A ratio is the reference's seconds over the
command's. Start-up ends where the first weight is read or written, in the second run of a config; its ratio is the
command's seconds over the reference's. A fit is kept in the zoo, so that it is paid once.

| what | seconds | reference | seconds | ratio | wanted |
|---|---|---|---|---|---|
{newline.join(rows)}

## Memory

Peak resident memory, imports included. The donor has random weights in the shape of SmolLM2-1.7B, 3.4 GB in bfloat16.

| command | GB | to be held at a time |
|---|---|---|
{newline.join(memory)}
"""


def main() -> None:
    files = sorted(paths.RESULTS.glob("speed_*.json"))
    PAGE.write_text(page([json.loads(file.read_text()) for file in files]))


if __name__ == "__main__":
    main()
