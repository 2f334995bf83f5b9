"""The work of an analysis as jobs that several processes share. Each result is stored as soon as it is there.

A result is a JSON value in a file of its own, named after a hash of all that it depends on. So the same command
continues after an interruption, with any number of processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from headstart import __version__
from zoo.checkpoints.atomic import disk_errors
from zoo.checkpoints.files import parse_json, read_bytes
from zoo.errors import UserError
from zoo.limits import MAX_JSON
from zoo.parallel.processes import this_process


@dataclass(frozen=True, eq=False)
class Job:
    """One piece of work of one process."""

    what: str  # the kind of its result, which begins the name of the file
    depends_on: Sequence[Any]  # JSON: all that the result is a function of
    size: float  # roughly its number of operations
    compute: Callable[[], Any]
    label: str = ""  # beside the progress bar

    @cached_property
    def key(self) -> str:
        """The name of the result."""
        digest = hashlib.sha256(json.dumps([__version__, self.what, self.depends_on]).encode()).hexdigest()
        return f"{self.what}-{digest[:24]}"


def run_jobs(jobs: Sequence[Job], folder: Path, bar: Any) -> dict[str, Any]:
    """The results of all jobs by their keys, in the first process; empty in the others.

    folder  where results are stored, and found again
    bar     a progress bar of tqdm, which counts the jobs of this process
    """
    processes = this_process()
    distinct = list({job.key: job for job in jobs}.values())
    own = processes.own_share(distinct, lambda job: job.size)
    bar.total = (bar.total or 0) + len(own)
    found = {}
    for job in own:
        bar.set_postfix_str(job.label)
        processes.check_others()
        found[job.key] = _stored_result(job, folder / f"{job.key}.json")
        bar.update()
    gathered = processes.gather(found)
    return {key: value for results in gathered for key, value in results.items()}


def _stored_result(job: Job, path: Path) -> Any:
    """The result of a job, computed unless it is stored."""
    if path.is_file():
        with contextlib.suppress(UserError):  # a damaged result is computed again
            return parse_json(read_bytes(path, MAX_JSON), str(path))
    value = to_json_values(job.compute())
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.{socket.gethostname()}")
        partial.write_bytes(json.dumps(value).encode())
        partial.replace(path)  # without a sync: after a power failure a damaged result is computed again
    return value


def to_json_values(value: Any, digits: int = 17) -> Any:
    """The value with the types of JSON only: NumPy and torch numbers become Python's, NaN and infinity become None.
    Floats keep `digits` significant digits; 17 keep them all."""

    def number(text: str) -> float:
        return float(f"{float(text):.{digits}g}")

    return json.loads(json.dumps(value, default=_to_builtin), parse_float=number, parse_constant=lambda _: None)


def _to_builtin(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value) if isinstance(value, Path) else list(value)
