"""Processes that share work. Threads stand for them, over a store in memory; tests of the commands start real ones."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore

from zoo.errors import UserError
from zoo.parallel.processes import (
    PIECE,
    AnotherProcessFailed,
    Processes,
    local_count,
    local_index,
    split_by_size,
    this_process,
    working_alone,
)


def run_together(count: int, work: Callable[[Processes], Any]) -> list[Any]:
    """What `work` returns or raises in each of `count` processes."""
    store = HashStore()

    def run(index: int) -> Any:
        process = Processes(index, count, lambda index, count: store)
        try:
            with process.ending_together():
                return work(process)
        except BaseException as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_a_single_process_shares_with_nobody() -> None:
    process = Processes()
    assert process.is_first and process.own_share([3, 1], float) == [3, 1]
    assert process.gather({"a": 1.5}) == [{"a": 1.5}] and process.from_first([1]) == [1]
    process.wait_for_all()
    process.check_others()
    assert process.claim_message() and process.failure_code(otherwise=130) == 130


def test_values_reach_the_first_process_in_order_and_all_from_the_first() -> None:
    long = ["é" * PIECE, 0.1 + 0.2, None]

    def work(process: Processes) -> Any:
        gathered = process.gather([process.index, long])
        process.wait_for_all()
        return gathered, process.from_first({"from": 0} if process.is_first else None), process.gather(process.index)

    first, second, third = run_together(3, work)
    assert first == ([[0, long], [1, long], [2, long]], {"from": 0}, [0, 1, 2])
    assert second == third == ([], {"from": 0}, [])


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_one_process_ends_the_others_while_they_wait(failing: int) -> None:
    def work(process: Processes) -> Any:
        if process.index == failing:
            raise UserError("config.json: is empty; write it again")
        process.wait_for_all()
        return "went on"

    found = run_together(2, work)
    assert str(found[failing]) == "config.json: is empty; write it again"
    other = found[1 - failing]
    assert isinstance(other, AnotherProcessFailed) and other.exit_code == 2


def test_an_error_in_one_process_is_noticed_between_pieces_of_work() -> None:
    failed = threading.Event()

    def work(process: Processes) -> Any:
        process.check_others()
        if not process.is_first:
            failed.set()
            raise ValueError("a fault of our own")
        while True:
            process.check_others()

    first, second = run_together(2, work)
    assert isinstance(second, ValueError) and failed.is_set()
    assert isinstance(first, AnotherProcessFailed) and first.exit_code == 1
    assert not isinstance(first, Exception)  # code that handles errors of a method does not handle this one


def test_a_process_that_works_without_the_others_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.parallel.processes.PROCESS_CONNECT_SECONDS", 0.1)
    store = HashStore()
    with (
        pytest.raises(UserError, match=r"^1 of 2 processes came to this work within 0.1 seconds; let all of them call"),
        Processes(0, 2, lambda index, count: store).ending_together(),
    ):
        pass
    with pytest.raises(AnotherProcessFailed), Processes(1, 2, lambda index, count: store).ending_together():
        Processes(1, 2, lambda index, count: store).check_others()


def test_work_alone_sees_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with working_alone():
        assert (this_process().count, local_count()) == (1, 1) and "RANK" not in os.environ
    assert (this_process().index, this_process().count) == (1, 2)


def test_one_process_speaks_for_all() -> None:
    assert sorted(run_together(4, lambda process: process.claim_message())) == [False, False, False, True]


def test_shares_are_even_and_depend_on_sizes_alone() -> None:
    sizes = [9, 1, 1, 8, 2, 3, 3, 9]
    shares = split_by_size(range(8), sizes, 3)
    assert shares == [[0, 6], [1, 4, 7], [2, 3, 5]]  # 12 of 36 each
    assert split_by_size(["a"], [5.0], 3) == [["a"], [], []]


def test_the_launcher_says_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (this_process().index, this_process().count) == (0, 1)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    assert (this_process().index, this_process().count, local_index(), local_count()) == (2, 4, 1, 4)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(UserError, match=r"^RANK is 4 and WORLD_SIZE is 4: correct or unset them$"):
        this_process()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UserError, match=r"^RANK is 'first': must be a whole number; correct or unset it$"):
        this_process()


def test_processes_without_an_address_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR is not set, so 2 processes cannot find each other"):
        Processes(1, 2).wait_for_all()


def test_a_lost_connection_is_one_line() -> None:
    class Broken:
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("Connection was likely closed.\nmore")

    with pytest.raises(UserError, match=r"^process 1 of 2: lost its connection to the others \(Connection was likely"):
        Processes(1, 2, lambda index, count: Broken()).from_first()


def test_a_single_process_does_not_import_torch() -> None:
    code = "import sys, zoo.parallel.processes as p; p.this_process().wait_for_all(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
