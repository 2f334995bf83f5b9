"""What making an initialisation costs a user: time and memory of `headstart generate`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from headstart import methods


def costs(names: Iterable[str], target: Path, paths: Mapping[str, Path], corpus: Path, work: Path) -> dict[str, Any]:
    """{method: {seconds, cpu_seconds, mib} or {refused}}: `headstart generate` as a process of its own, with one
    thread, one after another; the time to start Python and to load torch is in it."""
    found = {}
    for name in names:
        fields = methods.get(name).__dataclass_fields__
        out = work / "cost"
        given = [f"--set=text={corpus}"] if "text" in fields else []
        given += ["--model", str(paths["model"])] if "model" in fields else []
        command = [
            sys.executable, "-m", "headstart", "generate", "--target", str(target), "--method", name,
            "--zoo", str(paths["zoo"]), "--out", str(out), "--quiet", *given,
        ]  # fmt: skip
        began = time.perf_counter()
        process = subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode == 2:
            found[name] = {"refused": said.strip()}
            continue
        if process.returncode:
            raise RuntimeError(f"{name}: {said}")
        found[name] = {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "mib": usage.ru_maxrss / 1024,
        }
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        out.rmdir()
    return found
