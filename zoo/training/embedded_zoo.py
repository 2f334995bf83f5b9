"""Trains the embedded zoo: tiny Llama-like models on text that comes with Python.

Each donor is trained in one thread from its own random stream. Its bytes depend on its recipe only, not on the number
of processes. A donor that is already in the zoo is kept; an interrupted one is trained from the beginning.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zoo.add import add
from zoo.checkpoints.atomic import disk_errors, hold_lock, new_folder
from zoo.checkpoints.files import read_json
from zoo.errors import UserError, unknown
from zoo.filling.publish import merge_manifest
from zoo.limits import MAX_CONFIG
from zoo.progress import without_progress_bars
from zoo.streams import stream_seed
from zoo.training.corpora import python_reference, split_held_out
from zoo.training.loop import TrainingConfig, evaluate, reproducible, train_steps
from zoo.training.workers import ReportProgress, default_workers, run_jobs
from zoo.vocabulary import BYTE_VOCAB, byte_tokens, save_byte_tokenizer

STAGING = ".nursery"  # inside the zoo: trained donors that are not added yet
CORPUS = "Python language reference (pydoc_data.topics)"
ORIGIN = "headstart zoo train"  # the source in the donors' records, which must not depend on where the zoo is
LICENSE = "mit"
REPORT_EVERY = 10  # steps between two reports to the progress bar


@dataclass(frozen=True)
class DonorRecipe:
    """One donor: its shape, and how it is trained. Two seeds of one shape share only the text."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    steps: int
    seed: int = 0
    head_dim: int = 16
    lr: float = 4e-3
    init: float = 0.8  # std of the initial matrices times sqrt(width); 0.02 is too small for narrow models
    batch_size: int = 4
    sequence: int = 64

    @property
    def name(self) -> str:
        return f"nursery-w{self.width}-l{self.layers}-h{self.heads}-kv{self.kv_heads}-s{self.seed}"

    @property
    def training(self) -> TrainingConfig:
        return TrainingConfig(
            self.steps, self.lr, self.batch_size, self.sequence, seed=stream_seed(self.seed, self.name)
        )

    @property
    def cost(self) -> float:
        """Rough amount of work in arbitrary units, to start the longest first."""
        return (self.layers * self.width * (4 * self.width + 3 * self.ffn) + 4e4) * self.training.tokens


def demo_recipes() -> list[DonorRecipe]:
    """Twelve donors for `headstart demo`: six shapes with two seeds each."""
    shapes = [
        DonorRecipe(48, 2, heads=3, kv_heads=3, ffn=128, steps=1000),
        DonorRecipe(48, 4, heads=3, kv_heads=1, ffn=144, steps=1000),
        DonorRecipe(64, 3, heads=4, kv_heads=4, ffn=176, steps=1000),
        DonorRecipe(64, 6, heads=4, kv_heads=2, ffn=160, steps=1000),
        DonorRecipe(96, 4, heads=6, kv_heads=3, ffn=256, steps=1000),
        DonorRecipe(128, 4, heads=8, kv_heads=8, ffn=336, steps=1000),
    ]
    return _with_seeds(shapes, 2)


def quick_recipes() -> list[DonorRecipe]:
    """Four small donors for `headstart demo --quick` and for experiments."""
    shapes = [
        DonorRecipe(48, 2, heads=3, kv_heads=3, ffn=128, steps=450),
        DonorRecipe(96, 4, heads=6, kv_heads=6, ffn=256, steps=350),
    ]
    return _with_seeds(shapes, 2)


def bench_recipes() -> list[DonorRecipe]:
    """Twelve donors for the benchmark's target: width 96, 4 layers, 6 heads, FFN 256.

    Every method finds a donor among them: half as wide and as deep (hypercloning), half as deep and as wide
    (stacking), larger in every size (pruning)."""
    shapes = [
        DonorRecipe(48, 4, heads=3, kv_heads=3, ffn=128, steps=1000),
        DonorRecipe(64, 3, heads=4, kv_heads=4, ffn=176, steps=1000),
        DonorRecipe(64, 6, heads=4, kv_heads=2, ffn=160, steps=1000),
        DonorRecipe(80, 3, heads=5, kv_heads=5, ffn=208, steps=1000),
        DonorRecipe(96, 2, heads=6, kv_heads=6, ffn=256, steps=1000),
        DonorRecipe(128, 4, heads=8, kv_heads=8, ffn=336, steps=1000),
    ]
    return _with_seeds(shapes, 2)


PRESETS: dict[str, Callable[[], list[DonorRecipe]]] = {
    "demo": demo_recipes,
    "quick": quick_recipes,
    "bench": bench_recipes,
}


def train_zoo(
    zoo: str | Path,
    preset: str | list[DonorRecipe] = "demo",
    seed: int = 0,
    workers: int | None = None,
    quiet: bool = False,
) -> list[str]:
    """Trains the donors of `preset` (a name, or recipes) that the zoo lacks, adds them, and returns the names of all.

    seed: added to the seed of every recipe. workers: number of processes, by default one per core; it does not change
    the donors. Raises UserError for an unknown preset, or for a donor of the same name from another recipe."""
    zoo = Path(zoo)
    if isinstance(preset, str) and preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    recipes = [replace(r, seed=r.seed + seed) for r in (PRESETS[preset]() if isinstance(preset, str) else preset)]
    with disk_errors(zoo):
        zoo.mkdir(parents=True, exist_ok=True)
        with hold_lock(zoo / f"{STAGING}.lock", zoo, wait=0):
            _train_missing(zoo, recipes, workers or default_workers(), quiet)
    return [r.name for r in recipes]


def _train_missing(zoo: Path, recipes: list[DonorRecipe], workers: int, quiet: bool) -> None:
    """Trains the donors that the zoo lacks and adds them. The zoo's lock for training must be held."""
    from tqdm import tqdm

    staging = zoo / STAGING
    missing = [r for r in recipes if not _is_complete(zoo / "models" / r.name, r)]
    trained = [r for r in missing if _is_complete(staging / r.name, r)]
    todo = sorted((r for r in missing if r not in trained), key=lambda r: r.cost, reverse=True)
    staging.mkdir(parents=True, exist_ok=True)
    total = sum(r.steps for r in recipes)
    with tqdm(total=total, initial=total - sum(r.steps for r in todo), unit="step", disable=quiet) as bar:
        bar.set_description(f"training donors: {len(recipes) - len(todo)}/{len(recipes)} finished")
        n_trained = len(recipes) - len(todo)

        def on_finish(recipe: DonorRecipe) -> None:
            nonlocal n_trained
            n_trained += 1
            bar.set_description(f"training donors: {n_trained}/{len(recipes)} finished")

        run_jobs(partial(_train_into, staging), todo, workers, bar.update, on_finish)
    if missing:
        add([str(staging / r.name) for r in missing], zoo, quiet=True, origin=ORIGIN)
    else:  # the process that trained them may have been killed before it wrote the manifest
        merge_manifest(zoo)
    shutil.rmtree(staging)


def _train_into(staging: Path, recipe: DonorRecipe, report: ReportProgress) -> None:
    train_donor(recipe, staging / recipe.name, report)


def train_donor(recipe: DonorRecipe, folder: Path, report: ReportProgress = lambda steps: None) -> None:
    """Trains one donor in this process and writes it to `folder`, which appears when it is complete.

    report: called with the number of steps since its last call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    text = python_reference()
    training_text, held_out = (byte_tokens(part) for part in split_held_out(text))
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
    with reproducible():
        torch.manual_seed(stream_seed(recipe.seed, f"init {recipe.name}"))
        model = LlamaForCausalLM(config)
        for step in train_steps(model, training_text, recipe.training):
            if step.number % REPORT_EVERY == 0:
                report(REPORT_EVERY)
        report(recipe.steps % REPORT_EVERY)
        loss = evaluate(model, held_out, recipe.sequence)
    facts = {
        "loss": round(loss, 5),
        "tokens": recipe.training.tokens,
        **{key: getattr(recipe, key) for key in ("seed", "steps", "lr", "batch_size", "sequence")},
        "corpus": CORPUS,
        "corpus_sha256": hashlib.sha256(text).hexdigest(),
        "recipe": asdict(recipe),
    }
    shutil.rmtree(folder, ignore_errors=True)
    with new_folder(folder) as partial_folder:
        with without_progress_bars():
            model.save_pretrained(partial_folder)
        save_byte_tokenizer(partial_folder)
        (partial_folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
        (partial_folder / "README.md").write_text(_card(recipe, facts))


def _with_seeds(shapes: list[DonorRecipe], seeds: int) -> list[DonorRecipe]:
    return [replace(shape, seed=seed) for shape in shapes for seed in range(seeds)]


def _is_complete(folder: Path, recipe: DonorRecipe) -> bool:
    """Whether `folder` holds the donor of this recipe. Raises UserError for a donor of another recipe."""
    facts = folder / "facts.json"
    if not facts.is_file():
        return False
    if read_json(facts, MAX_CONFIG).get("recipe") != asdict(recipe):
        raise UserError(f"{folder}: holds a donor of this name from another recipe; give another --zoo")
    return True


def _card(recipe: DonorRecipe, facts: dict[str, Any]) -> str:
    return f"""---
license: {LICENSE}
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {recipe.name}

A byte-level Llama-style model of headstart's embedded zoo, made to study initial weights and of no use otherwise.
Trained on the {CORPUS} with `headstart zoo train`: {facts["steps"]} steps of
{facts["batch_size"]} x {facts["sequence"]} bytes at a peak learning rate of {facts["lr"]:g}, seed {facts["seed"]};
held-out loss {facts["loss"]:.3f} nats per byte.
"""
