"""The cost of an initialisation: time and memory of `headstart generate`, seconds of fitting, rate of sampling."""

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
from headstart.generate.sampling import build_sampler, language_model_blueprint
from zoo.checkpoints.atomic import replace_file
from zoo.donors.zoo import Zoo
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint
from zoo.vocabulary import find_tokenizer

# A process inherits the peak memory of its parent, so a small process starts it.
LAUNCHER = """
import json, os, subprocess, sys, time
began = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
said = child.stderr.read()
_, status, usage = os.wait4(child.pid, 0)
print(json.dumps({"status": os.waitstatus_to_exitcode(status), "said": said.strip(), "mib": usage.ru_maxrss / 1024,
                  "seconds": time.perf_counter() - began, "cpu_seconds": usage.ru_utime + usage.ru_stime}))
"""


def measure_costs(
    names: Iterable[str], targets: Mapping[str, Path], paths: Mapping[str, Path], corpus: Path, cache: Path
) -> dict[str, Any]:
    """{method: {target, seconds, cpu_seconds, mib, fit_seconds, parameters_per_second, of_randn}} on the first target
    that a method accepts, or {refused: the message for the last target}.

    seconds, cpu_seconds and mib are those of `headstart generate` as a process of its own, with the start of Python and
    torch; the others are measured in this process. One thread. `cache` is the folder of earlier measurements."""
    found = {}
    for name in names:
        file = cache / f"{name}.json"
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
                found[name] = process_usage(command)
            if "refused" not in found[name]:
                sampler = sampler_for_target(name, folder, paths, corpus)
                found[name] |= {"target": target} | fit_and_sample_rates(
                    sampler, Zoo.open(paths["zoo"]), language_model_blueprint(folder)
                )
                break
        replace_file(file, (json.dumps(found[name]) + "\n").encode())
    return found


def sampler_for_target(name: str, target: Path, paths: Mapping[str, Path], corpus: Path) -> Sampler:
    """The sampler as `headstart generate` builds it, with the corpus for a method that reads a text."""
    vocabulary = find_tokenizer(None, target)
    given = {"model": str(paths["model"]), "tokenizer": vocabulary and str(vocabulary), "text": str(corpus)}
    return build_sampler(samplers.get(name), **given)


def fit_and_sample_rates(sampler: Sampler, zoo: Zoo, blueprint: Blueprint) -> dict[str, float]:
    """{fit_seconds, parameters_per_second, of_randn} with one thread: fitting once, the median of sampling five times,
    and the sampling rate over that of torch.randn on the same shapes in the same run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.perf_counter()
        sampler.fit(zoo if sampler.needs or "donor" in sampler.__dataclass_fields__ else None, blueprint)
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
    sampling = statistics.median(seconds)
    filled = sum(shape.numel() for shape in shapes)
    return {
        "fit_seconds": fitted,
        "parameters_per_second": filled / sampling,
        "of_randn": statistics.median(reference) / sampling,
    }


def process_usage(command: list[str]) -> dict[str, Any]:
    """{seconds, cpu_seconds, mib (peak resident)} of a command, or {refused: its message} if it exits with code 2."""
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
