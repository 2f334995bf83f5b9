"""Measurements in a process of their own, which nothing earlier has warmed up or filled."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from typing import Any

from benchmarks import paths


def in_child(module: str, *words: object) -> Any:
    """The JSON value that `python -m MODULE --child WORDS…` prints, with one thread. RuntimeError with its last line
    where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", module, "--child", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=paths.ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout)


def peak_bytes() -> int:
    """Bytes that this process has taken at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
