"""Which of several processes this one is, and how they share work.

`accelerate launch -m headstart …`, `torchrun` and `mpirun` start the same command several times and say so in the
environment. Each process does its share of the work, and the first one reports and writes what exists once. Results
are small JSON values. They travel through the key-value store of torch.distributed, by which gloo and NCCL find each
other too. A process that waits for the store can be interrupted and notices that another one failed; one that waits in
a collective of gloo cannot.

A single process neither imports torch here nor connects to anything.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from zoo.errors import UserError
from zoo.limits import PROCESS_CONNECT_SECONDS, PROCESS_END_SECONDS

Item = TypeVar("Item")

# The names of launchers: torchrun and accelerate, then the kinds of MPI, as accelerate reads them.
INDEX_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
COUNT_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_INDEX_VARIABLES = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
LOCAL_COUNT_VARIABLES = (
    "LOCAL_WORLD_SIZE",
    "MPI_LOCALNRANKS",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
)
PIECE = 1 << 20  # bytes of a value in the store, which refuses values above 8 MiB
POLL_SECONDS = 0.05


class AnotherProcessFailed(BaseException):
    """Another process failed and has said why, so this one ends too.

    It is no Exception, so that no handler takes it for an error in this process's own work.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process failed; its message says why")
        self.exit_code = exit_code


class Processes:
    """This process among those that a launcher started. All of them must make the same exchanges in the same order.

    index, count  the number of this process, from 0, and how many there are
    connect       returns the store that they share; called before the first exchange
    """

    def __init__(self, index: int = 0, count: int = 1, connect: Callable[[int, int], Any] | None = None) -> None:
        self.index, self.count = index, count
        self._connect = connect or _connect_to_store
        self._connected: Any = None
        self._exchanges = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reports, and writes what exists once."""
        return self.index == 0

    def own_share(self, items: Sequence[Item], size: Callable[[Item], float]) -> list[Item]:
        """The items that this process works on, in their order. Each item belongs to exactly one process."""
        return split_by_size(items, [size(item) for item in items], self.count)[self.index]

    def gather(self, value: Any) -> list[Any]:
        """In the first process: the JSON values of all processes, in their order. In the others: an empty list."""
        key = self._next_key()
        if not self.is_first:
            self._put(f"{key}/{self.index}", value)
            return []
        return [value, *(self._take(f"{key}/{index}") for index in range(1, self.count))]

    def from_first(self, value: Any = None) -> Any:
        """The JSON value that the first process gives, in all processes."""
        key = self._next_key()
        if self.count > 1 and self.is_first:
            self._put(key, value)
        return value if self.is_first else self._take(key, keep=True)

    def wait_for_all(self) -> None:
        """Returns when all processes have called it."""
        self.gather(None)
        self.from_first()

    def check_others(self) -> None:
        """Raises AnotherProcessFailed where another process has failed. To be called between pieces of long work."""
        if self.count > 1 and (code := self._failure()) is not None:
            raise AnotherProcessFailed(code)

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """Connects the processes. Inside, an error in one of them ends all: the others raise AnotherProcessFailed at
        their next exchange or check. UserError where not all of them come here."""
        if self.count == 1:
            yield
            return
        try:
            self._meet()
            yield
        except AnotherProcessFailed:
            raise
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            code = 130 if interrupted else 2 if isinstance(error, UserError | PermissionError) else 1
            with contextlib.suppress(UserError):
                self._call("set", "failed", str(code))
            raise

    def claim_message(self) -> bool:
        """Whether this process is the first that ends with a message. The others end without one, because theirs says
        the same or follows from it. Without a store to ask, each one does."""
        if self.count == 1 or (self._connected is None and not _launcher_holds_store()):
            return True
        try:
            return self._call("add", "messages", 1) == 1
        except UserError:
            return True

    def failure_code(self, otherwise: int) -> int:
        """The exit code of the process that failed, `otherwise` where none did."""
        if self.count > 1 and self._connected is not None:
            with contextlib.suppress(UserError):
                return self._failure() or otherwise
        return otherwise

    def leave(self, seconds: float = PROCESS_END_SECONDS) -> None:
        """Says that this process ends. The one that holds the store waits for the others, at most so long."""
        if self._connected is None:
            return
        with contextlib.suppress(UserError):
            self._call("add", "left", 1)
            end = time.monotonic() + seconds
            while self.is_first and not _launcher_holds_store() and time.monotonic() < end:
                if self._call("add", "left", 0) >= self.count:
                    return
                time.sleep(POLL_SECONDS)

    def _meet(self) -> None:
        """Returns when all processes have called it. Unlike an exchange, it does not wait for long work."""
        key, end = self._next_key(), time.monotonic() + PROCESS_CONNECT_SECONDS
        arrived = self._call("add", key, 1)
        while arrived < self.count:
            self.check_others()
            if time.monotonic() > end:
                raise UserError(
                    f"{arrived} of {self.count} processes came to this work within {PROCESS_CONNECT_SECONDS} seconds; "
                    "let all of them call it, or one inside `zoo.parallel.processes.working_alone()`"
                )
            time.sleep(POLL_SECONDS)
            arrived = self._call("add", key, 0)

    def _next_key(self) -> str:
        self._exchanges += 1
        return f"exchange/{self._exchanges}"

    def _put(self, key: str, value: Any) -> None:
        """Stores a JSON value, the number of its pieces last."""
        data = json.dumps(value).encode()
        starts = range(0, len(data), PIECE)
        for number, start in enumerate(starts):
            self._call("set", f"{key}/piece {number}", data[start : start + PIECE])
        self._call("set", key, str(len(starts)))

    def _take(self, key: str, keep: bool = False) -> Any:
        """Waits for a value, and removes it unless others read it too."""
        while not self._call("check", [key]):
            self.check_others()
            time.sleep(POLL_SECONDS)
        names = [f"{key}/piece {number}" for number in range(int(self._call("get", key)))]
        data = b"".join(self._call("get", name) for name in names)
        for name in [] if keep else [key, *names]:
            self._call("delete_key", name)
        return json.loads(data)

    def _failure(self) -> int | None:
        return int(self._call("get", "failed")) if self._call("check", ["failed"]) else None

    def _store(self) -> Any:
        if self._connected is None:
            self._connected = self._connect(self.index, self.count)
        return self._connected

    def _call(self, operation: str, *arguments: Any) -> Any:
        """An operation of the store. UserError where it cannot be reached."""
        try:
            return getattr(self._store(), operation)(*arguments)
        except (RuntimeError, ValueError) as error:  # torch's errors of the network are RuntimeErrors
            raise UserError(
                f"process {self.index} of {self.count}: lost its connection to the others "
                f"({str(error).splitlines()[0]}); look at their messages and start all again"
            ) from error


def this_process() -> Processes:
    """This process among those that the launcher started; alone without a launcher. Raises UserError for a number that
    does not fit."""
    index, count = _number(INDEX_VARIABLES, 0), _number(COUNT_VARIABLES, 1)
    if not 0 <= index < max(count, 1):
        raise UserError(f"{INDEX_VARIABLES[0]} is {index} and {COUNT_VARIABLES[0]} is {count}: correct or unset them")
    return _processes(index, max(count, 1))


@functools.cache
def _processes(index: int, count: int) -> Processes:
    return Processes(index, count)


def local_index() -> int:
    """The number of this process among those on this machine, from 0."""
    return _number(LOCAL_INDEX_VARIABLES, _number(INDEX_VARIABLES, 0))


def local_count() -> int:
    """How many processes share this machine; all of them where the launcher does not say."""
    return max(1, _number(LOCAL_COUNT_VARIABLES, _number(COUNT_VARIABLES, 1)))


@contextlib.contextmanager
def working_alone() -> Iterator[None]:
    """Inside, this process works as if no launcher had started others: for work that it does not share."""
    names = (*INDEX_VARIABLES, *COUNT_VARIABLES, *LOCAL_INDEX_VARIABLES, *LOCAL_COUNT_VARIABLES)
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def split_by_size(items: Sequence[Item], sizes: Sequence[float], count: int) -> list[list[Item]]:
    """Splits items into `count` shares of similar total size: the largest item first, each to the smallest share so
    far. The result depends on the arguments alone, and a share keeps the order of its items."""
    totals, chosen = [0.0] * count, [0] * len(items)
    for place in sorted(range(len(items)), key=lambda place: (-sizes[place], place)):
        chosen[place] = min(range(count), key=lambda share: (totals[share], share))
        totals[chosen[place]] += sizes[place]
    return [[item for item, owner in zip(items, chosen, strict=True) if owner == share] for share in range(count)]


def _number(names: Sequence[str], otherwise: int) -> int:
    """The first of some environment variables that is set, as accelerate reads them."""
    for name in names:
        if value := os.environ.get(name, ""):
            try:
                return int(value)
            except ValueError as error:
                raise UserError(f"{name} is {value!r}: must be a whole number; correct or unset it") from error
    return otherwise


def _launcher_holds_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect_to_store(index: int, count: int) -> Any:
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"{name} is not set, so {count} processes cannot find each other; use accelerate launch")
    waiting = timedelta(seconds=PROCESS_CONNECT_SECONDS)
    store, _, _ = next(rendezvous("env://", index, count, timeout=waiting))
    return PrefixStore("headstart", store)
