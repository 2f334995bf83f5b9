"""A child process that gives a function one input after another, within limits, and reports what each did."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from zoo.errors import UserError

MAX_MESSAGE = 400  # characters
MAX_CPU = 5.0  # seconds of this process, and of its children beyond their start
CHILD_START = 3.0  # seconds of CPU in which a child of ours imports its libraries; counted once the child has ended
MAX_MEMORY = 1_000_000_000  # bytes above what the process had before the input
MAX_WALL = 60.0  # seconds until an input counts as hanging

# Audit event -> (argument with a path, argument with the descriptor of its folder), for each path that is changed.
WRITES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
}
SOCKETS = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto")
CHILDREN = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "os.spawn")
CODE = ("pickle.find_class", "marshal.loads")
OUR_CHILDREN = ("zoo.sandbox",)  # modules that may start a child: what a library does with a pattern runs there


@dataclass(frozen=True)
class Verdict:
    """What became of one input: `accepted`, `refused` (one line), or what is wrong."""

    outcome: str
    text: str = ""

    @property
    def failed(self) -> bool:
        return self.outcome not in ("accepted", "refused")


class Watch:
    """An audit hook that notes writes outside of `folder`, sockets, children and pickles while it is on."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder.resolve())
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._note_write(event, args[0])
        elif event in WRITES:
            for path, folder in WRITES[event]:
                self._note_write(event, args[path], None if folder is None else args[folder])
        elif (
            event in SOCKETS
            or (event in CODE and not _imports())
            or (event in CHILDREN and not _called_from(OUR_CHILDREN))
        ):
            self.seen.append(f"{event} {args!r:.200}")

    def _note_write(self, event: str, path: Any, folder: Any = None) -> None:
        """path: as in the call, relative to the open directory `folder` where that is a descriptor."""
        if isinstance(path, int) or path is None:
            return
        inside = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else ""
        real = os.path.realpath(os.path.join(inside, os.fsdecode(path)))
        if not real.startswith(self.folder + os.sep) and real not in (self.folder, os.devnull) and not _imports():
            self.seen.append(f"{event} {real}")


def _frames() -> Iterator[str]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_globals.get("__name__", "")
        frame = frame.f_back  # type: ignore[assignment]


def _called_from(modules: tuple[str, ...]) -> bool:
    return any(name in modules for name in _frames())


def _imports() -> bool:
    """Whether Python is importing a module, which may write or unmarshal bytecode."""
    return any(name.startswith("importlib._bootstrap") or name == "_frozen_importlib_external" for name in _frames())


class Worker:
    """Gives `run(folder, damaged)` one input after another: a copy of `base` in which files are replaced.

    The child is forked from this process, so that it starts with all modules imported. It is started again where an
    input kills it.
    """

    def __init__(self, base: Path, work: Path, run: Callable[[Path, str], object]) -> None:
        self.base, self.work, self.run = base, work, run
        self.pid = 0
        self.pipe: Connection | None = None

    def judge(self, files: dict[str, bytes], damaged: str) -> Verdict:
        """The verdict on the base with these files replaced. damaged: the path that `run` is given."""
        if self.pipe is None:
            self._start()
        assert self.pipe is not None
        try:
            self.pipe.send((files, damaged))
            if not self.pipe.poll(MAX_WALL):
                self.stop()
                return Verdict("hangs", f"no answer after {MAX_WALL:.0f} s")
            return self.pipe.recv()
        except (EOFError, OSError):
            self.pipe = None
            _, status = os.waitpid(self.pid, 0)
            number = -os.waitstatus_to_exitcode(status)
            died = signal.Signals(number).name if number > 0 else f"exit code {-number}"
            return Verdict("dies", "CPU time" if number == signal.SIGXCPU else died)

    def stop(self) -> None:
        if self.pipe is not None:
            self.pipe.close()
            self.pipe = None
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def _start(self) -> None:
        ours, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                ours.close()
                _serve(theirs, self.base, self.work, self.run)
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        self.pipe = ours


def _serve(pipe: Connection, base: Path, work: Path, run: Callable[[Path, str], object]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.stdout = sys.stderr = os.fdopen(null, "w")
    watch, folder, started = Watch(work), work / "input", False
    while True:
        try:
            files, damaged = pipe.recv()
        except EOFError:
            return
        if not started:  # imports what is imported late, which takes seconds and opens files and sockets
            _fresh_copy(base, folder)
            with contextlib.suppress(UserError):
                run(folder, damaged)
            started = True
        _fresh_copy(base, folder)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        pipe.send(_verdict(partial(run, folder, damaged), watch))


def _fresh_copy(base: Path, folder: Path) -> None:
    """Makes `folder` a copy of `base`, beside an empty folder for temporary files."""
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(base, folder, symlinks=True)
    tempfile.tempdir = str(folder.parent / "tmp")
    os.mkdir(tempfile.tempdir)


def _verdict(run: Callable[[], object], watch: Watch) -> Verdict:
    before, before_memory = _cpu_times(), _reset_peak()
    watch.seen.clear()
    with _limits():
        watch.on = True
        try:
            run()
            verdict = Verdict("accepted")
        except UserError as error:
            text = str(error)
            verdict = Verdict("refused", text)
            if not text.strip() or len(text.splitlines()) != 1 or len(text) > MAX_MESSAGE:
                verdict = Verdict("bad message", text[:2000])
        except BaseException:  # a panic of a Rust library is no Exception
            verdict = Verdict("raises", traceback.format_exc()[-3000:])
        finally:
            watch.on = False
    own, children = (now - then for now, then in zip(_cpu_times(), before, strict=True))
    cpu, memory = own + max(0.0, children - CHILD_START), _peak() - before_memory
    if watch.seen and not verdict.failed:
        return Verdict("escapes", "; ".join(watch.seen[:3]))
    if cpu > MAX_CPU and not verdict.failed:
        return Verdict("slow", f"{cpu:.1f} s of CPU; {verdict.outcome} {verdict.text}")
    if memory > MAX_MEMORY and not verdict.failed:
        return Verdict("large", f"{memory / 1e9:.1f} GB; {verdict.outcome} {verdict.text}")
    return verdict


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Kills this process soon after the limits of time and memory, so that a bomb does not take the machine down."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    used = own.ru_utime + own.ru_stime
    with open("/proc/self/statm") as f:
        size = int(f.read().split()[0]) * resource.getpagesize()
    hard_cpu = resource.getrlimit(resource.RLIMIT_CPU)[1]
    hard_memory = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + 2 * MAX_CPU), hard_cpu))
    resource.setrlimit(resource.RLIMIT_AS, (size + 3 * MAX_MEMORY, hard_memory))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, hard_cpu))
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, hard_memory))


def _cpu_times() -> tuple[float, float]:
    """Seconds of CPU of this process, and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own, children = (usage.ru_utime + usage.ru_stime for usage in usages)
    return own, children


def _reset_peak() -> int:
    """Bytes of memory that this process has; from here on `_peak` counts anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
