"""Runs commands in several real processes under `accelerate launch`, one command after another; or a function in
processes that are forked from this one, which need not import everything again.

As a module it is what the launcher starts: `accelerate launch … -m tests.support.launched COMMANDS.json FOLDER`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.multiprocessing.spawn import start_processes

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = (
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    "--multi_gpu",  # without a GPU these are processes on the CPU
)  # fmt: skip


def launch(processes: int, commands: Sequence[Sequence[object]], folder: Path) -> list[list[dict[str, Any]]]:
    """Runs `headstart` commands in that many processes. [process][command] -> {code, out, err}.

    After a command that fails no other can follow."""
    (folder / "commands.json").write_text(json.dumps([[str(word) for word in command] for command in commands]))
    words = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCHER, "--num_processes", str(processes)]
    words += ["-m", "tests.support.launched", str(folder / "commands.json"), str(folder)]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"process-{index}.json").read_text()) for index in range(processes)]


def fork(processes: int, work: Callable[..., object], *arguments: object) -> None:
    """Calls a function in that many processes, several with the environment that `torchrun` gives them. Raises what one
    of them raises."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Autograd that has seen another device than the CPU cannot be forked.
    method = "forkserver" if torch.accelerator.is_available() else "fork"
    start_processes(_work_as_process, (processes, port, work, arguments), nprocs=processes, start_method=method)


def _work_as_process(index: int, count: int, port: int, work: Callable[..., object], arguments: Sequence[Any]) -> None:
    if count > 1:
        numbers = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | {n: str(v) for n, v in numbers.items()}
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # the state of the process that was forked
    work(*arguments)


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
