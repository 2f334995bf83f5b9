"""Fuzzing of readers: damaged files go to a worker, and what it reports is counted."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.mutations import damaged_file
from tests.fuzz.readers import READERS, files_of
from tests.fuzz.worker import Verdict, Worker

BATCH = 50  # inputs of one seed


@dataclass(frozen=True)
class Failure:
    """An input that was neither accepted nor refused in one line."""

    reader: str
    file: str
    data: bytes
    verdict: Verdict

    def __str__(self) -> str:
        return f"{self.reader}: {self.file} ({len(self.data)} bytes): {self.verdict.outcome}: {self.verdict.text}"


@dataclass
class Count:
    """What became of the inputs of one reader."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        return sum(self.outcomes.values())


def fuzz(reader: str, folder: Path, first_seed: int, seconds: float, most: int | None = None) -> Count:
    """Damages the files of a reader for some seconds, or `most` inputs. `folder`: an empty one for all that is written.

    The same seed gives the same inputs in the same order. UserErrors count as `refused`, whatever raises as a failure.
    """
    kind, base, count = READERS[reader], folder / "base", Count()
    if not base.exists():
        base.mkdir(parents=True)
        kind.build(base)
    contents = {name: (base / name).read_bytes() for name in files_of(kind, base)}
    worker = Worker(base, folder / "work", kind.run)
    sound = worker.judge({}, next(iter(contents)))
    if sound.outcome != "accepted":
        raise AssertionError(f"{reader}: the files are refused before they are damaged: {sound}")
    files = st.sampled_from(sorted(contents)).flatmap(lambda n: st.tuples(st.just(n), damaged_file(n, contents[n])))

    def judge(drawn: tuple[str, bytes]) -> None:
        name, data = drawn
        is_late = time.monotonic() > end and count.inputs > 0  # one input on a busy machine as well
        if is_late or (most is not None and count.inputs >= most):
            return
        verdict = worker.judge({name: data}, name)
        count.outcomes[verdict.outcome] += 1
        if verdict.failed:
            count.failures.append(Failure(reader, name, data, verdict))

    end = time.monotonic() + seconds
    batch = 0
    try:
        while time.monotonic() < end and (most is None or count.inputs < most):
            run = given(files)(judge)
            run = settings(
                max_examples=BATCH,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(run)
            seed(first_seed * 1_000_003 + batch)(run)()
            batch += 1
    finally:
        worker.stop()
    return count
