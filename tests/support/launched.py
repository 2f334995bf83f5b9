"""Runs commands in several real processes under `accelerate launch`, one command after another.

As a module it is what the launcher starts: `accelerate launch … -m tests.support.launched COMMANDS.json FOLDER`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = (
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    "--multi_gpu",  # without a GPU these are processes on the CPU
)  # fmt: skip


def launch(processes: int, commands: Sequence[Sequence[object]], folder: Path) -> list[list[dict[str, Any]]]:
    """Runs `headstart` commands in that many processes. [process][command] -> {code, out, err}.

    After a command that fails no other can follow."""
    (folder / "commands.json").write_text(json.dumps([[str(word) for word in command] for command in commands]))
    launch_module(processes, "tests.support.launched", folder / "commands.json", folder)
    return [json.loads((folder / f"process-{index}.json").read_text()) for index in range(processes)]


def launch_module(processes: int, module: str, *arguments: object) -> None:
    """Runs a module in that many processes."""
    words = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCHER, "--num_processes", str(processes)]
    words += ["-m", module, *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def main() -> None:
    """Runs the commands in this process and writes what each one printed."""
    from headstart import cli

    commands, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    results = []
    for command in commands:
        out, err, code = io.StringIO(), io.StringIO(), None
        sys.argv = ["headstart", *command]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as end:
                code = end.code
        results.append({"code": code or 0, "out": out.getvalue(), "err": err.getvalue()})
    (folder / f"process-{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
