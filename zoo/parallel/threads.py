"""Makes the tensors of a target in several threads and gives them back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from zoo.tensors import TensorSpec

AHEAD_VALUES = 1 << 26  # values of tensors that are made before they are asked for, 256 MiB in float32


def make_in_order(
    specs: Iterable[TensorSpec], make: Callable[[TensorSpec], Tensor | None]
) -> Iterator[tuple[str, Tensor]]:
    """(name, make(spec)) in the order of the specs, without those for which it returns None.

    As many threads work as torch uses for one operation, so that `torch.set_num_threads(1)` keeps everything in the
    caller's. `make` must depend on its spec alone, and draw from generators of its own. Tensors that nobody has asked
    for yet hold at most AHEAD_VALUES values together, or are one for each thread.
    """
    workers = torch.get_num_threads()
    if workers == 1:
        for spec in specs:
            if (tensor := make(spec)) is not None:
                yield spec.name, tensor
        return
    waiting: deque[tuple[TensorSpec, Future[Tensor | None]]] = deque()

    def first_result() -> tuple[str, Tensor | None]:
        spec, future = waiting.popleft()
        return spec.name, future.result()

    pool = ThreadPoolExecutor(workers)
    try:
        for spec in specs:
            while len(waiting) >= workers and _is_full(waiting, spec, workers):
                name, tensor = first_result()
                if tensor is not None:
                    yield name, tensor
            waiting.append((spec, pool.submit(make, spec)))
        while waiting:
            name, tensor = first_result()
            if tensor is not None:
                yield name, tensor
    finally:
        pool.shutdown(cancel_futures=True)


def _is_full(waiting: deque[tuple[TensorSpec, Future[Tensor | None]]], spec: TensorSpec, workers: int) -> bool:
    """Whether the next tensor has to wait until the first one is fetched."""
    values = sum(waiting_spec.numel for waiting_spec, _ in waiting) + spec.numel
    return values > AHEAD_VALUES or len(waiting) >= 4 * workers
