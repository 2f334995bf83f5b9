"""The hash, the moments and the range of every tensor of a checkpoint, in one pass over its files.

A file is read from its start to its end, a few times CHUNK bytes in memory. Each chunk goes into the hash of the file,
into the hash of its tensor, into the moments of its values, and to the caller, who may write it elsewhere. Except for
16-bit floats, a tensor is then read a second time, while the system still has it in memory, for its central moments.
The two hashes are computed in threads of their own.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.files import open_regular
from zoo.checkpoints.headers import Entry
from zoo.donors.moments import Moments, TwoPassMoments, moments_for, scratch_memory
from zoo.errors import UserError

CHUNK = 1 << 22  # bytes of a file in memory at a time
AHEAD = 4  # chunks that may wait to be hashed
SMALL = 1 << 20  # bytes of a file that is hashed in less time than it takes to start threads

Write = Callable[[memoryview], object]


@dataclass(frozen=True)
class Measure(Moments):
    """The moments of a tensor's values and the hash of its bytes."""

    sha256: str = ""


@dataclass(frozen=True)
class MeasuredFile:
    """A file that was read to its end: its hash, and the measures of its tensors by their names on disk."""

    size: int
    sha256: str
    measures: dict[str, Measure]


def measure_file(checkpoint: Checkpoint, path: Path, write: Write = lambda raw: None) -> MeasuredFile:
    """Reads a file of a checkpoint once, and measures its tensors.

    path   the file, in the checkpoint's folder, or a copy of it elsewhere
    write  is called with each chunk of the file in order, whose memory is used again after the call

    Of a quantised weight, the moments are those of its dequantised values, which are in memory as a whole. Scales of
    quantised weights are not measured. UserError where a value is NaN or infinite, and for a file that is too short.
    """
    names = set(checkpoint.names)
    entries = [e for e in checkpoint.entries.values() if e.file == path.name and e.name in names]
    whole, scratch = hashlib.sha256(), scratch_memory()
    found: dict[str, tuple[Moments, Any]] = {}
    with open_regular(path) as file, _Hashing(size := os.fstat(file.fileno()).st_size) as hashing:
        for begin, end, entry in _segments(entries, size):
            tensor = None if entry is None else _TensorMoments(checkpoint, entry, scratch)
            digest = hashlib.sha256()
            for memory, raw in _chunks(file, path, (begin, end), hashing.memory):
                hashing.update(memory, raw, [whole] if entry is None else [whole, digest])
                write(raw)
                if tensor is not None:
                    tensor.add(raw)
            if entry is not None and tensor is not None:
                memory = bytearray(min(CHUNK, end - begin))
                chunks = (raw for _, raw in _chunks(file, path, (begin, end), lambda size: memory))  # noqa: B023
                found[entry.name] = tensor.finish(chunks), digest
        hashing.wait()
    measures = {name: Measure(**vars(moments), sha256=digest.hexdigest()) for name, (moments, digest) in found.items()}
    return MeasuredFile(size, whole.hexdigest(), measures)


def measure_checkpoint(checkpoint: Checkpoint, tick: Callable[[int], object] = lambda n: None) -> list[MeasuredFile]:
    """Reads all files of a checkpoint once, in the order of `checkpoint.files`. tick: called with the bytes read."""
    return [measure_file(checkpoint, checkpoint.folder / file, lambda raw: tick(len(raw))) for file in checkpoint.files]


class _TensorMoments:
    """The moments of one tensor, whose bytes come in chunks, once or twice."""

    def __init__(self, checkpoint: Checkpoint, entry: Entry, scratch: np.ndarray) -> None:
        self.checkpoint, self.entry = checkpoint, entry
        self.is_quantised = entry.name in checkpoint.quantisation.weights
        count = math.prod(entry.shape)
        self.moments = TwoPassMoments() if self.is_quantised else moments_for(entry.dtype, count, scratch)

    def add(self, raw: memoryview) -> None:
        """Takes the next bytes."""
        if not self.is_quantised:
            self.moments.add(torch.frombuffer(raw, dtype=self.entry.dtype))

    def finish(self, chunks: Iterable[memoryview]) -> Moments:
        """The moments. chunks: all bytes again, which may be needed. UserError for NaN and infinity."""
        if self.is_quantised:
            values = self.checkpoint.read(self.entry.name).flatten()
            self.moments.add(values)
            self.moments.add_again(values)
        elif self.moments.passes > 1:
            for raw in chunks:
                self.moments.add_again(torch.frombuffer(raw, dtype=self.entry.dtype))
        moments = self.moments.result()
        if not moments.are_finite:
            what = f"tensor {self.entry.name!r} holds NaN or infinity"
            raise UserError(f"{self.checkpoint.folder}: {what}; use another checkpoint")
        return moments


def _segments(entries: Iterable[Entry], size: int) -> Iterator[tuple[int, int, Entry | None]]:
    """(begin, end, entry) of every tensor of a file in order, and of the bytes between tensors, whose entry is None."""
    position = 0
    for entry in sorted(entries, key=lambda e: (e.offset, e.nbytes)):
        if entry.offset > position:
            yield position, entry.offset, None
        yield entry.offset, entry.offset + entry.nbytes, entry
        position = entry.offset + entry.nbytes
    if position < size:
        yield position, size, None


def _chunks(
    file: BufferedReader, path: Path, span: tuple[int, int], memory_of: Callable[[int], bytearray]
) -> Iterator[tuple[bytearray, memoryview]]:
    """(memory, the bytes in it) for the bytes from `span[0]` to `span[1]` of a file, at most CHUNK at a time.

    memory_of: returns memory for so many bytes.
    """
    begin, end = span
    file.seek(begin)
    while begin < end:
        size = min(CHUNK, end - begin)
        memory = memory_of(size)
        chunk = memoryview(memory)[:size]
        if file.readinto(chunk) != size:
            raise UserError(f"{path}: ends at byte {file.tell()} of {end}; download the file again")
        yield memory, chunk
        begin += size


class _Hashing:
    """Adds chunks of a file to hashes in two threads, which may be AHEAD chunks behind. Small files need no threads."""

    def __init__(self, size: int) -> None:
        self.threads = [ThreadPoolExecutor(1) for _ in range(2)] if size > SMALL else []
        self.running: deque[tuple[bytearray, list[Future[None]]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for thread in self.threads:
            thread.shutdown(cancel_futures=True)

    def memory(self, size: int) -> bytearray:
        """Memory for the next chunk: of an earlier one, as soon as that is hashed."""
        if len(self.running) < AHEAD:
            return bytearray(size)
        memory, futures = self.running.popleft()
        for future in futures:
            future.result()
        return memory if len(memory) >= size else bytearray(size)

    def update(self, memory: bytearray, raw: memoryview, digests: list[Any]) -> None:
        """Adds a chunk, which lies in `memory`, to at most two hashes."""
        if not self.threads:
            for digest in digests:
                digest.update(raw)
            return
        jobs = zip(self.threads, digests, strict=False)
        self.running.append((memory, [thread.submit(digest.update, raw) for thread, digest in jobs]))

    def wait(self) -> None:
        """Waits until everything is hashed."""
        for _, futures in self.running:
            for future in futures:
                future.result()
        self.running.clear()
