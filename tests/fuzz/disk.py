"""The disk operations of a process: counted, recorded, and cut off before the n-th by killing the process.

Seen are the calls of Python (open for writing, write, rename, mkdir, remove, truncate, fsync, …) and safetensors' own
writer. What other libraries write is seen when it is synced. `watch` cannot be undone: call it in a forked process.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass
class Disk:
    """The operations of this process on files inside `root`.

    Before number `kill_at`, counted from 1, the process gets `signal`. If it is to be killed before a write, half of
    the bytes are written first.
    """

    root: Path
    kill_at: int | None = None
    signal: int = signal.SIGKILL  # or SIGSTOP, after which it can go on, or SIGINT, which it can handle
    done: int = 0
    operations: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)  # of the order that survives a power failure
    synced: set[str] = field(default_factory=set)  # files and folders without changes since their last fsync
    unsynced_names: set[str] = field(default_factory=set)  # folders that got the name of an output since their fsync

    def before(self, kind: str, path: str, write_half: Callable[[], object] = lambda: None) -> None:
        """Called before an operation on a file: counts it, and kills the process if its turn has come."""
        if not self.holds(path):
            return
        self.done += 1
        self.operations.append(f"{kind} {os.path.relpath(path, self.root)}")
        if self.done == self.kill_at:
            if self.signal == signal.SIGKILL:
                write_half()
            os.kill(os.getpid(), self.signal)
        if kind in ("open", "write", "truncate", "save"):
            self.synced.discard(path)
            if not self.is_hidden(path):
                self.violations.append(f"{path}: is written under its own name")
        elif kind in ("mkdir", "remove", "rmdir"):
            self.synced.discard(os.path.dirname(path))

    def renamed(self, source: str, target: str) -> None:
        """Called before a rename: a complete output must be on the disk, and its name must get there too."""
        if not self.holds(target):
            return
        tree = [source, *(os.path.join(at, n) for at, folders, files in os.walk(source) for n in (*folders, *files))]
        unsynced = [path for path in tree if path not in self.synced]
        if not self.is_hidden(target):
            self.violations += [f"{path}: is not synced before it becomes {target}" for path in unsynced]
            self.unsynced_names.add(os.path.dirname(target))
        self.synced |= {target + path[len(source) :] for path in tree if path in self.synced}
        self.synced -= {os.path.dirname(source), os.path.dirname(target)}

    def fsynced(self, path: str) -> None:
        self.synced.add(path)
        self.unsynced_names.discard(path)

    def finish(self) -> None:
        """At the end of a command: the names of all outputs are on the disk."""
        self.violations += [f"{path}: is not synced after an output got its name" for path in self.unsynced_names]

    def holds(self, path: str) -> bool:
        return path.startswith(f"{self.root}{os.sep}")

    def is_hidden(self, path: str) -> bool:
        return any(part.startswith(".") for part in Path(path).relative_to(self.root).parts)


def watch(disk: Disk) -> None:
    """Reports the operations of this process to `disk`, from now on."""
    sys.addaudithook(lambda event, arguments: _audit(disk, event, arguments))

    def wrapped(module: Any, name: str, kind: str) -> None:
        real = getattr(module, name)

        def call(descriptor: Any, *arguments: Any) -> Any:
            path = _path_of(descriptor)
            disk.before(kind, path)
            result = real(descriptor, *arguments)
            if kind == "fsync":
                disk.fsynced(path)
            return result

        setattr(module, name, call)

    for name, kind in (("fsync", "fsync"), ("posix_fallocate", "truncate"), ("write", "write"), ("sendfile", "write")):
        wrapped(os, name, kind)

    class CountedFile(io.FileIO):
        def write(self, data: Any) -> int:  # type: ignore[override]
            view = memoryview(data).cast("B")
            disk.before(
                "write", _path_of(self.fileno()), lambda: super(CountedFile, self).write(view[: len(view) // 2])
            )
            return super().write(view)

        def truncate(self, size: int | None = None) -> int:  # type: ignore[override]
            disk.before("truncate", _path_of(self.fileno()))
            return super().truncate(size)

    real_open, real_save = io.open, safetensors.torch.serialize_file

    def counted_open(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None,
        closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        if not set(mode) & set("wax+"):
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = CountedFile(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def counted_save(tensors: Any, filename: Any, metadata: Any = None) -> None:
        def write_half() -> None:
            real_save(tensors, filename, metadata=metadata)
            os.truncate(filename, os.path.getsize(filename) // 2)

        disk.before("save", os.path.realpath(filename), write_half)
        real_save(tensors, filename, metadata=metadata)

    builtins.open = io.open = counted_open  # type: ignore[assignment]
    safetensors.torch.serialize_file = counted_save


def _audit(disk: Disk, event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, str | bytes | os.PathLike) and isinstance(flags, int) and flags & WRITING:
            disk.before("open", os.path.realpath(os.fsdecode(path)))
    elif event == "os.rename":
        source, target, source_folder, target_folder = arguments
        source, target = _absolute(source, source_folder), _absolute(target, target_folder)
        disk.before("rename", target)
        disk.renamed(source, target)
    elif event in ("os.mkdir", "os.remove", "os.rmdir"):
        disk.before(event.removeprefix("os."), _absolute(arguments[0], arguments[-1]))
    elif event in ("os.truncate", "os.link", "os.symlink"):
        disk.before(event.removeprefix("os."), _absolute(arguments[event != "os.truncate"], -1))


def _absolute(path: Any, folder: Any) -> str:
    """The absolute path of a name, whose folder may be given as a descriptor. The last part may be a link."""
    path = os.fsdecode(path) if not isinstance(path, int) else _path_of(path)
    if isinstance(folder, int) and folder >= 0 and not os.path.isabs(path):
        path = os.path.join(_path_of(folder), path)
    return os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))


def _path_of(descriptor: Any) -> str:
    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    return os.readlink(f"/proc/self/fd/{number}")
