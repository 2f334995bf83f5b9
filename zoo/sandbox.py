"""Runs a library's work on an untrusted file in a child process with limits of time and memory.

A regular expression, or a tokenizer's normaliser, can take exponential time and memory, and a library written in Rust
can panic or abort. What it does is one of the functions of `zoo.sandboxed`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zoo.errors import UserError
from zoo.limits import MAX_CHILD_REPLY
from zoo.sandboxed import read_message, write_message
from zoo.words import first_line

START = "from zoo.sandboxed import serve; serve()"
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")  # the child needs none
PATIENCE = 20.0  # seconds of waiting to start, and for each second of CPU time: the machine may be busy


@dataclass(frozen=True)
class Limits:
    """What a call may use."""

    seconds: float  # of CPU time
    memory: int  # bytes, above what the process has


class Sandbox:
    """A child process that runs functions of `zoo.sandboxed`, one at a time.

    It starts with the first call, and again after a call that it did not survive. It ends with this object,
    at the latest with this process.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the id of the process that started it: a forked one must start its own
        self._lock = threading.Lock()

    def call(
        self, function: str, arguments: dict[str, Any], limits: Limits, where: str, data: bytes = b""
    ) -> tuple[dict[str, Any], bytes]:
        """What a function of `zoo.sandboxed` returns: a JSON object and bytes.

        UserError, about `where`, for the error that it raises, and where it passes the limits or ends the process.
        """
        content = {
            "function": function, "arguments": arguments, "seconds": limits.seconds, "memory": limits.memory,
        }  # fmt: skip
        with self._lock:
            process = self._start()
            alarm = threading.Timer(PATIENCE * (1 + limits.seconds), process.kill)
            alarm.start()
            assert process.stdin is not None and process.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):
                    write_message(process.stdin, content, data)
                answer = read_message(process.stdout, MAX_CHILD_REPLY)
            except BaseException:  # Ctrl-C: the next call must not read the reply to this one
                self._end()
                raise
            finally:
                is_late = alarm.finished.is_set()
                alarm.cancel()
            if answer is None:
                raise UserError(f"{where}: {_reason_of_death(self._end(), is_late, limits)}")
        reply, result = answer
        if "memory" in reply:
            raise UserError(f"{where}: {_too_much_memory(limits)}")
        if "error" in reply:
            raise UserError(f"{where}: {reply['error']}")
        return reply, result

    def close(self) -> None:
        """Ends the child process. The next call starts another one."""
        with self._lock:
            if self._owner == os.getpid():
                self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            path = os.pathsep.join(entry for entry in sys.path if entry)
            quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "2"}
            quiet |= {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
            environment = {k: v for k, v in os.environ.items() if k not in SECRETS} | quiet | {"PYTHONPATH": path}
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", START],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process only, which then ends the child
            )
            self._owner = os.getpid()
            weakref.finalize(self, _kill, self._process, self._owner)
        return self._process

    def _end(self) -> int:
        """Kills the child process and returns how it ended."""
        if self._process is None:
            return 0
        process, self._process = self._process, None
        _kill(process, self._owner)
        return process.wait()


shared = Sandbox()  # for single calls


@contextlib.contextmanager
def library_errors(where: str, advice: str) -> Iterator[None]:
    """Turns what a library raises about an untrusted file into a UserError: `where`, the reason, `advice`.

    A panic of a Rust library is no Exception, and is one here. UserErrors pass as they are.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except MemoryError as error:
        raise UserError(f"{where}: needs more memory than there is; {advice}") from error
    except BaseException as error:
        raise UserError(f"{where}: {first_line(error)}; {advice}") from error


def _kill(process: subprocess.Popen[bytes], owner: int) -> None:
    """Ends a child process and closes its pipes. owner: the id of the process that started it."""
    if owner == os.getpid():  # not in a process that was forked since
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _reason_of_death(status: int, is_late: bool, limits: Limits) -> str:
    """Why the child process ended during a call. status: its exit code, or minus the number of a signal."""
    if is_late or status == -getattr(signal, "SIGXCPU", 0):
        return f"takes more than the {limits.seconds:.3g} seconds allowed"
    if status in (-signal.SIGABRT, -getattr(signal, "SIGKILL", 0)):  # of Rust without memory, and of the system
        return _too_much_memory(limits)
    return "makes the library that reads it crash"


def _too_much_memory(limits: Limits) -> str:
    return f"takes more than the {limits.memory / 1e6:.0f} MB of memory allowed"
