"""What `headstart analyze` costs beside the singular values of all matrices, and how much memory it takes.

    python -m benchmarks.speed.analyze --donor FOLDER --work WORK [--large FOLDER]     five minutes on one core

FOLDER is a checkpoint in Hugging Face layout, such as SmolLM2-135M; that of --large may be the one that
`benchmarks.speed.large_checkpoint` writes, of which three layers are analyzed. Every number is CPU seconds of one
process with one thread, which has imported and started everything before. A ratio is the reference's seconds over the
command's. Memory is what a process takes at most beyond what it takes after the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks import paths
from benchmarks.speed.children import in_child, peak_bytes

MODULE = "benchmarks.speed.analyze"
RESULTS = paths.RESULTS / "speed_analyze.json"
LAYERS = 3  # of the large checkpoint: fewer cannot be compared


def measure(donor: Path, work: Path) -> list[dict[str, Any]]:
    """[{what, seconds, reference, reference_seconds, ratio, wanted}]."""
    took = in_child(MODULE, "seconds", donor, work)
    return [
        {"what": "`analyze`, without start-up", "seconds": took["analyze"],
         "reference": "svdvals of its matrices in float32", "reference_seconds": took["svdvals"],
         "ratio": took["svdvals"] / took["analyze"], "wanted": "at least 0.3"}
    ]  # fmt: skip


def measure_memory(checkpoint: Path, work: Path) -> list[dict[str, Any]]:
    """[{what, megabytes, reference, reference_megabytes}]: memory beyond the imports, beside the largest tensor."""
    found = in_child(MODULE, "memory", _first_layers(checkpoint, work / "layers"), work)
    return [
        {"what": "`analyze`, memory beyond the imports", "megabytes": round(found["peak"] / 1e6),
         "reference": "the largest tensor in float32", "reference_megabytes": round(4 * found["largest"] / 1e6)}
    ]  # fmt: skip


def _first_layers(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint of the first layers of another, with the same files."""
    from zoo.checkpoints.headers import INDEX

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = json.loads((checkpoint / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    index = json.loads((checkpoint / INDEX).read_text())
    numbers = {name: re.search(r"layers\.(\d+)\.", name) for name in index["weight_map"]}  # None outside the layers
    files = {name: index["weight_map"][name] for name, found in numbers.items() if not found or int(found[1]) < LAYERS}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for file in set(files.values()):
        os.link(checkpoint / file, folder / file)
    return folder


def _child(what: str, checkpoint: Path, work: Path) -> dict[str, float]:
    import torch

    from zoo.donors.folder import open_donor

    _warm_up(work)
    donor = open_donor(checkpoint)
    matrices = [spec for spec in donor.blueprint.specs if len(spec.shape) == 2]
    if what == "memory":
        before = peak_bytes()
        _analyze(checkpoint, work / "analysis")
        return {"peak": peak_bytes() - before, "largest": max(spec.numel for spec in donor.blueprint.specs)}
    svdvals = 0.0
    for spec in matrices:
        matrix = donor.read(spec.name, torch.float32)
        start = time.process_time()
        torch.linalg.svdvals(matrix)
        svdvals += time.process_time() - start
    start = time.process_time()
    _analyze(checkpoint, work / "analysis")
    return {"svdvals": svdvals, "analyze": time.process_time() - start}


def _warm_up(work: Path) -> None:
    """Imports and starts what the analysis needs, with a tiny donor."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 64}
    shutil.rmtree(work / "tiny", ignore_errors=True)
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)).save_pretrained(work / "tiny")
    _analyze(work / "tiny", work / "tiny-analysis", bootstraps=2)


def _analyze(donor: Path, out: Path, **options: Any) -> None:
    from headstart.analyze.analyze import analyze
    from headstart.config import AnalyzeConfig

    shutil.rmtree(out, ignore_errors=True)
    analyze(AnalyzeConfig(out=out, donor=str(donor), device="cpu", **options), quiet=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--donor", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--large", type=Path, help="measure memory on this checkpoint too")
    given = parser.parse_args()
    if given.child:
        what, checkpoint, work = given.child
        print(json.dumps(_child(what, Path(checkpoint), Path(work))))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # what is not measured now stays
    if given.donor:
        content["rows"] = measure(given.donor, given.work)
    if given.large:
        content["memory"] = measure_memory(given.large, given.work)
    for row in (*content.get("rows", ()), *content.get("memory", ())):
        print(row)
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
