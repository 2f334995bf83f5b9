"""Kills writing commands before their n-th disk operation, runs them again and compares.

    python -m tests.fuzz.kills --kills 300 [--minutes M] [--seed N] [--commands "generate,zoo add"] [--all]

A failure is: a half output that can be taken for a whole one, a second run that ends with an error, other bytes than
those of an undisturbed run, or something temporary that is left in the end. Some of the second runs are killed too.
Other runs get Ctrl-C, or a rival with the same output while they are paused.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.fuzz.disk import Disk, watch
from tests.fuzz.writers import WRITERS, build_inputs, is_whole_state
from zoo.checkpoints.atomic import is_temporary
from zoo.errors import UserError

KILLED, DONE, REFUSED = -9, 0, 2

Contents = dict[str, bytes]


@dataclass(frozen=True)
class Reference:
    """An undisturbed run of a command."""

    operations: list[str]
    before: Contents
    after: Contents
    violations: list[str]  # of the order of syncs and renames


@dataclass(frozen=True)
class Outcome:
    code: int  # exit code, or minus the signal
    report: dict[str, object]
    output: str


class Kills:
    """Runs commands in forked processes, with their inputs and outputs below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.inputs, self.place, self.logs = folder / "inputs", folder / "place", folder / "logs"
        torch.set_num_threads(1)
        self.inputs.mkdir(parents=True)
        self.logs.mkdir()
        build_inputs(self.inputs)

    def reference(self, command: str) -> Reference:
        self._start(command)
        WRITERS[command].run(self.inputs, self.place, False)  # in this process: its forks find everything imported
        self._start(command)
        before = contents(self.place)
        outcome = self._run(command, again=False)
        if outcome.code != DONE:
            raise AssertionError(f"{command}: an undisturbed run ends with {outcome.code}\n{outcome.output}")
        operations, violations = outcome.report["operations"], outcome.report["violations"]
        assert isinstance(operations, list) and isinstance(violations, list)
        after = contents(self.place)
        names = {part for name in after for part in Path(name).parts}
        violations += [f"{name}: is left by an undisturbed run" for name in sorted(names) if is_temporary(name)]
        return Reference(operations, before, after, violations)

    def problems(self, command: str, reference: Reference, kill_at: int, second_kill: int | None = None) -> list[str]:
        """Kills a command once or twice, then lets it finish. Returns what is wrong, nothing if all is well."""
        self._start(command)
        problems: list[str] = []
        for number, kill in enumerate((kill_at, second_kill)):
            if kill is not None:
                outcome = self._run(command, again=number > 0, kill_at=kill)
                if outcome.code not in (KILLED, DONE) and not self._is_finished(reference, outcome):
                    problems.append(f"run {number} ends with {outcome.code}\n{outcome.output}")
                problems += self._half_outputs(command, reference)
        return problems + self._finish(command, reference)

    def _finish(self, command: str, reference: Reference) -> list[str]:
        """Runs a command to its end. Returns what is wrong with its outputs."""
        problems, outcome = [], self._run(command, again=True)
        if outcome.code != DONE and not self._is_finished(reference, outcome):
            problems.append(f"the last run ends with {outcome.code}\n{outcome.output}")
        after = contents(self.place)
        problems += [f"{name}: is left" for name in after.keys() - reference.after.keys()]
        problems += [f"{name}: is missing" for name in reference.after.keys() - after.keys()]
        shared = after.keys() & reference.after.keys()
        return problems + [f"{name}: has other bytes" for name in shared if after[name] != reference.after[name]]

    def interrupt_problems(self, command: str, reference: Reference, at: int) -> list[str]:
        """Sends Ctrl-C at an operation, then runs the command again. Returns what is wrong.

        Nothing temporary may be left at once, unless the removal of temporary files is what Ctrl-C cut off.
        """
        self._start(command)
        outcome = self._outcome(self._fork(command, again=False, kill_at=at, name="run", stop=signal.SIGINT), "run")
        problems = self._half_outputs(command, reference)
        if outcome.code != DONE and "KeyboardInterrupt" not in outcome.output:
            problems.append(f"the interrupted run ends with {outcome.code}\n{outcome.output}")
        if not str(reference.operations[at - 1]).startswith(("remove", "rmdir")):
            names = {part for name in contents(self.place) for part in Path(name).parts}
            problems += [f"{name}: is left" for name in names if is_temporary(name)]
        return problems + self._finish(command, reference)

    def race_problems(self, command: str, reference: Reference, pause_at: int) -> list[str]:
        """Pauses a command at an operation, runs it a second time meanwhile, and lets the first go on.

        One of them must succeed, the other may be refused, and the output must be whole. Returns what is wrong.
        """
        self._start(command)
        first = self._fork(command, again=False, kill_at=pause_at, name="first", stop=signal.SIGSTOP)
        os.waitpid(first, os.WUNTRACED)
        outcomes = [self._run(command, again=False)]
        os.kill(first, signal.SIGCONT)
        outcomes.append(self._outcome(first, "first"))
        problems = [
            f"run {number} ends with {outcome.code}\n{outcome.output}"
            for number, outcome in enumerate(outcomes)
            if outcome.code != DONE and (outcome.code != REFUSED or len(outcome.output.splitlines()) != 1)
        ]
        if all(outcome.code != DONE for outcome in outcomes):
            problems.append(f"both are refused: {[outcome.output for outcome in outcomes]}")
        after = contents(self.place)
        return problems + [
            f"{name}: differs"
            for name in sorted(after.keys() | reference.after.keys())
            if after.get(name) != reference.after.get(name)
        ]

    def _start(self, command: str) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        (self.place / "tmp").mkdir(parents=True)
        WRITERS[command].prepare(self.inputs, self.place)

    def _is_finished(self, reference: Reference, outcome: Outcome) -> bool:
        """Whether a run was refused because the output is there already, and complete."""
        return (
            outcome.code == REFUSED and "exists already" in outcome.output and contents(self.place) == reference.after
        )

    def _half_outputs(self, command: str, reference: Reference) -> list[str]:
        """What is visible after a kill and neither complete nor as before."""
        states = {path for pattern in WRITERS[command].states for path in self.place.glob(pattern)}
        visible = {
            name: data
            for name, data in contents(self.place).items()
            if not any(part.startswith(".") for part in Path(name).parts)
            and not name.endswith("/")  # an empty folder cannot be taken for an output
        }
        problems = [
            f"{name}: is half a file, or has other bytes"
            for name, data in visible.items()
            if data not in (reference.before.get(name), reference.after.get(name))
            and not (self.place / name in states and is_whole_state(self.place / name))
        ]
        return problems + self._half_folders(reference, visible)

    def _half_folders(self, reference: Reference, visible: Contents) -> list[str]:
        """A folder that can be opened must hold all of its files: config.json and the like declare it complete."""
        marks = ("config.json", "headstart.json", "report.json", "model_index.json", "analysis.json", "sampler.json")
        problems = []
        for mark in (name for name in visible if name.endswith(marks) and name.count("/") <= 3):
            folder = mark.rpartition("/")[0]
            expected = {n for n in reference.after if n.startswith(f"{folder}/") and not n.endswith("/")}
            record = next((m for m in ("report.json", "headstart.json") if f"{folder}/{m}" in expected), None)
            if record is not None and f"{folder}/{record}" not in visible:
                continue  # a training that is being published: its record comes last
            problems += [f"{name}: is missing beside {mark}" for name in expected - visible.keys()]
        return problems

    def _run(self, command: str, again: bool, kill_at: int | None = None) -> Outcome:
        return self._outcome(self._fork(command, again, kill_at, "run"), "run")

    def _outcome(self, child: int, name: str) -> Outcome:
        """Waits for a child and reads its report."""
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        report, log = (self.logs / f"{name}.{kind}" for kind in ("json", "log"))
        return Outcome(code, json.loads(report.read_text()) if report.exists() else {}, log.read_text(errors="replace"))

    def _fork(self, command: str, again: bool, kill_at: int | None, name: str, stop: int = signal.SIGKILL) -> int:
        """Starts a command in a child, whose number is returned."""
        (self.logs / f"{name}.json").unlink(missing_ok=True)
        disk = Disk(Path(os.path.realpath(self.place)), kill_at, stop)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = self._run_in_child(command, again, disk, name)
            finally:
                os._exit(code)
        return child

    def _run_in_child(self, command: str, again: bool, disk: Disk, name: str) -> int:
        log = os.open(self.logs / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        tempfile.tempdir = str(self.place / "tmp")
        watch(disk)
        code = DONE
        try:
            WRITERS[command].run(self.inputs, self.place, again)
        except UserError as error:
            print(error)
            code = REFUSED
        except BaseException:
            traceback.print_exc()
            code = 1
        disk.finish()
        report = {"operations": disk.operations, "violations": disk.violations}
        (self.logs / f"{name}.json").write_text(json.dumps(report))
        sys.stdout.flush()
        sys.stderr.flush()
        return code


def contents(folder: Path) -> Contents:
    """Every file in a folder by its path, hidden ones included; an empty folder has a name that ends in a slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            if not any(path.iterdir()):
                found[f"{name}/"] = b""
        else:
            found[name] = path.read_bytes()
    return found


@contextlib.contextmanager
def prepared_kills() -> Iterator[Kills]:
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        yield Kills(Path(folder))


@dataclass(frozen=True)
class Trial:
    kind: str  # killed, killed twice, interrupted or raced
    command: str
    operations: tuple[int, ...]  # where, counted from 1

    def run(self, kills: Kills, reference: Reference) -> list[str]:
        if self.kind == "interrupted":
            return kills.interrupt_problems(self.command, reference, *self.operations)
        if self.kind == "raced":
            return kills.race_problems(self.command, reference, *self.operations)
        return kills.problems(self.command, reference, *self.operations)


def random_trials(references: dict[str, Reference], rng: random.Random) -> Iterator[Trial]:
    """Without end: every command in turn, killed at each of its operations once before any comes again."""
    left: dict[str, list[int]] = {command: [] for command in references}
    for command in itertools.cycle(references):
        numbers = range(1, len(references[command].operations) + 1)
        left[command] = left[command] or rng.sample(numbers, len(numbers))
        kind = rng.choices(["killed", "killed twice", "interrupted", "raced"], [5, 3, 2, 1])[0]
        if kind == "raced" and not WRITERS[command].refuses_a_second:
            kind = "killed"
        first = left[command].pop() if kind.startswith("killed") else rng.choice(numbers)
        yield Trial(kind, command, (first, rng.choice(numbers)) if kind == "killed twice" else (first,))


def all_trials(references: dict[str, Reference]) -> Iterator[Trial]:
    for command, reference in references.items():
        for number in range(1, len(reference.operations) + 1):
            yield Trial("killed", command, (number,))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="how many [default: 300]")
    parser.add_argument("--all", action="store_true", help="every operation of every command once")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--commands", default=",".join(WRITERS))
    options = parser.parse_args()
    end, counts, failures = time.monotonic() + 60 * options.minutes, collections.Counter[tuple[str, str]](), 0
    print(f"seed {options.seed}")
    with prepared_kills() as kills:
        references = {command: kills.reference(command) for command in options.commands.split(",")}
        for command, reference in references.items():
            failures += len(reference.violations)
            print(f"{command}: {len(reference.operations)} operations", *reference.violations, sep="\n  ", flush=True)
        trials = all_trials(references) if options.all else random_trials(references, random.Random(options.seed))
        for trial in trials:
            n_kills = sum(n for (_, kind), n in counts.items() if kind == "kills")
            if time.monotonic() > end or (n_kills >= options.kills and not options.all):
                break
            problems = trial.run(kills, references[trial.command])
            what = {"interrupted": "interrupts", "raced": "races"}.get(trial.kind, "kills")
            counts[trial.command, what] += len(trial.operations)
            failures += bool(problems)
            if problems:
                print(f"{trial.command}, {trial.kind} at {trial.operations}:", *problems, sep="\n  ", flush=True)
    for command in references:
        print(f"{command}:", ", ".join(f"{counts[command, what]} {what}" for what in ("kills", "interrupts", "races")))
    totals = {
        what: sum(n for (_, kind), n in counts.items() if kind == what) for what in ("kills", "interrupts", "races")
    }
    print(f"{totals['kills']} kills, {totals['interrupts']} interrupts, {totals['races']} races: {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
