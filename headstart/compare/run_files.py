"""The files of finished runs.

Every run (method, seed, scale, learning rate) is a small file in `runs`. Its name holds a hash of all that the numbers
depend on. So a second call continues where the first was interrupted, and methods can be added later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headstart.compare.settings import Trial, TrialSettings
from headstart.compare.starts import starts_of
from headstart.report.scores import RunResult, evaluation_points
from zoo.checkpoints.files import expect, expect_all, read_json
from zoo.errors import UserError
from zoo.limits import MAX_RECORD

RUNS = "runs"  # the folder of finished runs
RUN_KINDS = {
    "method": str, "scale": float, "seed": int, "lr": float, "steps": [int], "losses": [float],
    "max_grad_norm": float, "diverged": (None, int), "grad_spikes": int, "activation_rms": dict, "init": dict,
}  # fmt: skip  # key of a run's file -> its kind (`zoo.checkpoints.files.expect`)
INIT_KINDS = {"seconds": float, "donors": [dict], "novelty": (None, dict), "novelty_note": (None, str)}
DONOR_KINDS = {
    "name": str, "license": (None, str), "revision": (None, str), "parameters": (None, int), "loss": (None, float),
    "tokens": (None, float),
}  # fmt: skip
NOVELTY_KINDS = {"distance": float, "matrices": int, "of": int}


def run_path(settings: TrialSettings, trial: Trial, lr: float) -> Path:
    """The file of a run, named after all that its numbers depend on."""
    starts = starts_of(settings)
    dependencies = starts.dependencies(trial) | {
        "seed": trial.seed,
        "scale": trial.scale,
        "lr": lr,
        "training": [
            settings.steps, settings.batch_size, settings.sequence, settings.windows, settings.device, settings.threads,
            *([] if settings.dtype == "float32" else [settings.dtype]),  # names of runs from before there was a choice
        ],
        "points": evaluation_points(settings.steps),
        "tokens": settings.fingerprint["tokens"],
    }  # fmt: skip
    sampler = starts.sampler_class(trial.label)
    if settings.fingerprint.get("text") is not None and "text" in sampler.__dataclass_fields__:
        dependencies["text"] = settings.fingerprint["text"]  # else that of the tokens
    digest = hashlib.sha256(json.dumps(dependencies, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return Path(settings.runs) / f"{sampler.name}-s{trial.seed}-lr{lr:g}-{digest}.json"


def read_run(settings: TrialSettings, trial: Trial, lr: float) -> RunResult:
    """A finished run. Raises UserError for a file that `run_trial` did not write."""
    path, advice = run_path(settings, trial, lr), "remove it and run the same command again"
    run = read_json(path, MAX_RECORD)
    init = expect(run, "init", dict, str(path), advice)
    parts: list[tuple[Any, Mapping[str, Any], str]] = [(run, RUN_KINDS, ""), (init, INIT_KINDS, ": init")]
    parts += [
        (donor, DONOR_KINDS, ": init: donors") for donor in expect(init, "donors", [dict], f"{path}: init", advice)
    ]
    if init.get("novelty") is not None:
        parts.append((expect(init, "novelty", dict, f"{path}: init", advice), NOVELTY_KINDS, ": init: novelty"))
    for data, kinds, place in parts:
        expect_all(data, kinds, f"{path}{place}", advice, optional=False)
    for when in ("start", "end"):
        expect(run["activation_rms"], when, (None, [float]), f"{path}: activation_rms", advice)
    expected = {"method": trial.label, "scale": trial.scale, "seed": trial.seed, "lr": lr}
    wrong = next((key for key, value in expected.items() if run[key] != value), None)
    if wrong is not None:
        raise UserError(f"{path}: is a run of another {wrong}; {advice}")
    points = evaluation_points(settings.steps)
    if run["steps"] != points[: len(run["steps"])] or len(run["losses"]) != len(run["steps"]):
        raise UserError(f"{path}: was not measured at the steps of this comparison; {advice}")
    try:
        json.dumps(run, allow_nan=False)
    except ValueError as error:
        raise UserError(f"{path}: has a value that is NaN or infinite; {advice}") from error
    return run


def unfinished(settings: TrialSettings, trial: Trial) -> Trial:
    """The trial with the learning rates whose runs are not stored yet."""
    missing = tuple(lr for lr in trial.lrs if not run_path(settings, trial, lr).exists())
    return Trial(trial.label, trial.seed, trial.scale, missing)
