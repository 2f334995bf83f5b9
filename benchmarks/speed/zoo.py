"""What filling and checking a zoo costs beside copying and hashing the same bytes, and how much memory it takes.

    python -m benchmarks.speed.zoo --donor FOLDER --work WORK [--large FOLDER]     three minutes on one core

FOLDER is a checkpoint in Hugging Face layout, such as SmolLM2-135M; that of --large may be the one that
`benchmarks.speed.large_checkpoint` writes. Every number is CPU seconds of one process that has imported and started
everything before, with one thread for torch; the two hashes are computed in threads of their own. A ratio is the
reference's seconds over the command's. Memory is what a process takes at most beyond what it takes after the imports.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import paths
from benchmarks.speed.children import in_child, peak_bytes

MODULE = "benchmarks.speed.zoo"


def measure(donor: Path, work: Path, repeats: int = 3) -> list[dict[str, Any]]:
    """[{what, seconds, reference, reference_seconds, ratio, wanted}], in CPU seconds."""
    done = in_child(MODULE, "seconds", donor, work, repeats)
    rows = [
        ("zoo add", "copy and sha256", "at least 0.3"),
        ("zoo add --no-health", "copy and sha256", "at least 0.7"),
        # The record has the hash of each file, the manifest that of each tensor.
        ("zoo add --no-health", "copy and two sha256", ""),
        ("zoo verify", "sha256", ""),
        ("zoo merge", "copy and sha256", ""),
    ]
    return [
        {"what": f"`{what}`, without start-up", "seconds": done[what], "reference": reference,
         "reference_seconds": done[reference], "ratio": done[reference] / done[what], "wanted": wanted}
        for what, reference, wanted in rows
    ]  # fmt: skip


def measure_memory(checkpoint: Path, work: Path) -> list[dict[str, Any]]:
    """[{what, megabytes, reference, reference_megabytes}]: memory beyond the imports, beside the largest tensor."""
    from zoo.checkpoints.checkpoint import Checkpoint

    largest = max(entry.nbytes for entry in Checkpoint.open(checkpoint).entries.values())
    found = {what: in_child(MODULE, what, checkpoint, work) for what in ("zoo add", "zoo verify")}
    return [
        {"what": f"`{what}`, memory beyond the imports", "megabytes": round(peak / 1e6),
         "reference": "the largest tensor", "reference_megabytes": round(largest / 1e6)}
        for what, peak in found.items()
    ]  # fmt: skip


def _child(what: str, checkpoint: Path, work: Path, repeats: int = 1) -> Any:
    from zoo.add import add
    from zoo.donors.verify import verify
    from zoo.filling.merge import merge

    zoo = work / "zoo"
    _warm_up(work)
    if what == "seconds":
        steps: dict[str, Callable[[], object]] = {
            "copy and sha256": lambda: _copy_and_hash(checkpoint, work / "copy"),
            "sha256": lambda: _hash_all(work / "copy"),
            "zoo add --no-health": lambda: add([str(checkpoint)], work / "new", quiet=True, health=False),
            "zoo add": lambda: add([str(checkpoint)], zoo, quiet=True),
            "zoo verify": lambda: verify(zoo),
            "zoo merge": lambda: merge([zoo], work / "merged", quiet=True),
        }
        best = dict.fromkeys(steps, float("inf"))
        for _ in range(repeats):
            for folder in ("copy", "new", "zoo", "merged"):
                shutil.rmtree(work / folder, ignore_errors=True)
            for step, run in steps.items():
                begin = _cpu_seconds()
                run()
                best[step] = min(best[step], _cpu_seconds() - begin)
        return best | {"copy and two sha256": best["copy and sha256"] + best["sha256"]}
    if what == "zoo add":
        shutil.rmtree(zoo, ignore_errors=True)
    before = peak_bytes()
    if what == "zoo add":
        add([str(checkpoint)], zoo, quiet=True)
    elif verify(zoo):
        raise RuntimeError("the zoo is damaged")
    return peak_bytes() - before


def _warm_up(work: Path) -> None:
    """Imports and starts what adding and verifying need, with a tiny donor."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from zoo.add import add
    from zoo.donors.verify import verify

    torch.set_num_threads(1)
    shutil.rmtree(work / "tiny", ignore_errors=True)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    LlamaForCausalLM(config).save_pretrained(work / "tiny" / "donor")
    add([str(work / "tiny" / "donor")], work / "tiny" / "zoo", quiet=True)
    verify(work / "tiny" / "zoo")


def _copy_and_hash(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    _hash_all(target)


def _hash_all(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--donor", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--large", type=Path, help="measure memory on this checkpoint too")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    if given.child:
        what, checkpoint, work, *repeats = given.child
        with contextlib.redirect_stdout(sys.stderr):
            result = _child(what, Path(checkpoint), Path(work), *map(int, repeats))
        print(json.dumps(result))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    rows = measure(given.donor, given.work, given.repeats)
    memory = measure_memory(given.large, given.work) if given.large else []
    for row in (*rows, *memory):
        print(row)
    (paths.RESULTS / "speed_zoo.json").write_text(json.dumps({"rows": rows, "memory": memory}, indent=1) + "\n")


if __name__ == "__main__":
    main()
