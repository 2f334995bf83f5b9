"""Killed commands: a seeded sample of what `python -m tests.fuzz.kills` does at length, and that it finds faults."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuzz import writers
from tests.fuzz.kills import Kills, Reference
from tests.fuzz.writers import Writer

SAMPLE = ("generate", "lora", "zoo add to a zoo", "zoo train", "train autoencoder", "save a sampler")


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kills]:
    yield Kills(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def reference_of(kills: Kills) -> Callable[[str], Reference]:
    """command -> its undisturbed run, made once."""
    return functools.cache(kills.reference)


@pytest.mark.parametrize("command", SAMPLE)
def test_a_killed_command_leaves_nothing_half_and_finishes_later(
    kills: Kills, reference_of: Callable[[str], Reference], command: str
) -> None:
    """Killed at a random operation, and the next run too; another run gets Ctrl-C.

    The order of syncs and renames survives a power failure as well.
    """
    reference = reference_of(command)
    assert len(reference.operations) > 10 and not reference.violations
    rng = random.Random(f"{command} {os.environ.get('KILLS_SEED', 0)}")
    first, second, interrupted = (rng.randint(1, len(reference.operations)) for _ in range(3))
    assert kills.problems(command, reference, first, second) == []
    assert kills.interrupt_problems(command, reference, interrupted) == []


@pytest.mark.parametrize("command", ["generate", "train autoencoder", "zoo train"])
def test_of_two_commands_with_one_output_one_writes_and_one_is_refused(
    kills: Kills, reference_of: Callable[[str], Reference], command: str
) -> None:
    """The second runs while the first is paused: before it has the lock, in the middle, before its last operation."""
    reference = reference_of(command)
    for pause_at in (1, len(reference.operations) // 2, len(reference.operations)):
        assert kills.race_problems(command, reference, pause_at) == []


def careless(place: Path) -> None:
    """Writes a folder under its own name, two files in two writes each."""
    (place / "out").mkdir(exist_ok=True)
    for name in ("config.json", "weights"):
        with (place / "out" / name).open("wb", buffering=0) as f:
            f.write(b"half ")
            f.write(b"whole")


def without_sync(place: Path) -> None:
    """Renames what may still be in memory only."""
    (place / ".out").mkdir(exist_ok=True)
    (place / ".out" / "config.json").write_text("{}")
    if not (place / "out").exists():
        (place / ".out").rename(place / "out")


def forgetful(place: Path) -> None:
    """A killed run leaves a temporary file with a name of its own."""
    partial = place / f".{os.getpid()}.part"
    partial.write_text("whole")
    partial.rename(place / "out")


def stubborn(place: Path) -> None:
    """Refuses what an earlier run left."""
    (place / "out").mkdir()


@pytest.mark.parametrize(
    ("write", "kill_at", "found"),
    [
        (careless, 4, "config.json: is half a file"),
        (careless, 5, "out/weights: is missing beside out/config.json"),
        (forgetful, 3, ".part: is left"),
        (stubborn, 2, "the last run ends with 1"),
    ],
)
def test_the_harness_finds_what_a_kill_breaks(
    kills: Kills, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], kill_at: int, found: str
) -> None:
    monkeypatch.setitem(writers.WRITERS, "faulty", Writer(lambda inputs, place, again: write(place)))
    reference = kills.reference("faulty")
    problems = kills.problems("faulty", reference, kill_at)
    assert any(found in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("write", "violation"),
    [
        (careless, "out/config.json: is written under its own name"),
        (without_sync, "is not synced before it becomes"),
        (without_sync, "is not synced after an output got its name"),
    ],
)
def test_the_harness_finds_what_a_power_failure_would_break(
    kills: Kills, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], violation: str
) -> None:
    monkeypatch.setitem(writers.WRITERS, "faulty", Writer(lambda inputs, place, again: write(place)))
    assert any(violation in line for line in kills.reference("faulty").violations)
