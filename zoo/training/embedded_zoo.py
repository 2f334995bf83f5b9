"""Trains the embedded zoo: tiny Llama-like models on texts that come with Python, or on given ones.

Each run is trained in one thread from its own random stream. The bytes of its donors depend on its recipe and its text
only, not on the number of processes. Donors that are already in the zoo are kept; an interrupted run begins again.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.add import add
from zoo.checkpoints.atomic import disk_errors, hold_lock, new_folder
from zoo.checkpoints.files import read_json
from zoo.errors import UserError, unknown
from zoo.filling.publish import merge_manifest
from zoo.limits import MAX_CONFIG
from zoo.progress import without_progress_bars
from zoo.streams import stream_seed
from zoo.training.cards import donor_card
from zoo.training.corpora import (
    EMBEDDED_TEXTS,
    REFERENCE_TITLE,
    read_training_texts,
    split_held_out,
    text_sha256,
)
from zoo.training.loop import evaluate, reproducible, train_steps
from zoo.training.recipes import PRESETS, SPECIALISTS, DonorRecipe, SpecialistRecipe, specialist_recipes
from zoo.training.workers import ReportProgress, default_workers, run_jobs
from zoo.vocabulary import BYTE_VOCAB, byte_tokens, save_byte_tokenizer

STAGING = ".nursery"  # inside the zoo: trained donors that are not added yet
ORIGIN = "headstart zoo train"  # the source in the donors' records, which must not depend on where the zoo is
REPORT_EVERY = 10  # steps between two reports to the progress bar


@dataclass(frozen=True)
class TrainingRun:
    """A recipe and the text that it names, training and held-out parts together."""

    recipe: DonorRecipe
    text: bytes


def train_zoo(
    zoo: str | Path,
    preset: str | Sequence[DonorRecipe] = "demo",
    seed: int = 0,
    workers: int | None = None,
    quiet: bool = False,
    corpora: Mapping[str, str | Path] | None = None,
) -> list[str]:
    """Trains the donors of `preset` (a name, or recipes) that the zoo lacks, adds them, and returns the names of all.

    seed: added to the seed of every recipe. workers: number of processes, by default one per core; it does not change
    the donors. corpora: {name: file or folder of text}, beside the embedded texts, for the preset `specialists` or for
    recipes that name them. Every ninth block of 4096 bytes of a text is held out.

    Raises UserError for an unknown preset, for a corpus that is not used, cannot be read or is too short, for a name
    that no corpus can have, and for a donor of the same name from another recipe or another text."""
    zoo, corpora = Path(zoo), dict(corpora or {})
    recipes = [replace(recipe, seed=recipe.seed + seed) for recipe in _recipes(preset, corpora)]
    texts = _read_texts(recipes, corpora)
    runs = [TrainingRun(recipe, texts[recipe.text_name]) for recipe in recipes]
    with disk_errors(zoo):
        zoo.mkdir(parents=True, exist_ok=True)
        with hold_lock(zoo / f"{STAGING}.lock", zoo, wait=0):
            _train_missing(zoo, runs, workers or default_workers(), quiet)
    return [name for recipe in recipes for name in recipe.donor_names.values()]


def _recipes(preset: str | Sequence[DonorRecipe], corpora: Mapping[str, str | Path]) -> Sequence[DonorRecipe]:
    if not isinstance(preset, str):
        return preset
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    if preset == SPECIALISTS:
        return specialist_recipes([*EMBEDDED_TEXTS, *corpora])
    return PRESETS[preset]()


def _read_texts(recipes: Sequence[DonorRecipe], corpora: Mapping[str, str | Path]) -> dict[str, bytes]:
    """The texts that the recipes name, by name."""
    names = {recipe.text_name for recipe in recipes}
    if unused := sorted(set(corpora) - names):
        raise UserError(
            f"--corpus {unused[0]}: no donor of this preset learns from it; leave it out, or use --preset {SPECIALISTS}"
        )
    if lacking := sorted(names - set(corpora) - set(EMBEDDED_TEXTS)):
        raise UserError(f"no text for the corpus {lacking[0]!r}; give it with --corpus {lacking[0]}=FILE")
    given = read_training_texts(corpora)
    return {name: given[name] if name in given else EMBEDDED_TEXTS[name]() for name in sorted(names)}


def _train_missing(zoo: Path, runs: Sequence[TrainingRun], workers: int, quiet: bool) -> None:
    """Trains the donors that the zoo lacks and adds them. The zoo's lock for training must be held."""
    from tqdm import tqdm

    staging = zoo / STAGING
    donors = [(name, run) for run in runs for name in run.recipe.donor_names.values()]
    missing = [(name, run) for name, run in donors if not _is_complete(zoo / "models" / name, run)]
    untrained = [run for name, run in missing if not _is_complete(staging / name, run)]
    todo = sorted((run for run in runs if run in untrained), key=lambda run: run.recipe.cost, reverse=True)
    staging.mkdir(parents=True, exist_ok=True)
    total = sum(run.recipe.steps for run in runs)
    n_trained = len(donors) - sum(len(run.recipe.donor_names) for run in todo)
    with tqdm(total=total, initial=total - sum(run.recipe.steps for run in todo), unit="step", disable=quiet) as bar:
        bar.set_description(f"training donors: {n_trained}/{len(donors)} finished")

        def on_finish(run: TrainingRun) -> None:
            nonlocal n_trained
            n_trained += len(run.recipe.donor_names)
            bar.set_description(f"training donors: {n_trained}/{len(donors)} finished")

        run_jobs(partial(train_run, staging), todo, workers, bar.update, on_finish)
    if missing:
        add([str(staging / name) for name, _ in missing], zoo, quiet=True, origin=ORIGIN)
    else:  # the process that trained them may have been killed before it wrote the manifest
        merge_manifest(zoo)
    shutil.rmtree(staging)


def train_run(folder: Path, run: TrainingRun, report: ReportProgress = lambda steps: None) -> None:
    """Trains one model in this process and writes its donors into `folder`, each as soon as it is complete.

    report: called with the number of steps since its last call. Raises UserError where the training diverges."""
    recipe, names = run.recipe, run.recipe.donor_names
    training_text, held_out = (byte_tokens(part) for part in split_held_out(run.text))
    with reproducible():
        model = _new_model(recipe)
        for step in train_steps(model, training_text, recipe.training):
            if not (math.isfinite(step.loss) and math.isfinite(step.grad_norm)):
                raise UserError(
                    f"{recipe.name}: training diverged at step {step.number}; give a lower lr in its recipe"
                )
            if step.number % REPORT_EVERY == 0:
                report(REPORT_EVERY)
            if step.number in names:
                loss = evaluate(model, held_out, recipe.sequence, limit=recipe.held_out_windows)
                _write_donor(folder / names[step.number], model, run, _facts(run, step.number, loss))
        report(recipe.steps % REPORT_EVERY)


def _new_model(recipe: DonorRecipe) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=BYTE_VOCAB,
        hidden_size=recipe.width,
        intermediate_size=recipe.ffn,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=round(recipe.init / recipe.width**0.5, 4),
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(stream_seed(recipe.seed, f"init {recipe.name}"))
    return LlamaForCausalLM(config)


def _facts(run: TrainingRun, step: int, loss: float) -> dict[str, Any]:
    """What facts.json says of the donor that is written after `step` steps."""
    recipe = run.recipe
    facts = {
        "loss": round(loss, 5),
        "tokens": step * recipe.batch_size * recipe.sequence,
        **{key: getattr(recipe, key) for key in ("seed", "steps", "lr", "batch_size", "sequence")},
        "corpus": REFERENCE_TITLE,
        "corpus_sha256": text_sha256(run.text),
    }
    if isinstance(recipe, SpecialistRecipe):
        steps = list(recipe.donor_names)
        facts |= {
            "corpus": recipe.corpus,
            "training_text_sha256": text_sha256(split_held_out(run.text)[0]),
            "run": recipe.name,
            "step": step,
            "checkpoint": steps.index(step) + 1,
            "checkpoints": len(steps),
        }
    return facts | {"recipe": asdict(recipe)}


def _write_donor(folder: Path, model: Any, run: TrainingRun, facts: dict[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with new_folder(folder) as partial_folder:
        with without_progress_bars():
            model.save_pretrained(partial_folder)
        save_byte_tokenizer(partial_folder)
        (partial_folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
        (partial_folder / "README.md").write_text(donor_card(folder.name, facts))


def _is_complete(folder: Path, run: TrainingRun) -> bool:
    """Whether `folder` holds a donor of this run. Raises UserError for one of another recipe or another text."""
    path = folder / "facts.json"
    if not path.is_file():
        return False
    facts = read_json(path, MAX_CONFIG)
    if facts.get("recipe") != asdict(run.recipe):
        raise UserError(f"{folder}: holds a donor of this name from another recipe; give another --zoo")
    if "run" in facts and facts.get("corpus_sha256") != text_sha256(run.text):
        raise UserError(
            f"{folder}: holds a donor of this name that learned another text; give another --zoo, or the text another "
            "name"
        )
    return True
