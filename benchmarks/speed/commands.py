"""What the commands cost beside the work that they cannot avoid: results/speed.md.

    python -m benchmarks.speed.commands --donor FOLDER --work WORK [--methods normal …]     ten minutes on one core

FOLDER is a checkpoint in Hugging Face layout, such as SmolLM2-135M. Every number is CPU seconds of a process of one
thread, which load on the machine changes little. A ratio is the reference's seconds over the command's, or for
start-up the command's over the reference's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import paths
from zoo.targets.blueprint import Blueprint

PAGE = paths.RESULTS / "speed.md"
SHRINK = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 6,
          "num_key_value_heads": 2}  # fmt: skip
LAWS = ("normal", "truncated-normal", "permuted", "laplace", "student-t", "mixture", "histogram", "kde", "hybrid")
TRANSFERS = ("weight-selection", "subcloning", "pruning", "row-column")
TARGETS = {**dict.fromkeys(LAWS, 0.25), **dict.fromkeys(("normal", "truncated-normal", "permuted"), 0.6)}
TARGETS |= dict.fromkeys(TRANSFERS, 0.5)

# Ends the process where the first weight would be read or written.
START_UP = """
import os, sys
from zoo.checkpoints.checkpoint import Checkpoint
Checkpoint.read = lambda *a: os._exit(0)
import zoo.checkpoints.writer as writer
writer.allocate_shards = lambda *a, **k: os._exit(0)
from headstart.cli import main
main()
"""
READ_AND_SAVE = """
import json, sys, torch
from safetensors import safe_open
from safetensors.torch import save_file
donor, shapes, out, draw = sys.argv[1:]
if draw != "nothing":
    with safe_open(donor + "/model.safetensors", "pt") as f:
        for name in f.keys():
            f.get_tensor(name).float()
    make = torch.randn if draw == "randn" else torch.zeros
    save_file({name: make(shape).bfloat16() for name, shape in json.load(open(shapes)).items()}, out)
"""
COPY_AND_HASH = """
import hashlib, shutil, sys
shutil.copy(sys.argv[1] + "/model.safetensors", sys.argv[2])
with open(sys.argv[2], "rb") as f:
    hashlib.file_digest(f, "sha256")
"""


@dataclass(frozen=True)
class Setting:
    """The folders of a measurement."""

    donor: Path
    zoo: Path
    target: Path  # a config.json
    out: Path  # is removed before each command


def cpu_seconds(*words: object, out: Path | None = None) -> float:
    """CPU seconds of a command with one thread, its children's too. RuntimeError with its output where it fails."""
    if out is not None:
        shutil.rmtree(out, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def least(repeats: int, *words: object, out: Path | None = None) -> float:
    """The least CPU seconds of several runs."""
    return min(cpu_seconds(*words, out=out) for _ in range(repeats))


def measure(setting: Setting, methods: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """[{what, seconds, reference, reference_seconds, ratio, wanted}]; prints each row."""
    rows: list[dict[str, Any]] = []

    def note(what: str, seconds: float, reference: str, reference_seconds: float, ratio: float, wanted: str) -> None:
        rows.append({"what": what, "seconds": seconds, "reference": reference, "reference_seconds": reference_seconds,
                     "ratio": ratio, "wanted": wanted})  # fmt: skip
        print(
            f"{what}: {seconds:.2f} s, {reference}: {reference_seconds:.2f} s, ratio {ratio:.2f} ({wanted})", flush=True
        )

    torch = least(repeats, "-c", "import torch")
    python = least(repeats, "-c", "import hashlib, shutil")
    copied = least(repeats, "-c", COPY_AND_HASH, setting.donor, setting.out.with_suffix(".copy")) - python
    added = least(1, "-m", "headstart", "zoo", "add", setting.donor, "--zoo", setting.zoo, "--quiet", out=setting.zoo)
    present = least(1, "-m", "headstart", "zoo", "add", setting.donor, "--zoo", setting.zoo, "--quiet")
    add = added - present
    note("`zoo add`, without start-up", add, "copy and sha256", copied, copied / add, "at least 0.3")
    shapes, saved = setting.out.with_suffix(".shapes"), setting.out.with_suffix(".safetensors")
    shapes.write_text(json.dumps({spec.name: spec.shape for spec in Blueprint.from_config(setting.target).specs}))
    arguments = (setting.donor, shapes, saved)
    imports, drawn, kept = (
        least(repeats, "-c", READ_AND_SAVE, *arguments, what) for what in ("nothing", "randn", "zeros")
    )
    references = {"laws": drawn - imports, "transfers": kept - imports}
    for method in methods:
        words = ("generate", "--target", setting.target, "--method", method, "--zoo", setting.zoo, "--out", setting.out)
        cpu_seconds("-m", "headstart", *words, "--quiet", out=setting.out)  # what is known of the config is kept
        started = least(repeats, "-c", START_UP, *words, out=setting.out)
        note(f"start-up of `{method}`", started, "`import torch`", torch, started / torch, "at most 1.5")
        whole = least(repeats, "-m", "headstart", *words, "--quiet", out=setting.out)
        kind = "transfers" if method in TRANSFERS else "laws"
        name = "read the donor, save the target" if kind == "transfers" else "read the donor, randn and save the target"
        reference = references[kind]
        wanted = f"at least {TARGETS.get(method, 0.25)}"
        note(f"`{method}`, without start-up", whole - started, name, reference, reference / (whole - started), wanted)
    return rows


def page(rows: list[dict[str, Any]], about: str) -> str:
    """results/speed.md."""
    lines = [
        f"| {r['what']} | {r['seconds']:.2f} | {r['reference']} | {r['reference_seconds']:.2f} | {r['ratio']:.2f} |"
        f" {r['wanted']} |"
        for r in rows
    ]
    return f"""# What the commands cost

Written by `python -m benchmarks.speed.commands`: {about}. CPU seconds of processes with one thread, the least of the
repeats. The ratio is the reference's seconds over the command's; of start-up, until the first weight is read or
written in the second run of a config, it is the command's over the reference's. The laws are fitted each time.

| what | seconds | reference | seconds | ratio | wanted |
|---|---|---|---|---|---|
{chr(10).join(lines)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--donor", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=[*LAWS, *TRANSFERS])
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    config = json.loads((given.donor / "config.json").read_text()) | SHRINK
    target = given.work / "config.json"
    target.write_text(json.dumps(config))
    setting = Setting(given.donor, given.work / "zoo", target, given.work / "out")
    rows = measure(setting, given.methods, given.repeats)
    size = sum(p.stat().st_size for p in given.donor.glob("*.safetensors"))
    shape = f"{SHRINK['num_hidden_layers']} layers of width {SHRINK['hidden_size']}"
    PAGE.write_text(page(rows, f"the donor is {given.donor.name} of {size / 1e6:.0f} MB, the target has {shape}"))


if __name__ == "__main__":
    main()
