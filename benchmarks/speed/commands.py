"""What the commands cost beside the work that they cannot avoid: results/speed_commands.json.

    python -m benchmarks.speed.commands --donor FOLDER --work WORK [--methods normal …]     ten minutes on one core

FOLDER is a checkpoint in Hugging Face layout, such as SmolLM2-135M. Every number is wall seconds with all threads of
torch, on a machine where nothing else runs. A ratio is the reference's seconds over the command's, or for start-up the
command's over the reference's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import paths
from zoo.targets.blueprint import Blueprint

JSON = paths.RESULTS / "speed_commands.json"
SHRINK = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 6,
          "num_key_value_heads": 2}  # fmt: skip
FITTED = ("normal", "laplace", "student-t", "generalized-normal", "mixture", "histogram", "kde", "hybrid")
LAWS = ("truncated-normal", "permuted", *FITTED)
GROWTHS = ("net2wider", "hypercloning")
TRANSFERS = ("weight-selection", "subcloning", "pruning", "row-column", *GROWTHS)
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


@dataclass(frozen=True)
class Setting:
    """The folders of a measurement."""

    donor: Path
    zoo: Path
    target: Path  # a config.json, smaller than the donor
    grown: Path  # another, larger than the donor
    out: Path  # is removed before each command


def wall_seconds(*words: object, out: Path | None = None) -> float:
    """Seconds of a command. RuntimeError with its last line where it fails."""
    if out is not None:
        shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return time.perf_counter() - start


def least(repeats: int, *words: object, out: Path | None = None) -> float:
    """The least seconds of several runs."""
    return min(wall_seconds(*words, out=out) for _ in range(repeats))


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
    wall_seconds("-m", "headstart", "zoo", "add", setting.donor, "--zoo", setting.zoo, "--quiet")
    references = {
        (draw, target): _reference(setting, target, draw, repeats)
        for draw, target in (("randn", setting.target), ("zeros", setting.target), ("zeros", setting.grown))
    }
    for method in methods:
        target = setting.grown if method in GROWTHS else setting.target
        words = ("generate", "--target", target, "--method", method, "--zoo", setting.zoo, "--out", setting.out)
        first = wall_seconds("-m", "headstart", *words, "--quiet", out=setting.out)  # keeps config and fit
        started = least(repeats, "-c", START_UP, *words, out=setting.out)
        note(f"start-up of `{method}`", started, "`import torch`", torch, started / torch, "at most 1.5")
        whole = least(repeats, "-m", "headstart", *words, "--quiet", out=setting.out)
        name = "read the donor, randn and save the target" if method in LAWS else "read the donor, save the target"
        reference = references["randn" if method in LAWS else "zeros", target]
        wanted = f"at least {TARGETS.get(method, 0.25)}"
        note(f"`{method}`, without start-up", whole - started, name, reference, reference / (whole - started), wanted)
        if method in FITTED:
            note(f"the fit of `{method}`", first - whole, name, reference, reference / max(first - whole, 0.01), "–")
    return rows


def _reference(setting: Setting, target: Path, draw: str, repeats: int) -> float:
    """Seconds of reading the donor, drawing (or not) and saving the tensors of a target, without the imports."""
    shapes, saved = setting.out.with_suffix(".shapes"), setting.out.with_suffix(".safetensors")
    shapes.write_text(json.dumps({spec.name: spec.shape for spec in Blueprint.from_config(target).specs}))
    whole, imports = (
        least(repeats, "-c", READ_AND_SAVE, setting.donor, shapes, saved, what) for what in (draw, "nothing")
    )
    return whole - imports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--donor", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=[*LAWS, *TRANSFERS])
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    config = json.loads((given.donor / "config.json").read_text())
    target, grown = given.work / "config.json", given.work / "grown.json"
    target.write_text(json.dumps(config | SHRINK))
    grown.write_text(json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]}))
    setting = Setting(given.donor, given.work / "zoo", target, grown, given.work / "out")
    rows = measure(setting, given.methods, given.repeats)
    JSON.write_text(json.dumps({"rows": rows, "memory": []}, indent=1) + "\n")


if __name__ == "__main__":
    main()
