"""Independent jobs in several processes, with one CPU thread each and one progress bar in the parent.

A job must depend on its arguments only, so the results do not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

MAX_WAIT_FOR_WORKER = 5  # seconds that a terminated worker may take to end
Job = TypeVar("Job")
ReportProgress = Callable[[int], object]  # called with the progress since its last call


def default_workers(most: int = 8) -> int:
    """One process per core, at most `most`: each needs half a gigabyte for its libraries."""
    return min(os.cpu_count() or 1, most)


def run_jobs(
    function: Callable[[Job, ReportProgress], object],
    jobs: Sequence[Job],
    workers: int,
    update: ReportProgress,
    on_finish: Callable[[Job], object] = lambda job: None,
) -> None:
    """Calls `function(job, report)` for every job, and `on_finish(job)` in the parent in the order of completion.

    `function` and the jobs must be picklable; put long jobs first. With one worker or one job everything runs in this
    process. An error or Ctrl-C ends the other jobs at once."""
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            function(job, update)
            on_finish(job)
        return
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    with ProcessPoolExecutor(workers, context, initializer=_initialise_worker, initargs=(reports,)) as pool:
        running: dict[Future[None], Job] = {pool.submit(_run_job, function, job): job for job in jobs}
        try:
            while running:
                with contextlib.suppress(queue.Empty):
                    update(reports.get(timeout=0.2))
                for future in [f for f in running if f.done()]:
                    future.result()
                    on_finish(running.pop(future))
            with contextlib.suppress(queue.Empty):
                while True:
                    update(reports.get(timeout=0.05))
        except BaseException:
            processes = list(pool._processes.values())
            for process in processes:
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:  # they may still write into a folder that the caller removes
                process.join(MAX_WAIT_FOR_WORKER)
            raise


_reports: Any = None  # in a worker: the queue to the parent's progress bar


def _initialise_worker(reports: Any) -> None:
    import torch

    global _reports
    _reports = reports
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends the workers
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this worker when its parent ends, even if the parent was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_job(function: Callable[[Job, ReportProgress], object], job: Job) -> None:
    function(job, _reports.put)
