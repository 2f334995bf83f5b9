"""A trial: an initialisation, written as a user would write it, trained with each learning rate and measured."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headstart.compare.run_files import run_path
from headstart.compare.settings import Trial, TrialSettings
from headstart.compare.starts import starts_of
from headstart.report.scores import RunResult, count_gradient_spikes, evaluation_points
from zoo.checkpoints.atomic import replace_file
from zoo.parallel.processes import local_count, working_alone
from zoo.streams import stream_seed
from zoo.training.corpora import HELD_OUT
from zoo.training.loop import TrainingConfig, activation_rms, evaluate, reproducible, train_steps
from zoo.training.workers import ReportProgress


@dataclass(frozen=True)
class Corpus:
    """The tokens of a comparison, int64 each."""

    training: Tensor
    held_out: Tensor


def run_trial(settings: TrialSettings, trial: Trial, report: ReportProgress) -> None:
    """Writes one initialisation, trains it with each learning rate and stores the runs. `report` gets the number of
    steps since its last call. Processes on one machine share its threads."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # the comparison has its own
    tokens = torch.from_numpy(np.load(settings.tokens))
    boundary = training_token_count(tokens)
    corpus = Corpus(tokens[:boundary], tokens[boundary:])
    threads = max(1, settings.threads // local_count())
    with (
        working_alone(),
        tempfile.TemporaryDirectory(dir=Path(settings.tokens).parent) as work,
        reproducible(threads),
    ):
        folder = Path(work) / "init"
        origin = starts_of(settings).write(trial, folder)
        for lr in trial.lrs:
            run: RunResult = {"method": trial.label, "scale": trial.scale, "seed": trial.seed, "lr": lr}
            with _products_in(settings):
                run |= _train(settings, run, folder, corpus, report)
            run["init"] = origin
            replace_file(run_path(settings, trial, lr), (json.dumps(run) + "\n").encode())


def _products_in(settings: TrialSettings) -> torch.autocast:
    """The context in which matrix products have the dtype of the settings."""
    is_mixed = settings.dtype != "float32"
    # Casts of weights are not kept: a step changes the weights.
    return torch.autocast(torch.device(settings.device).type, torch.bfloat16, is_mixed, cache_enabled=False)


def _train(
    settings: TrialSettings, run: RunResult, folder: Path, corpus: Corpus, report: ReportProgress
) -> dict[str, Any]:
    """Trains the initialisation in `folder` with the seed and learning rate of `run`. Returns the measurements: {steps,
    losses, max_grad_norm, diverged, grad_spikes, activation_rms}."""
    starts, points = starts_of(settings), set(evaluation_points(settings.steps))
    training = TrainingConfig(
        settings.steps,
        run["lr"],
        settings.batch_size,
        settings.sequence,
        seed=stream_seed(run["seed"], "compare"),
        weight_decay=starts.weight_decay,
    )
    torch.manual_seed(stream_seed(run["seed"], "dropout"))
    model = starts.load(folder).to(settings.device)

    def held_out_loss() -> float:
        return evaluate(model, corpus.held_out, settings.sequence, limit=settings.windows)

    steps, losses, norms, diverged = [0], [held_out_loss()], [], None
    start = activation_rms(model, corpus.held_out, settings.sequence)
    for step in train_steps(model, corpus.training, training):
        if not (math.isfinite(step.loss) and math.isfinite(step.grad_norm)):
            diverged = step.number
            break
        norms.append(step.grad_norm)
        if step.number in points:
            steps.append(step.number)
            losses.append(held_out_loss())
        report(1)
    report(settings.steps - len(norms))
    first_bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if first_bad is not None:
        steps, losses, diverged = steps[:first_bad], losses[:first_bad], steps[first_bad]
    end = activation_rms(model, corpus.held_out, settings.sequence) if diverged is None else None
    return {
        "steps": steps,
        "losses": losses,
        "max_grad_norm": max(norms, default=0.0),
        "diverged": diverged,
        "grad_spikes": count_gradient_spikes(norms),
        "activation_rms": {"start": start, "end": end},
    }


def training_token_count(tokens: Tensor) -> int:
    """How many tokens of a corpus are trained on; the rest is held out."""
    return int(len(tokens) * (1 - HELD_OUT))
