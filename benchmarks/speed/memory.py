"""The memory that `generate` needs at a size of real models: results/speed_memory.json.

    python -m benchmarks.speed.memory --donor FOLDER --work WORK     half an hour on two cores

FOLDER is what `benchmarks.speed.large_checkpoint` writes, or any checkpoint of that size. Peaks are of the resident
memory of a command and its children.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import paths

JSON = paths.RESULTS / "speed_memory.json"
SMALLER = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 24,
           "num_key_value_heads": 24, "head_dim": 64}  # fmt: skip
LARGER = {"num_hidden_layers": 28, "intermediate_size": 9000}
LLAMA_70B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
PEAK = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_gb(*words: object) -> float:
    """The peak of a command in gigabytes. RuntimeError with its last line where it fails."""
    command = [sys.executable, "-c", PEAK, sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    code, kibibytes = done.stdout.split()
    if int(code):
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return int(kibibytes) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--donor", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    zoo, out = given.work / "zoo", given.work / "out"
    given.work.mkdir(parents=True, exist_ok=True)
    config = json.loads((given.donor / "config.json").read_text())
    targets = {"smaller": config | SMALLER, "larger": config | LARGER, "70b": LLAMA_70B}
    for name, target in targets.items():
        (given.work / f"{name}.json").write_text(json.dumps(target))
    rows: list[dict[str, Any]] = []

    def note(what: str, wanted: tuple[str, int], *words: object) -> None:
        shutil.rmtree(out, ignore_errors=True)
        reference, megabytes = wanted
        peak = round(peak_gb(*words) * 1000)
        rows.append({"what": what, "megabytes": peak, "reference": reference, "reference_megabytes": megabytes})
        print(json.dumps(rows[-1]), flush=True)

    headstart, two_shards = ("-m", "headstart"), ("two shards", 2000)
    shutil.rmtree(zoo, ignore_errors=True)
    peak_gb(*headstart, "zoo", "add", given.donor, "--zoo", zoo, "--quiet")  # `benchmarks.speed.zoo` measures it
    for method, name in (("normal", "smaller"), ("weight-selection", "smaller"), ("pruning", "smaller"),
                         ("row-column", "smaller"), ("net2wider", "larger")):  # fmt: skip
        words = ("--target", given.work / f"{name}.json", "--method", method, "--zoo", zoo, "--out", out, "--quiet")
        note(f"`generate --method {method}`, a {name} target", two_shards, *headstart, "generate", *words)
    words = ("--target", given.work / "70b.json", "--method", "default", "--out", out, "--plan")
    note("`generate --plan` of a Llama of 70 billion", ("the imports", 380), *headstart, "generate", *words)
    JSON.write_text(json.dumps({"rows": [], "memory": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
