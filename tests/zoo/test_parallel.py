"""Tensors that are made in several threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from zoo.parallel import threads as parallel
from zoo.parallel.threads import make_in_order
from zoo.streams import stream
from zoo.tensors import TensorSpec


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def specs_of(sizes: list[int]) -> list[TensorSpec]:
    return [TensorSpec(f"t{i}", (size,), torch.float32, ()) for i, size in enumerate(sizes)]


def test_order_and_values_do_not_depend_on_threads(threads: int) -> None:
    specs = specs_of([5, 1, 900, 3, 2, 40, 7])

    def make(spec: TensorSpec) -> Tensor | None:
        time.sleep(0.001 * (spec.numel % 3))
        return None if spec.name == "t3" else torch.randn(spec.shape, generator=stream(0, spec.name))

    got = list(make_in_order(specs, make))
    assert [name for name, _ in got] == ["t0", "t1", "t2", "t4", "t5", "t6"]
    assert all(torch.equal(t, torch.randn(t.shape, generator=stream(0, name))) for name, t in got)


def test_tensors_that_wait_are_bounded(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "AHEAD_VALUES", 100)
    lock, made, most = threading.Lock(), 0, 0

    def make(spec: TensorSpec) -> Tensor:
        nonlocal made
        with lock:
            made += 1
        return torch.zeros(spec.shape)

    for taken, _ in enumerate(make_in_order(specs_of([60] * 30), make)):
        with lock:
            most = max(most, made - taken)
    assert most <= max(threads, 2)


def test_an_error_reaches_the_caller_and_ends_the_threads(threads: int) -> None:
    def make(spec: TensorSpec) -> Tensor:
        if spec.name == "t4":
            raise ValueError("t4 cannot be made")
        return torch.zeros(spec.shape)

    before = threading.active_count()
    with pytest.raises(ValueError, match="t4 cannot be made"):
        list(make_in_order(specs_of([1] * 50), make))
    assert threading.active_count() == before


def test_a_caller_that_stops_early_ends_the_threads(threads: int) -> None:
    before = threading.active_count()
    tensors = make_in_order(specs_of([1] * 50), lambda spec: torch.zeros(spec.shape))
    next(tensors)
    tensors.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
