"""What making an initialisation costs a user: time and memory of `headstart generate`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from headstart import methods

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


def costs(names: Iterable[str], target: Path, paths: Mapping[str, Path], corpus: Path) -> dict[str, Any]:
    """{method: {seconds, cpu_seconds, mib} or {refused}}: `headstart generate` as a process of its own, with one
    thread, one after another; the time to start Python and to load torch is in it."""
    found = {}
    for name in names:
        fields = methods.get(name).__dataclass_fields__
        given = [f"--set=text={corpus}"] if "text" in fields else []
        given += ["--model", str(paths["model"])] if "model" in fields else []
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable, "-m", "headstart", "generate", "--target", str(target), "--method", name,
                "--zoo", str(paths["zoo"]), "--out", f"{folder}/out", "--quiet", *given,
            ]  # fmt: skip
            found[name] = usage_of(command)
    return found


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
