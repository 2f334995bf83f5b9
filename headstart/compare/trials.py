"""A trial: an initialisation, written as `headstart generate` writes it, trained with each learning rate and measured.

Every run (method, seed, scale, learning rate) is a small file in `runs`. Its name holds a hash of all that the numbers
depend on. So a second call continues where the first was interrupted, and methods can be added later.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headstart.compare.labels import method_name, sampler_class
from headstart.compare.nearest_donor import OTHER_COORDINATES, nearest_donor
from headstart.config import GenerateConfig
from headstart.generate.generate import generate
from headstart.report.scores import REFERENCE, RunResult, count_gradient_spikes, evaluation_points
from zoo.checkpoints.atomic import replace_file
from zoo.checkpoints.files import expect, expect_all, is_kind, read_json
from zoo.checkpoints.sources import resolve_source
from zoo.donors.donor import provenance
from zoo.donors.zoo import Zoo, open_standalone
from zoo.errors import UserError
from zoo.limits import MAX_RECORD
from zoo.parallel.processes import local_count, working_alone
from zoo.streams import stream_seed
from zoo.training.corpora import HELD_OUT
from zoo.training.loop import TrainingConfig, activation_rms, evaluate, reproducible, train_steps
from zoo.training.workers import ReportProgress

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


@dataclass(frozen=True)
class TrialSettings:
    """What all runs of a comparison share."""

    target: dict[str, Any]  # the parsed config
    zoo: str | None
    donor: str | None
    model: str | None
    tokenizer: str | None  # the folder of the target's tokenizer; None for bytes
    text: str  # a file with the beginning of the corpus, for methods that take a text
    method_options: Mapping[str, Mapping[str, Any]]  # label -> options of its method
    steps: int
    batch_size: int
    sequence: int
    windows: int  # held-out windows at each measurement
    device: str
    threads: int
    tokens: str  # .npy of the encoded corpus
    runs: str  # the folder of finished runs
    fingerprint: Mapping[str, Any]  # hashes of the content of tokens, zoo and model, for the names of the runs
    dtype: str = "float32"  # of the products in training


@dataclass(frozen=True)
class Trial:
    """One initialisation (a sample of a method under a seed) and the learning rates to train it with."""

    label: str
    seed: int
    scale: float  # of the default initialisation; 1 for all other methods
    lrs: tuple[float, ...]


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
        origin = _initialize(settings, trial, folder)
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
    """Trains the checkpoint in `folder` with the seed and learning rate of `run`. Returns the measurements: {steps,
    losses, max_grad_norm, diverged, grad_spikes, activation_rms}."""
    from transformers import AutoModelForCausalLM

    points = set(evaluation_points(settings.steps))
    training = TrainingConfig(
        settings.steps, run["lr"], settings.batch_size, settings.sequence, seed=stream_seed(run["seed"], "compare")
    )
    torch.manual_seed(stream_seed(run["seed"], "dropout"))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(settings.device)

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


def _initialize(settings: TrialSettings, trial: Trial, folder: Path) -> dict[str, Any]:
    """Writes the initialisation and returns where it comes from: {seconds, donors, novelty, novelty_note}."""
    config = generate_config(settings, trial.label, folder, trial.seed)
    start = time.perf_counter()
    if trial.label == REFERENCE and trial.scale != 1.0:
        config = generate_config(settings, trial.label, folder, trial.seed, scale=trial.scale)
    generate(config, quiet=True)
    seconds = time.perf_counter() - start
    records = json.loads((folder / "headstart.json").read_text())["donors"]
    zoo = open_zoo(settings.zoo, settings.donor)
    # A pipeline may have learned from donors that this zoo does not hold.
    unknown = dict.fromkeys(("parameters", "loss", "tokens"))
    names = [d["name"] for d in records if zoo is not None and d["name"] in zoo.names]
    measurable = sampler_class(trial.label).family != "generative"
    novelty, note = nearest_donor(folder, zoo, names) if measurable else (None, OTHER_COORDINATES)
    return {
        "seconds": seconds,
        "donors": [unknown | d | (donor_facts(zoo, d["name"]) if zoo and d["name"] in names else {}) for d in records],
        "novelty": novelty,
        "novelty_note": note,
    }


def open_zoo(zoo: str | Path | None, donor: str | None) -> Zoo | None:
    """The zoo, else the donor outside a zoo, else None."""
    if zoo is not None:
        return Zoo.open(zoo)
    return None if donor is None else open_standalone(resolve_source(donor), quiet=True)


def generate_config(
    settings: TrialSettings, label: str, out: str | Path, seed: int = 0, **options: Any
) -> GenerateConfig:
    """The `headstart generate` that makes the initialisation of a label; `options` are added to the label's own."""
    return GenerateConfig(
        target=settings.target,
        method=method_name(label),
        out=out,
        zoo=settings.zoo,
        set=method_options(settings, label) | options,
        seed=seed,
        dtype="float32",
        device=settings.device,
        tokenizer=settings.tokenizer,
        **donor_and_model(settings, label),
    )


def method_options(settings: TrialSettings, label: str) -> dict[str, Any]:
    """The options of a label. A method that takes a text gets the beginning of the corpus."""
    own = dict(settings.method_options.get(label, {}))
    return {"text": settings.text} | own if "text" in sampler_class(label).__dataclass_fields__ else own


def donor_and_model(settings: TrialSettings, label: str) -> dict[str, Any]:
    """{donor, model} of the comparison, without what the method of the label does not take."""
    options = sampler_class(label).__dataclass_fields__
    return {key: value for key, value in (("donor", settings.donor), ("model", settings.model)) if key in options}


def donor_facts(zoo: Zoo, name: str) -> dict[str, Any]:
    """The provenance of a donor, its parameters, and the loss and tokens of its training where they are known."""
    donor = zoo.donor(name)
    return provenance(donor) | {
        "parameters": donor.parameters,
        **{key: value if is_kind(value := donor.facts.get(key), float) else None for key in ("loss", "tokens")},
    }


def run_path(settings: TrialSettings, trial: Trial, lr: float) -> Path:
    """The file of a run, named after all that its numbers depend on."""
    sampler = sampler_class(trial.label)
    dependencies = {
        "target": settings.target,
        "method": method_name(trial.label),
        "settings": settings.method_options.get(trial.label, {}),
        "donor": donor_and_model(settings, trial.label).get("donor"),  # the model by its content, below
        "seed": trial.seed,
        "scale": trial.scale,
        "lr": lr,
        "training": [
            settings.steps, settings.batch_size, settings.sequence, settings.windows, settings.device, settings.threads,
            *([] if settings.dtype == "float32" else [settings.dtype]),  # names of runs from before there was a choice
        ],
        "points": evaluation_points(settings.steps),
        "tokens": settings.fingerprint["tokens"],
        "zoo": settings.fingerprint["zoo"] if sampler.needs else None,
        "model": settings.fingerprint["model"] if "model" in sampler.needs else None,
    }  # fmt: skip
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


def training_token_count(tokens: Tensor) -> int:
    """How many tokens of a corpus are trained on; the rest is held out."""
    return int(len(tokens) * (1 - HELD_OUT))
