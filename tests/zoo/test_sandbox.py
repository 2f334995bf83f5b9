"""The child process that works on untrusted files: what it returns, its limits, and what it survives."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zoo.errors import UserError
from zoo.sandbox import Limits, Sandbox, library_errors

ENOUGH = Limits(seconds=30, memory=1 << 30)
SMALL = Limits(seconds=1, memory=100_000_000)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox()
    yield sandbox
    sandbox.close()


def match(sandbox: Sandbox, pattern: str, *names: str, limits: Limits = ENOUGH) -> list[list[int]]:
    reply, _ = sandbox.call("match_patterns", {"patterns": [pattern], "names": list(names)}, limits, "the adapter")
    return reply["matches"]


def test_calls_share_one_child_that_starts_quickly(sandbox: Sandbox) -> None:
    start = time.process_time()
    assert match(sandbox, "a+b", "aab", "aac", "ab") == [[0, 0], [0, 2]]
    child = sandbox._process
    assert child is not None and time.process_time() - start < 0.3
    assert match(sandbox, "é𝄞", "é𝄞") == [[0, 0]] and sandbox._process is child
    with pytest.raises(UserError, match=r"^the adapter: unterminated character set"):
        match(sandbox, "[", "a")
    assert sandbox._process is child, "an exception does not end it"


def test_endless_work_ends_at_the_limit_of_time_and_the_next_call_works(sandbox: Sandbox) -> None:
    with pytest.raises(UserError, match=r"^the adapter: takes more than the 1 seconds allowed$"):
        match(sandbox, "(a+)+b", "a" * 60, limits=SMALL)
    assert match(sandbox, "a", "a") == [[0, 0]]


def test_endless_memory_ends_at_the_limit(sandbox: Sandbox) -> None:
    limits = Limits(seconds=30, memory=30_000_000)
    with pytest.raises(UserError, match=r"^the adapter: takes more than the 30 MB of memory allowed$"):
        sandbox.call("match_patterns", {"patterns": ["a"] * 2000, "names": ["a"] * 2000}, limits, "the adapter")
    assert match(sandbox, "a", "a") == [[0, 0]]


def test_a_child_that_dies_is_reported_and_started_again(sandbox: Sandbox) -> None:
    match(sandbox, "a", "a")
    assert sandbox._process is not None
    os.kill(sandbox._process.pid, signal.SIGSEGV)
    sandbox._process.wait()
    assert match(sandbox, "a", "a") == [[0, 0]]


def test_a_child_without_an_answer_is_ended(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    match(sandbox, "a", "a")
    monkeypatch.setattr("zoo.sandbox.PATIENCE", 0.2)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"^pipe: takes more than the 1 seconds allowed$"):
        sandbox.call("encode_with_file", {"file": str(tmp_path / "pipe")}, SMALL, "pipe", b"a")


def test_a_forked_process_starts_a_child_of_its_own(sandbox: Sandbox) -> None:
    match(sandbox, "a", "a")
    forked = os.fork()
    if forked == 0:
        status = 1
        try:
            status = 0 if match(sandbox, "ab*", "abb") == [[0, 0]] else 2
            sandbox.close()
        finally:
            os._exit(status)
    assert os.waitpid(forked, 0)[1] == 0
    assert match(sandbox, "a", "a") == [[0, 0]]


def test_library_errors_become_one_line() -> None:
    class Panic(BaseException):
        """As pyo3 raises it: not an Exception."""

    for error, text in (
        (KeyError("vocab"), "f: 'vocab'; save it again"),
        (Panic("called `Option::unwrap()`\nnote: run"), "f: called `Option::unwrap()`; save it again"),
        (MemoryError(), "f: needs more memory than there is; save it again"),
        (UserError("g: kept"), "g: kept"),
    ):
        with pytest.raises(UserError) as caught, library_errors("f", "save it again"):
            raise error
        assert str(caught.value) == text
    for passing in (KeyboardInterrupt, SystemExit):
        with pytest.raises(passing), library_errors("f", "save it again"):
            raise passing
