"""A Python process that answers each line of JSON with one, for tests of what a process of its own does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
UNSET = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE")


@contextmanager
def json_worker(code: str, cwd: Path, **variables: str) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """Yields a function that sends an object to the process and returns its answer.

    variables: of the environment, which has no settings of hubs and no proxy besides.
    """
    kept = {k: v for k, v in os.environ.items() if k not in UNSET and not k.lower().endswith("_proxy")}
    ours = {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=kept | ours | variables,
        cwd=cwd,
    )
    assert process.stdin is not None and process.stdout is not None

    def ask(content: dict[str, Any]) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(content) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.wait(timeout=30)
