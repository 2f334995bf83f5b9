"""results/speed.md from all results/speed_*.json: `python -m benchmarks.speed.page`."""

from __future__ import annotations

import json
from typing import Any

from benchmarks import paths

PAGE = paths.RESULTS / "speed.md"


def page(parts: list[dict[str, Any]]) -> str:
    """The page of parts: {rows: [{what, seconds, reference, reference_seconds, ratio, wanted}],
    memory: [{what, megabytes, reference, reference_megabytes}]}."""
    rows = [
        f"| {r['what']} | {r['seconds']:.2f} | {r['reference']} | {r['reference_seconds']:.2f} | {r['ratio']:.2f} |"
        f" {r['wanted']} |"
        for part in parts
        for r in part["rows"]
    ]
    memory = [
        f"| {m['what']} | {m['megabytes']:,} | {m['reference']} | {m['reference_megabytes']:,} |"
        for part in parts
        for m in part.get("memory", ())
    ]
    newline = "\n"
    return f"""# What the commands cost

Written by `python -m benchmarks.speed.page` from the results of `benchmarks/speed/` (each module says how it measures;
`commands.py` in wall seconds with two threads, the others in CPU seconds with one).
The donor is SmolLM2-135M in bfloat16; the target has 40 million parameters. A ratio is the reference's seconds over the
command's. Start-up ends where the first weight is read or written, in the second run of a config; its ratio is the
command's seconds over the reference's. A fit is kept in the zoo, so that it is paid once.

| what | seconds | reference | seconds | ratio | wanted |
|---|---|---|---|---|---|
{newline.join(rows)}

## Memory

Peak resident memory; the imports alone take 380 MB. The donor has random weights in the shape of SmolLM2-1.7B, 3.4 GB
in bfloat16, the largest tensor 201 MB. `analyze` has the first three of its layers, because all take hours.

| command | MB | beside | MB |
|---|---|---|---|
{newline.join(memory)}
"""


def main() -> None:
    files = sorted(paths.RESULTS.glob("speed_*.json"))
    PAGE.write_text(page([json.loads(file.read_text()) for file in files]))


if __name__ == "__main__":
    main()
