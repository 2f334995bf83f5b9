"""What making an initialisation costs: time and memory of `headstart generate`, and what fitting and sampling take."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from headstart import samplers
from headstart.generate.sampling import build_sampler, fit_sampler, language_model_blueprint
from zoo.checkpoints.writer import replace_file
from zoo.donors.zoo import Zoo
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint
from zoo.vocabulary import find_tokenizer

# A process begins with the peak memory of the one that starts it, so a small one stands between.
LAUNCHER = """
import json, os, subprocess, sys, time
began = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
said = child.stderr.read()
_, status, usage = os.wait4(child.pid, 0)
print(json.dumps({"status": os.waitstatus_to_exitcode(status), "said": said.strip(), "mib": usage.ru_maxrss / 1024,
                  "seconds": time.perf_counter() - began, "cpu_seconds": usage.ru_utime + usage.ru_stime}))
"""


def costs(
    names: Iterable[str], targets: Mapping[str, Path], paths: Mapping[str, Path], corpus: Path, kept: Path
) -> dict[str, Any]:
    """{method: {target, seconds, cpu_seconds, mib, fit_seconds, parameters_per_second, of_randn}} on the first of the
    targets that a method takes, or {refused: by the last of them}. The first three are those of `headstart generate` as
    a process of its own, the time to start Python and to load torch in it; the others are measured in this process.
    One thread, one after another; what was measured before is in the folder `kept`."""
    found = {}
    for name in names:
        file = kept / f"{name}.json"
        if file.is_file():
            found[name] = json.loads(file.read_text())
            continue
        fields = samplers.get(name).__dataclass_fields__
        given = [f"--set=text={corpus}"] if "text" in fields else []
        given += ["--model", str(paths["model"])] if "model" in fields else []
        for target, folder in targets.items():
            with tempfile.TemporaryDirectory() as out:
                command = [
                    sys.executable, "-m", "headstart", "generate", "--target", str(folder), "--method", name,
                    "--zoo", str(paths["zoo"]), "--out", f"{out}/out", "--quiet", *given,
                ]  # fmt: skip
                found[name] = usage_of(command)
            if "refused" not in found[name]:
                sampler = configured(name, folder, paths, corpus)
                found[name] |= {"target": target} | rates(
                    sampler, Zoo.open(paths["zoo"]), language_model_blueprint(folder)
                )
                break
        replace_file(file, (json.dumps(found[name]) + "\n").encode())
    return found


def configured(name: str, target: Path, paths: Mapping[str, Path], corpus: Path) -> Sampler:
    """As `headstart generate` makes it, with the corpus where a method takes a text."""
    vocabulary = find_tokenizer(None, target)
    given = {"model": str(paths["model"]), "tokenizer": vocabulary and str(vocabulary), "text": str(corpus)}
    return build_sampler(samplers.get(name), **given)


def rates(sampler: Sampler, zoo: Zoo, blueprint: Blueprint) -> dict[str, float]:
    """{fit_seconds, parameters_per_second, of_randn} of one thread: fitting is done once, sampling is the median of
    five, `of_randn` its rate over that of torch.randn on the same shapes in the same run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.perf_counter()
        fit_sampler(sampler, zoo if sampler.needs or "donor" in sampler.__dataclass_fields__ else None, blueprint)
        fitted = time.perf_counter() - start
        seconds, reference, shapes = [], [], []
        for seed in range(5):
            start = time.perf_counter()
            shapes = [tensor.shape for _, tensor in sampler.sample(blueprint, seed)]
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            for shape in shapes:
                torch.randn(shape)
            reference.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    took = statistics.median(seconds)
    filled = sum(shape.numel() for shape in shapes)
    return {
        "fit_seconds": fitted,
        "parameters_per_second": filled / took,
        "of_randn": statistics.median(reference) / took,
    }


def usage_of(command: list[str]) -> dict[str, Any]:
    """{seconds, cpu_seconds, mib (peak resident)} of a command, or {refused: what it said} where it exits with 2."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCHER, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    status, said = found.pop("status"), found.pop("said")
    if status == 2:
        return {"refused": said}
    if status:
        raise RuntimeError(f"{' '.join(command)}: {said}")
    return found
