"""`headstart compare`: a model, or adapters of a base, trained from several initialisations on the same data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from headstart.compare.inputs import Inputs, read_inputs, write_calibration_text
from headstart.compare.nearest_donor import OTHER_COORDINATES
from headstart.compare.run_files import RUNS, unfinished
from headstart.compare.settings import Trial
from headstart.compare.shared_training import SharedTraining, train_for_first
from headstart.compare.starts import starts_of
from headstart.compare.trials import training_token_count
from headstart.config import CompareConfig
from headstart.devices import torch_device
from headstart.report.scores import REFERENCE, RunResult, best_setting, score
from zoo.checkpoints.atomic import is_unused, remove_temporaries, replace_file, temporary_folder, work_folder
from zoo.errors import UserError
from zoo.parallel.processes import local_count, this_process
from zoo.training.workers import default_workers


def compare(config: CompareConfig, *, quiet: bool = False, command: str | None = None) -> dict[str, Any]:
    """Trains a target from every method x seed x learning rate on the same batches per seed. Writes results.json,
    report.html and losses.png into `config.out` and returns the results.

    - With `base` instead of `target`, LoRA adapters are trained and the base is frozen. `default` is then PEFT's own
      initialisation. A method that moves a part of the base into the adapter trains with the base that it changed.
    - All losses are measured on the last tenth of the corpus.
    - `default_scales` multiply the default initialisation and are tuned with its learning rate. The usual std of 0.02
      is meant for wide models and slows narrow ones down.
    - With `tuning_seeds`, learning rates are tuned on the first N seeds. The other seeds use the chosen ones.
    - `workers` are processes of one CPU thread each; their number changes no result. By default a target of up to 5 M
      parameters on a CPU has one worker per core. A larger one has a single process that uses all cores. Then losses
      differ in their last digits between machines with different numbers of cores.
    - With `keep_going`, methods that refuse are left out, and the results give the reasons.

    command  what the results name as the command; else the command line that does the same

    Finished runs are kept: the same call continues an interrupted comparison. Several processes (`accelerate launch`)
    share the runs, with the same results; the first one returns them, the others return {}. Of targets above 5 M
    parameters, each process on a machine trains with its share of the threads.

    Raises UserError before anything is trained or written: an unknown method, a corpus too short, no tokenizer, an
    `out` that holds something else, or a donor, a trained model, a base or a reference that does not fit.
    """
    processes = this_process()
    with processes.ending_together():
        if processes.is_first:
            return _compare_as_first(config, quiet, command)
        torch_device(config.device)  # chooses the GPU of this process
        train_for_first()
        return {}


def _compare_as_first(config: CompareConfig, quiet: bool, command: str | None) -> dict[str, Any]:
    inputs, out = read_inputs(config), Path(config.out)
    _check_out(out)
    with work_folder(out, lambda: _check_out(out)), temporary_folder(out) as work:
        text, tokens = config.text or write_calibration_text(inputs.corpus.text, work), work / "tokens.npy"
        inputs = replace(inputs, settings=replace(inputs.settings, text=str(text), tokens=str(tokens)))
        plan = _list_trials(config, inputs)
        runs = _run(config, inputs, plan, quiet)
        results = _results(config, inputs, plan, runs)
        results |= {"command": command or config.to_command(), "config": config.to_record()}
        write_results(out, results)
    return results


@dataclass(frozen=True)
class ComparePlan:
    """The trials on the seeds for tuning, without those of methods that refused."""

    labels: tuple[str, ...]
    trials: tuple[Trial, ...]
    refused: dict[str, str]  # label -> reason


def _check_out(out: Path) -> None:
    """Raises UserError where the folder holds something other than a comparison."""
    if not is_unused(out) and not (out / RUNS).is_dir():
        raise UserError(f"{out}: exists and holds no comparison; give another --out, or remove it")


def _list_trials(config: CompareConfig, inputs: Inputs) -> ComparePlan:
    """The trials. Raises UserError where a method refuses the target and `keep_going` is off."""
    trials = [
        Trial(label, seed, scale, config.lrs)
        for seed in _tuning_seeds(config)  # the first seed of every method first, so that errors show at once
        for label in inputs.labels
        for scale in (config.default_scales if label == REFERENCE and config.base is None else (1.0,))
    ]
    unread = dict.fromkeys(trial.label for trial in trials if unfinished(inputs.settings, trial).lrs)
    refused = {}
    for label in unread:
        this_process().check_others()
        try:
            starts_of(inputs.settings).check(label, config.out)
        except UserError as error:
            if not config.keep_going or label == REFERENCE:
                raise
            refused[label] = str(error)
    return ComparePlan(
        tuple(label for label in inputs.labels if label not in refused),
        tuple(trial for trial in trials if trial.label not in refused),
        refused,
    )


def _save_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Does `np.save` for a contiguous array, whose own error for a full disk does not say so."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def _run(config: CompareConfig, inputs: Inputs, plan: ComparePlan, quiet: bool) -> dict[str, RunResult]:
    """Trains what is not finished: the seeds for tuning first, then the others at the settings that were chosen.
    Returns all runs by the names of their files."""
    from tqdm import tqdm

    later_seeds = config.seeds[len(_tuning_seeds(config)) :]
    total = (sum(len(trial.lrs) for trial in plan.trials) + len(plan.labels) * len(later_seeds)) * config.steps
    runs = Path(config.out) / RUNS
    runs.mkdir(exist_ok=True)
    remove_temporaries(runs)
    _save_array(Path(inputs.settings.tokens), inputs.tokens.numpy())
    with tqdm(total=total, unit="step", desc="compare", disable=quiet) as bar:
        workers = config.workers or (max(1, default_workers() // local_count()) if inputs.is_small else 1)
        training = SharedTraining(inputs.settings, workers, bar.update)
        tuned = training.finish(plan.trials)
        best = {label: best_setting([r for r in tuned.values() if r["method"] == label])[0] for label in plan.labels}
        chosen = [(label, *setting) for label, setting in best.items() if setting is not None]
        later = [Trial(label, seed, scale, (lr,)) for seed in later_seeds for label, scale, lr in chosen]
        found = tuned | training.finish(later)
        training.dismiss_others()
        return found


def _results(config: CompareConfig, inputs: Inputs, plan: ComparePlan, runs: dict[str, RunResult]) -> dict[str, Any]:
    tuning = _tuning_seeds(config)
    threshold, scored = score(list(runs.values()), config.steps, tuning)
    starts = starts_of(inputs.settings)
    for label, entry in scored.items():
        sampler = starts.sampler_class(label)
        options = inputs.settings.method_options.get(label, {})
        entry |= {"summary": sampler.summary, "reference": sampler.reference, "options": options}
        if sampler.family == "generative":
            entry |= {"novelty": None, "novelty_note": OTHER_COORDINATES}
    return {
        "target": inputs.blueprint.config,
        "parameters": inputs.parameters,
        "corpus": {
            "name": Path(config.corpus).name,
            "sha256": hashlib.sha256(inputs.corpus.text).hexdigest(),
            **inputs.corpus.about,
            "tokens": len(inputs.tokens),
            "held_out": int(len(inputs.tokens) - training_token_count(inputs.tokens)),
            "tokenizer": "bytes" if inputs.tokenizer is None else inputs.tokenizer.name,
        },
        "steps": config.steps,
        "seeds": list(config.seeds),
        "threshold": threshold,
        "methods": scored,
        "refused": plan.refused,
        "runs": sorted(runs),
        "grid": [float(f"{lr:g}") for lr in sorted(config.lrs)],
        "tuning_seeds": list(tuning),
        "batch_size": config.batch_size,
        "sequence": config.sequence,
        "windows": config.windows,
        "device": inputs.settings.device,
        "dtype": inputs.settings.dtype,
        **starts.to_record(),
    }


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Writes results.json, losses.png and report.html."""
    from headstart.report import comparison as report
    from headstart.report import comparison_plots as plots

    replace_file(out / "results.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    replace_file(out / "losses.png", plots.loss_curves_png(results))
    replace_file(out / "report.html", report.render_comparison(results).encode())


def _tuning_seeds(config: CompareConfig) -> tuple[int, ...]:
    return config.seeds[: config.tuning_seeds or len(config.seeds)]
