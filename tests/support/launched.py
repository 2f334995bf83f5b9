"""Runs commands in several real processes, one command after another: under `accelerate launch`, or forked from this
process, so that they need not import everything again. Forks can run any other function too.

As a module it is what the launcher starts: `accelerate launch … -m tests.support.launched COMMANDS.json FOLDER`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore
from torch.multiprocessing.spawn import start_processes

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = (
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    "--multi_gpu",  # without a GPU these are processes on the CPU
)  # fmt: skip
Commands = Sequence[Sequence[object]]


def launch(processes: int, commands: Commands, folder: Path) -> list[list[dict[str, Any]]]:
    """Runs `headstart` commands in that many processes. [process][command] -> {code, out, err}.

    After a command that fails no other can follow."""
    (folder / "commands.json").write_text(json.dumps(_words(commands)))
    words = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCHER, "--num_processes", str(processes)]
    words += ["-m", "tests.support.launched", str(folder / "commands.json"), str(folder)]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return _results(processes, folder)


def fork_commands(processes: int, commands: Commands, folder: Path) -> list[list[dict[str, Any]]]:
    """Does what `launch` does, in forks."""
    fork(processes, run_commands, _words(commands), folder)
    return _results(processes, folder)


def _words(commands: Commands) -> list[list[str]]:
    return [[str(word) for word in command] for command in commands]


def _results(processes: int, folder: Path) -> list[list[dict[str, Any]]]:
    return [json.loads((folder / f"process-{index}.json").read_text()) for index in range(processes)]


def fork(processes: int, work: Callable[..., object], *arguments: object) -> None:
    """Calls a function in that many processes, several with the environment that `torchrun` gives them. Raises what one
    of them raises."""
    # This process holds the store, as `torchrun` does.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # Autograd that has seen another device than the CPU cannot be forked.
    method = "forkserver" if torch.accelerator.is_available() else "fork"
    start_processes(_work_as_process, (processes, store.port, work, arguments), nprocs=processes, start_method=method)


def _work_as_process(index: int, count: int, port: int, work: Callable[..., object], arguments: Sequence[Any]) -> None:
    if count > 1:
        numbers = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {name: str(number) for name, number in numbers.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    from accelerate.state import AcceleratorState  # not needed by processes that are launched

    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # the state of the process that was forked
    work(*arguments)


def run_commands(commands: list[list[str]], folder: Path) -> None:
    """Runs the commands in this process and writes what each one printed."""
    from headstart import cli

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
    run_commands(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
