"""One trial: an initialisation made the way a user makes it, trained with each learning rate, measured on the way.

Every run (method, seed, learning rate) is a small file in `runs`, named after a hash of all that it depends on, so
that a second call goes on where the first was interrupted, and methods can be added later.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from headstart import samplers
from headstart.generate.generate import generate
from headstart.report.scores import REFERENCE, Run, evaluation_points, spikes
from zoo.checkpoints.writer import replace_file
from zoo.errors import UserError
from zoo.streams import stream_seed
from zoo.training.loop import TrainingConfig, activation_rms, evaluate, reproducible, train_steps
from zoo.training.workers import ReportProgress

if TYPE_CHECKING:
    from zoo.donors.store import Zoo
    from zoo.sampler import Sampler

HELD_OUT = 0.1  # of the corpus, its end
OTHER_COORDINATES = "not measured: writes canonical coordinates, so distances as stored mean nothing"
NOVELTY_LIMIT = 50_000_000  # parameters of a target up to which distances to the donors are measured


@dataclass(frozen=True)
class TrialSettings:
    """What all runs of a comparison share."""

    target: dict[str, Any]  # the parsed config
    zoo: str | None
    donor: str | None
    model: str | None
    tokenizer: str | None  # the folder of the target's, None: bytes
    text: str  # a file of the corpus' beginning, for the methods that take a text
    settings: Mapping[str, Mapping[str, Any]]
    steps: int
    batch_size: int
    sequence: int
    windows: int  # held-out windows at each measurement
    device: str
    threads: int
    tokens: str  # .npy of the encoded corpus
    runs: str  # folder of finished runs
    fingerprint: Mapping[str, Any]  # what tokens, zoo and model contain, for the names of the runs


@dataclass(frozen=True)
class Job:
    """One initialisation (a sample of a method under a seed) and the learning rates it is still to be trained with."""

    method: str
    seed: int
    scale: float
    lrs: tuple[float, ...]


def run_trial(setup: TrialSettings, job: Job, report: ReportProgress) -> None:
    """Makes one initialisation the way a user does, and trains it with each learning rate."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # the comparison has its own
    tokens = torch.from_numpy(np.load(setup.tokens))
    learned, held = tokens[: training_token_count(tokens)], tokens[training_token_count(tokens) :]
    points = set(evaluation_points(setup.steps))
    with tempfile.TemporaryDirectory(dir=Path(setup.tokens).parent) as work, reproducible(setup.threads):
        init = Path(work) / "init"
        origin = _generate(setup, job.method, job.seed, job.scale, init)
        for lr in job.lrs:
            training = TrainingConfig(
                setup.steps, lr, setup.batch_size, setup.sequence, seed=stream_seed(job.seed, "compare")
            )
            torch.manual_seed(stream_seed(job.seed, "dropout"))
            model: Any = AutoModelForCausalLM.from_pretrained(init, dtype=torch.float32)
            model.to(setup.device)

            def measure(model: torch.nn.Module = model) -> float:
                return evaluate(model, held, setup.sequence, limit=setup.windows)

            steps, losses, norms, diverged = [0], [measure()], [], None
            start = activation_rms(model, held, setup.sequence)
            for step in train_steps(model, learned, training):
                if not (math.isfinite(step.loss) and math.isfinite(step.grad_norm)):
                    diverged = step.number
                    break
                norms.append(step.grad_norm)
                if step.number in points:
                    steps.append(step.number)
                    losses.append(measure())
                report(1)
            report(setup.steps - len(norms))
            bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
            if bad is not None:
                steps, losses, diverged = steps[:bad], losses[:bad], steps[bad]
            found: Run = {"method": job.method, "scale": job.scale, "seed": job.seed, "lr": lr}
            end = activation_rms(model, held, setup.sequence) if diverged is None else None
            found |= {"steps": steps, "losses": losses, "max_grad_norm": max(norms, default=0.0), "diverged": diverged}
            found |= {"grad_spikes": spikes(norms), "activation_rms": {"start": start, "end": end}, "init": origin}
            replace_file(trial_path(setup, job, lr), (json.dumps(found) + "\n").encode())


def _generate(setup: TrialSettings, method: str, seed: int, scale: float, folder: Path) -> dict[str, Any]:
    """Writes the initialisation and says where it comes from: {seconds, donors, novelty, novelty_note}."""
    from zoo.donors.store import Zoo

    options = method_options(setup, method)
    if method == REFERENCE and scale != 1.0:
        options["scale"] = scale
    given = donor_and_model(setup, method)
    start = time.perf_counter()
    generate(
        setup.target,
        method_name(method),
        folder,
        zoo=setup.zoo,
        settings=[f"{key}={value}" for key, value in options.items()],
        seed=seed,
        dtype="float32",
        device=setup.device,
        quiet=True,
        donor=given.get("donor"),
        model=given.get("model"),
        tokenizer=setup.tokenizer,
    )
    seconds = time.perf_counter() - start
    records = json.loads((folder / "headstart.json").read_text())["donors"]
    zoo = Zoo.open(setup.zoo) if setup.zoo is not None else None
    # A pipeline may have learned from donors that this zoo does not hold.
    unknown = dict.fromkeys(("parameters", "loss", "tokens"))
    names = [d["name"] for d in records if zoo is not None and d["name"] in zoo.names]
    measurable = sampler_class(method).family != "generative"
    novelty, note = nearest_donor(folder, zoo, names) if measurable else (None, OTHER_COORDINATES)
    return {
        "seconds": seconds,
        "donors": [unknown | d | (donor_facts(zoo, d["name"]) if zoo and d["name"] in names else {}) for d in records],
        "novelty": novelty,
        "novelty_note": note,
    }


def method_name(label: str) -> str:
    """The name of a method without the options of a variant: normal of normal:scale=2."""
    return label.partition(":")[0]


def sampler_class(label: str) -> type[Sampler]:
    return samplers.model_sampler(method_name(label))


def label_options(label: str) -> dict[str, str]:
    """{"scale": "2"} of "normal:scale=2"."""
    pairs = [setting.partition("=") for setting in label.split(":")[1:]]
    if not all(equals for _, equals, _ in pairs):
        raise UserError(f"--methods {label}: write a variant as NAME:KEY=VALUE")
    return {key: value for key, _, value in pairs}


def method_options(setup: TrialSettings, method: str) -> dict[str, Any]:
    """The settings of a method; one that takes a text gets the beginning of the corpus."""
    own = dict(setup.settings.get(method, {}))
    return {"text": setup.text} | own if "text" in sampler_class(method).__dataclass_fields__ else own


def donor_and_model(setup: TrialSettings, method: str) -> dict[str, str | None]:
    """The donor and the model, for the methods that take one."""
    options = sampler_class(method).__dataclass_fields__
    return {key: value for key, value in (("donor", setup.donor), ("model", setup.model)) if key in options}


def donor_facts(zoo: Zoo, name: str) -> dict[str, Any]:
    from zoo.donors.store import record

    donor = zoo.donor(name)
    return record(donor) | {
        "parameters": donor.parameters,
        "loss": donor.facts.get("loss"),
        "tokens": donor.facts.get("tokens"),
    }


def nearest_donor(folder: Path, zoo: Zoo | None, names: Sequence[str]) -> tuple[dict[str, Any] | None, str]:
    """Median over the matrices W of a generated checkpoint of min |W - D| / |W|, D over the donors' matrices of the
    same role and shape: ({"distance", "matrices"}, what it is), or (None, why it was not measured). No canonical form
    is taken, so a donor in other coordinates counts as far."""
    from zoo.checkpoints.checkpoint import Checkpoint

    if zoo is None or not names:
        return None, "uses no donor"
    generated = Checkpoint.open(folder)
    if generated.parameters > NOVELTY_LIMIT:
        return None, f"not measured above {NOVELTY_LIMIT:,} parameters"
    donors = [zoo.donor(name) for name in names]
    distances = []
    for spec in generated.blueprint.specs:
        if len(spec.shape) != 2:
            continue
        alike = [(d, s.name) for d in donors for s in d.blueprint.specs if (s.role, s.shape) == (spec.role, spec.shape)]
        if alike:
            ours = generated.read(spec.name, torch.float32)
            nearest = min(float((ours - d.read(name, torch.float32)).norm()) for d, name in alike)
            distances.append(nearest / max(float(ours.norm()), 1e-12))
    if not distances:
        return None, "no donor has a matrix of the same role and shape"
    matrices = sum(len(s.shape) == 2 for s in generated.blueprint.specs)
    found = {"distance": float(np.median(distances)), "matrices": len(distances), "of": matrices}
    return found, "median relative distance to the nearest donor matrix of the same role and shape, as stored"


def trial_path(setup: TrialSettings, job: Job, lr: float) -> Path:
    """The file of a run, named after all that its numbers depend on."""
    sampler = sampler_class(job.method)
    depends = {
        "target": setup.target,
        "method": method_name(job.method),
        "settings": setup.settings.get(job.method, {}),
        "donor": donor_and_model(setup, job.method).get("donor"),  # the model by its content, below
        "seed": job.seed,
        "scale": job.scale,
        "lr": lr,
        "training": [setup.steps, setup.batch_size, setup.sequence, setup.windows, setup.device, setup.threads],
        "points": evaluation_points(setup.steps),
        "tokens": setup.fingerprint["tokens"],
        "zoo": setup.fingerprint["zoo"] if sampler.needs else None,
        "model": setup.fingerprint["model"] if "model" in sampler.needs else None,
    }
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return Path(setup.runs) / f"{sampler_class(job.method).name}-s{job.seed}-lr{lr:g}-{digest}.json"


def read_trial(setup: TrialSettings, job: Job, lr: float) -> Run:
    return json.loads(trial_path(setup, job, lr).read_text())


def without_finished(setup: TrialSettings, job: Job) -> Job:
    return Job(job.method, job.seed, job.scale, tuple(lr for lr in job.lrs if not trial_path(setup, job, lr).exists()))


def training_token_count(tokens: Tensor) -> int:
    return int(len(tokens) * (1 - HELD_OUT))
