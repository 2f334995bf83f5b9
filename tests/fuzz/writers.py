"""The commands that write, with small inputs: what the kill harness cuts off."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from safetensors import safe_open

from tests.fuzz.materials import TEXT, language_model
from tests.support import commands
from tests.support.tiny import config
from zoo.donors.verify import verify

if TYPE_CHECKING:
    from zoo.training.recipes import DonorRecipe

ZOO_LISTS = ("zoo/manifest.parquet", "zoo/index.json")
SHAPES = (dict(hidden_size=16, kv=2, vocab_size=256), dict(hidden_size=24, kv=2, vocab_size=256))


@dataclass(frozen=True)
class Writer:
    """One command that writes.

    run      (inputs, place, again): runs it into `place`; `again` after an interruption
    prepare  (inputs, place): fills `place` with what is there before
    states   globs of the files in `place` that may have other bytes after an interruption than in the end: the state
             of a training, the list of a zoo's donors so far
    refuses_a_second   whether a second process with the same output is refused; else it waits for the first
    """

    run: Callable[[Path, Path, bool], object]
    prepare: Callable[[Path, Path], object] = lambda inputs, place: None
    states: tuple[str, ...] = ()
    refuses_a_second: bool = True


def build_inputs(folder: Path) -> None:
    """Fills a folder with what the commands read: donors, a zoo, a target, a model with a tokenizer, an autoencoder."""
    from tests.support.generators import train_tiny_autoencoder
    from tests.support.tiny import make_zoo
    from zoo.add import add

    make_zoo(folder, SHAPES)
    add([str(folder / "sources" / "d0")], folder / "zoo-of-one", quiet=True)
    config(16, 2, layers=1).save_pretrained(folder / "target")
    language_model(folder / "model")
    (folder / "corpus.txt").write_text(TEXT)
    train_tiny_autoencoder(folder / "zoo", folder / "autoencoder", folder / "corpus.txt")


def generate(inputs: Path, place: Path, again: bool) -> None:
    commands.generate(inputs / "model", "weight-selection", place / "out", donor=str(inputs / "model"))


def generate_with_scratch(inputs: Path, place: Path, again: bool) -> None:
    """The method keeps intermediate files; the output's folder and its parent are new."""
    commands.generate(inputs / "target", "matrix-normal", place / "new" / "out", zoo=inputs / "zoo")


def lora(inputs: Path, place: Path, again: bool) -> None:
    """PiSSA writes the changed base too."""
    commands.lora(inputs / "model", "pissa", 2, place / "out")


def zoo_add(inputs: Path, place: Path, again: bool) -> None:
    from zoo.add import add

    add([str(inputs / "sources" / "d0"), str(inputs / "sources" / "d1")], place / "zoo", quiet=True)


def zoo_merge(inputs: Path, place: Path, again: bool) -> None:
    from zoo.filling.merge import merge

    merge([inputs / "zoo-of-one", inputs / "zoo"], place / "zoo", quiet=True)


def zoo_merge_with_copies(inputs: Path, place: Path, again: bool) -> None:
    """As onto another disk."""
    from zoo.filling import merge as module

    with patch.object(module, "_link", return_value=False):
        module.merge([inputs / "zoo-of-one", inputs / "zoo"], place / "zoo", quiet=True)


def zoo_train(inputs: Path, place: Path, again: bool) -> None:
    from zoo.training.embedded_zoo import train_zoo

    train_zoo(place / "zoo", micro_recipes(), workers=1, quiet=True)


def micro_recipes() -> list[DonorRecipe]:
    from zoo.training.recipes import DonorRecipe

    return [
        DonorRecipe(16, 1, heads=2, kv_heads=1, head_dim=8, ffn=32, steps=1, seed=seed, batch_size=1, sequence=16)
        for seed in (0, 1)
    ]


def train_autoencoder(inputs: Path, place: Path, again: bool) -> None:
    from autoencoder import training
    from tests.support.generators import AUTOENCODER, train_tiny_autoencoder

    small = replace(AUTOENCODER, steps=1, warmup=1, reconstruction=1, shapes=1)
    with patch.object(training, "SAVE_EVERY", 1):
        train_tiny_autoencoder(inputs / "zoo", place / "out", inputs / "corpus.txt", small, resume=again)


def train_diffusion(inputs: Path, place: Path, again: bool) -> None:
    from diffusion import training
    from tests.support.generators import DIFFUSION, train_tiny_diffusion

    small = replace(DIFFUSION, steps=1, tuning=1, shapes=1)
    paths = inputs / "zoo", inputs / "autoencoder", place / "out", inputs / "corpus.txt"
    with patch.object(training, "SAVE_EVERY", 1):
        train_tiny_diffusion(*paths, small, resume=again)


def compare(inputs: Path, place: Path, again: bool) -> None:
    from headstart.compare import starts

    options: dict[str, Any] = dict(steps=1, seeds=(0,), lrs=(1e-3,), batch_size=1, sequence=16, windows=1, workers=1)
    methods, corpus = ("default", "normal"), inputs / "corpus.txt"
    with patch.object(starts, "time", types.SimpleNamespace(perf_counter=lambda: 0.0)):  # seconds are recorded
        commands.compare(
            target=inputs / "model", methods=methods, corpus=corpus, donor=str(inputs / "model"), out=place / "out",
            **options,
        )  # fmt: skip


def analyze(inputs: Path, place: Path, again: bool) -> None:
    commands.analyze(place / "out", donor=str(inputs / "model"), ranks=(4,), bootstraps=2)


def evaluate(inputs: Path, place: Path, again: bool) -> None:
    (inputs / "questions.jsonl").write_text('{"query": "a b", "choices": [" c", " d"], "gold": 0}\n')
    commands.evaluate(inputs / "model", [str(inputs / "questions.jsonl")], out=place / "scores.json")


def demo(inputs: Path, place: Path, again: bool) -> None:
    """All stages in one folder. demo.json lists the stages that a run had to do, so it is removed in the end."""
    from headstart import demo as module
    from headstart.compare import starts
    from headstart.config import DemoConfig
    from zoo.training import recipes

    sizes = module.DemoSizes(
        "micro", autoencoder=dict(steps=1, warmup=1, reconstruction=1, shapes=1, batch=1, sequence=8),
        diffusion=dict(steps=1, tuning=1, batch=1, tuning_windows=1, sequence=8, hidden=32, layers=1, shapes=1),
        compare_steps=1, seeds=(0,), lrs=(3e-3,), default_scales=(1.0,), batch_size=1, methods=("default",),
    )  # fmt: skip
    with (
        patch.dict(recipes.PRESETS, micro=micro_recipes),
        patch("os.cpu_count", return_value=1),
        patch.object(starts, "time", types.SimpleNamespace(perf_counter=lambda: 0.0)),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        module.demo(DemoConfig(out=str(place / "out")), sizes=sizes, quiet=True)
    (place / "out" / "demo.json").unlink()


def save_sampler(inputs: Path, place: Path, again: bool) -> None:
    """A fitted sampler in place of an older one, through the Python interface."""
    from headstart import samplers
    from zoo.donors.zoo import Zoo
    from zoo.targets.blueprint import Blueprint

    sampler = samplers.get("histogram")()
    sampler.fit(Zoo.open(inputs / "zoo"), Blueprint.from_config(inputs / "target"))
    sampler.save(place / "out")


WRITERS: dict[str, Writer] = {
    "generate": Writer(generate),
    "generate with scratch files": Writer(generate_with_scratch),
    "lora": Writer(lora),
    "zoo add": Writer(zoo_add, states=ZOO_LISTS, refuses_a_second=False),
    "zoo add to a zoo": Writer(
        zoo_add, lambda inputs, place: shutil.copytree(inputs / "zoo-of-one", place / "zoo"), ZOO_LISTS, False
    ),
    "zoo merge": Writer(zoo_merge, states=ZOO_LISTS, refuses_a_second=False),
    "zoo merge with copies": Writer(zoo_merge_with_copies, states=ZOO_LISTS, refuses_a_second=False),
    "zoo train": Writer(zoo_train, states=ZOO_LISTS),
    "train autoencoder": Writer(train_autoencoder, states=("out/training.safetensors",)),
    "train diffusion": Writer(train_diffusion, states=("out/training.safetensors",)),
    "compare": Writer(compare),
    "analyze": Writer(analyze),
    "evaluate": Writer(evaluate, refuses_a_second=False),
    "demo": Writer(
        demo, states=("out/*/training.safetensors", "out/zoo/manifest.parquet", "out/zoo/index.json", "out/demo.json")
    ),
    "save a sampler": Writer(save_sampler, refuses_a_second=False),
}


def is_whole_state(path: Path) -> bool:
    """Whether a training state can be read to its end, or a manifest or index is that of its zoo."""
    if path.name == "demo.json":
        return set(json.loads(path.read_text())) == {"stages", "versions"}
    if path.suffix != ".safetensors":
        return verify(path.parent) == []
    with safe_open(path, "pt") as f:
        return all(f.get_tensor(name) is not None for name in f.keys())  # noqa: SIM118
