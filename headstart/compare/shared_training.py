"""The runs of a comparison, split over the processes that a launcher started. One process makes all of them itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from headstart.compare.run_files import read_run, run_path, unfinished
from headstart.compare.settings import Trial, TrialSettings
from headstart.compare.trials import run_trial
from headstart.report.scores import RunResult
from zoo.errors import UserError
from zoo.parallel.processes import this_process
from zoo.training.workers import run_jobs


@dataclass(frozen=True)
class SharedTraining:
    """What the first process does: it says which trials are missing, trains its share, and reads all runs."""

    settings: TrialSettings
    workers: int  # processes that each of the launched ones starts for itself
    report: Callable[[int], object]  # gets numbers of steps

    def finish(self, trials: Sequence[Trial]) -> dict[str, RunResult]:
        """Runs the trials that are not stored yet. Returns the runs of all of them by the names of their files."""
        processes, settings = this_process(), self.settings
        missing = [trial for trial in (unfinished(settings, t) for t in trials) if trial.lrs]
        work = {"settings": asdict(settings), "workers": self.workers, "trials": [asdict(t) for t in missing]}
        processes.from_first(work)
        own = _own_trials(missing)
        steps = settings.steps
        self.report((_run_count(trials) - _run_count(own)) * steps)  # stored ones, and those of other processes
        _train(settings, own, self.workers, self.report)
        processes.wait_for_all()
        return {run_path(settings, t, lr).name: read_run(settings, t, lr) for t in trials for lr in t.lrs}

    def dismiss_others(self) -> None:
        """Tells the other processes that nothing is left to train."""
        this_process().from_first()


def train_for_first() -> None:
    """What the other processes do: they train their share of what is missing, until nothing is left."""
    processes = this_process()
    while (work := processes.from_first()) is not None:
        settings = TrialSettings.from_json(work["settings"])
        if not Path(settings.tokens).is_file():
            raise UserError(
                f"{settings.tokens}: process {processes.index} cannot see this file of the first process; "
                "give an --out on a disk that all machines share"
            )
        trials = [Trial(**trial | {"lrs": tuple(trial["lrs"])}) for trial in work["trials"]]
        _train(settings, _own_trials(trials), work["workers"], lambda steps: None)
        processes.wait_for_all()


def _own_trials(trials: Sequence[Trial]) -> list[Trial]:
    """The share of this process. Where there are fewer trials than processes, each learning rate is a trial."""
    processes = this_process()
    if len(trials) < processes.count:
        trials = [Trial(t.label, t.seed, t.scale, (lr,)) for t in trials for lr in t.lrs]
    return processes.own_share(trials, lambda trial: len(trial.lrs))


def _train(settings: TrialSettings, trials: Sequence[Trial], workers: int, report: Callable[[int], Any]) -> None:
    check_others = this_process().check_others
    run_jobs(partial(run_trial, settings), trials, workers, report, on_finish=lambda trial: check_others())


def _run_count(trials: Sequence[Trial]) -> int:
    return sum(len(trial.lrs) for trial in trials)
