"""`headstart compare`: one target trained from several initialisations under the same conditions: which ones help."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from headstart.compare.trials import (
    HELD_OUT,
    OTHER_COORDINATES,
    Job,
    TrialSettings,
    donor_and_model,
    label_options,
    method_name,
    method_options,
    read_trial,
    run_trial,
    sampler_class,
    training_token_count,
    trial_path,
    without_finished,
)
from headstart.generate.generate import generate
from headstart.generate.sampling import build_sampler, fit_sampler, language_model_blueprint
from headstart.report.scores import REFERENCE, Run, score, tune
from zoo.checkpoints.writer import replace_file, writing
from zoo.errors import UserError
from zoo.training.corpora import encode_corpus
from zoo.training.workers import default_workers, run_jobs
from zoo.vocabulary import BYTE_VOCAB, find_tokenizer

if TYPE_CHECKING:
    from zoo.checkpoints.checkpoint import Checkpoint

CALIBRATION = 0.8  # of the corpus' characters, its beginning: the text of methods that look at activations
SMALL = 5_000_000  # parameters of a target that does not train faster on several CPU threads


def compare(
    target: str | Path | dict[str, Any],
    zoo: str | Path | None,
    methods: Sequence[str],
    corpus: str | Path,
    steps: int,
    seeds: Sequence[int],
    lrs: Sequence[float],
    out: str | Path,
    model: str | Path | None = None,
    tokenizer: str | Path | None = None,
    donor: str | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    batch_size: int = 16,
    sequence: int = 64,
    windows: int = 64,
    default_scales: Sequence[float] = (1.0, 2.0, 4.0),
    device: str = "cpu",
    workers: int | None = None,
    tuning_seeds: int | None = None,
    keep_going: bool = False,
    quiet: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Trains `target` from every method x seed x learning rate on the same batches per seed, and writes results.json,
    report.html and losses.png into `out`; returns the results.

    methods         NAME, or NAME:KEY=VALUE:… for a variant; `default` is put first if it is not among them
    settings        {method as it is called in `methods`: {option: value}}
    windows         of `sequence` tokens of the corpus' last tenth, on which all losses are measured
    default_scales  multiply the default initialisation and are tuned with its learning rate: the usual std of 0.02 is
                    meant for wide models and holds narrow ones back
    tuning_seeds    learning rates (and the default's scale) are tuned on so many of the seeds, the first ones, and the
                    others run at what was chosen; by default on all of them
    workers         processes of one CPU thread each; their number changes no result. By default one per core for a
                    target of up to 5 M parameters on a CPU; a larger one is trained in one process that uses all
                    cores, and then sums are rounded otherwise than with one thread: losses differ in their last digits
                    between machines of different core counts, and from those of a given number of workers
    keep_going      methods that refuse this target, zoo or model are left out, with their reasons in the results

    Raises UserError before anything is trained or written: no such method, a corpus too short, no tokenizer, an `out`
    that holds something else, a donor or a trained model that does not fit.
    """
    from tqdm import tqdm

    out = Path(out)
    methods = list(dict.fromkeys([REFERENCE, *methods] if REFERENCE not in methods else methods))
    settings = {label: label_options(label) | dict((settings or {}).get(label, {})) for label in methods} | {
        label: dict(options) for label, options in (settings or {}).items() if label not in methods
    }
    for label in settings:
        sampler_class(label)
    _check_numbers(steps, seeds, lrs, default_scales)
    for option, number in (("batch-size", batch_size), ("sequence", sequence), ("windows", windows)):
        if number < 1:
            raise UserError(f"--{option} {number}: must be at least 1")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    if tuning_seeds is not None and not 1 <= tuning_seeds <= len(seeds):
        raise UserError(f"--tuning-seeds {tuning_seeds}: must be between 1 and the {len(seeds)} seeds")
    blueprint = language_model_blueprint(target if isinstance(target, dict) else str(target))
    if blueprint.config is None or blueprint.metadata is None:
        raise UserError(f"{target}: compare needs the config of a language model")
    vocab = blueprint.metadata.vocab
    source = _tokenizer(tokenizer, target, zoo, vocab)
    tokens = encode_corpus(corpus, source, vocab)
    _check_lengths(corpus, tokens, sequence, blueprint.config)
    runs = out / "runs"
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not runs.is_dir())):
        raise UserError(f"{out}: exists and holds no comparison; give another --out, or remove it")
    small = blueprint.parameters <= SMALL and _device(device) == "cpu"
    setup = TrialSettings(
        target=blueprint.config,
        zoo=None if zoo is None else str(zoo),
        donor=donor,
        model=None if model is None else str(model),
        tokenizer=None if source is None else str(source),
        text="",
        settings=settings,
        steps=steps,
        batch_size=batch_size,
        sequence=sequence,
        windows=windows,
        device=_device(device),
        threads=1 if small or workers is not None else os.cpu_count() or 1,
        tokens="",
        runs=str(runs),
        fingerprint={
            "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            "zoo": hash_zoo(zoo),
            "model": hash_model(model),
        },
    )
    tuning = tuple(seeds[: tuning_seeds or len(seeds)])
    grid = [
        Job(method, seed, scale, tuple(lrs))
        for seed in tuning  # the first seed of every method first: what does not fit shows at once
        for method in methods
        for scale in (default_scales if method == REFERENCE else (1.0,))
    ]
    with tempfile.TemporaryDirectory(prefix="headstart-") as texts:
        setup = replace(setup, text=str(_calibration_text(corpus, Path(texts))))
        unread = list(dict.fromkeys(job.method for job in grid if without_finished(setup, job).lrs))
        refused = _dry_fit(setup, unread, out, keep_going)
        methods = [name for name in methods if name not in refused]
        grid = [job for job in grid if job.method not in refused]
        total = (sum(len(j.lrs) for j in grid) + len(methods) * (len(seeds) - len(tuning))) * steps
        with writing(out):
            runs.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=".work-", dir=out) as work,
            tqdm(total=total, unit="step", desc="compare", disable=quiet) as bar,
        ):
            setup = replace(setup, tokens=str(Path(work) / "tokens.npy"))
            np.save(setup.tokens, tokens.numpy())

            def finish(jobs: Sequence[Job]) -> list[Run]:
                missing = [job for job in (without_finished(setup, j) for j in jobs) if job.lrs]
                bar.update((sum(len(j.lrs) for j in jobs) - sum(len(j.lrs) for j in missing)) * steps)
                run_jobs(partial(run_trial, setup), missing, workers or (default_workers() if small else 1), bar.update)
                files.extend(trial_path(setup, job, lr).name for job in jobs for lr in job.lrs)
                return [read_trial(setup, job, lr) for job in jobs for lr in job.lrs]

            files: list[str] = []
            found = finish(grid)
            best = {name: tune([r for r in found if r["method"] == name])[0] for name in methods}
            chosen = [(name, *key) for name, key in best.items() if key is not None]
            found += finish([Job(n, seed, scale, (lr,)) for seed in seeds[len(tuning) :] for n, scale, lr in chosen])
    threshold, scored = score(found, steps, tuning)
    for name, entry in scored.items():
        sampler = sampler_class(name)
        entry |= {"summary": sampler.summary, "reference": sampler.reference, "options": setup.settings.get(name, {})}
        if sampler.family == "generative":
            entry |= {"novelty": None, "novelty_note": OTHER_COORDINATES}
    results = {
        "target": blueprint.config,
        "parameters": blueprint.parameters,
        "corpus": {
            "name": Path(corpus).name,
            "sha256": hashlib.sha256(Path(corpus).read_bytes()).hexdigest(),
            "tokens": len(tokens),
            "held_out": int(len(tokens) - training_token_count(tokens)),
            "tokenizer": "bytes" if source is None else source.name,
        },
        "steps": steps,
        "seeds": list(seeds),
        "threshold": threshold,
        "methods": scored,
        "refused": refused,
        "runs": sorted(files),
        "grid": [float(f"{lr:g}") for lr in sorted(lrs)],
        "tuning_seeds": list(tuning),
        "batch_size": batch_size,
        "sequence": sequence,
        "windows": windows,
        "device": setup.device,
        "command": command,
    }
    write_results(out, results)
    return results


def write_results(out: Path, results: dict[str, Any]) -> None:
    """results.json, losses.png and report.html in `out`."""
    from headstart.report import comparison as report
    from headstart.report import plots

    replace_file(out / "results.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    replace_file(out / "losses.png", plots.loss_curves_png(results))
    replace_file(out / "report.html", report.page(results).encode())


def _calibration_text(corpus: str | Path, folder: Path) -> Path:
    """A file with the beginning of the corpus, which held-out tokens are no part of."""
    text = Path(corpus).read_bytes()
    path = folder / "calibration.txt"
    path.write_bytes(text[: int(len(text) * CALIBRATION)].decode("utf-8", errors="ignore").encode())
    return path


def _dry_fit(setup: TrialSettings, methods: Sequence[str], out: Path, keep_going: bool) -> dict[str, str]:
    """Lets every method refuse what does not fit before anything is trained: {method: reason}, or the first of these
    errors. What a trained model fits shows when it is loaded, so those methods are fitted."""
    refused = {}
    for method in methods:
        try:
            _dry(setup, method, out)
        except UserError as error:
            if not keep_going or method == REFERENCE:
                raise
            refused[method] = str(error)
    return refused


def _dry(setup: TrialSettings, method: str, out: Path) -> None:
    from zoo.donors.store import Zoo

    cls, given = sampler_class(method), donor_and_model(setup, method)
    options = [f"{key}={value}" for key, value in method_options(setup, method).items()]
    generate(
        setup.target,
        method_name(method),
        out,
        zoo=setup.zoo,
        settings=options,
        device=setup.device,
        plan=True,
        quiet=True,
        donor=given.get("donor"),
        model=given.get("model"),
        tokenizer=setup.tokenizer,
    )
    if "model" in cls.needs:
        sampler = build_sampler(cls, options, device=setup.device, tokenizer=setup.tokenizer, **given)
        fit_sampler(sampler, None if setup.zoo is None else Zoo.open(setup.zoo), language_model_blueprint(setup.target))


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _check_numbers(steps: int, seeds: Sequence[int], lrs: Sequence[float], scales: Sequence[float]) -> None:
    if steps < 1:
        raise UserError(f"--steps {steps}: at least one step is needed")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError("--seeds: give different numbers, such as 0,1,2")
    if not lrs or len(set(lrs)) < len(lrs) or not all(0 < lr < math.inf for lr in lrs):
        raise UserError("--lrs: give different positive numbers, such as 1e-3,3e-3")
    if not all(0 < scale < math.inf for scale in scales) or 1.0 not in scales or len(set(scales)) < len(scales):
        raise UserError("--default-scales: give different positive numbers with 1 among them, such as 1,2,4")


def _check_lengths(corpus: str | Path, tokens: Tensor, sequence: int, config: dict[str, Any]) -> None:
    held = len(tokens) - training_token_count(tokens)
    if held < sequence + 1:
        least = math.ceil((sequence + 1) / HELD_OUT)
        raise UserError(f"{corpus}: {len(tokens)} tokens are too few; give at least {least} for windows of {sequence}")
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(positions, int) and sequence > positions:
        raise UserError(f"windows of {sequence} tokens do not fit the target, which has {positions} positions")


def _tokenizer(
    given: str | Path | None, target: str | Path | dict[str, Any], zoo: str | Path | None, vocab: int
) -> Path | None:
    """The folder of the tokenizer: the given one, else the target's, else that of the donors with the target's
    vocabulary, which must agree. None: bytes."""
    from zoo.donors.store import Zoo

    found = find_tokenizer(given, target)
    if found is not None:
        return found
    if not isinstance(target, dict) and Path(target).exists():
        folder = Path(target) if Path(target).is_dir() else Path(target).parent
        for name in ("tokenizer.model", "vocab.json"):
            if (folder / name).is_file():
                again = "load it with AutoTokenizer and write it with save_pretrained"
                raise UserError(f"{folder}: its tokenizer has {name} and no tokenizer.json; {again}")
    alike: list[Checkpoint] = []
    if zoo is not None:
        alike = [
            d
            for d in Zoo.open(zoo).donors
            if d.vocabulary() is not None and d.blueprint.metadata is not None and d.blueprint.metadata.vocab == vocab
        ]
    if not alike:
        return None
    if any(d.vocabulary() != alike[0].vocabulary() for d in alike):
        if vocab == BYTE_VOCAB:
            return None
        raise UserError(f"{zoo}: the donors have different tokenizers; say with --tokenizer which one the target uses")
    return alike[0].folder


def hash_zoo(zoo: str | Path | None) -> str | None:
    from zoo.donors.store import Zoo

    if zoo is None:
        return None
    lines = "".join(f"{d.name} {d.sha256}\n" for d in Zoo.open(zoo).donors)
    return hashlib.sha256(lines.encode()).hexdigest()


def hash_model(model: str | Path | None) -> str | None:
    """Of the files of a trained model's folder; a hub id stands for itself."""
    if model is None or not Path(model).is_dir():
        return None if model is None else str(model)
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(model).rglob("*") if p.is_file()):
        with path.open("rb") as f:
            digest.update(f"{path.relative_to(model)} {hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
