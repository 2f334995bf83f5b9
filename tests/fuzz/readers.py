"""The kinds of files from outside, and the calls that read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import materials
from tests.support.commands import generate, lora


@dataclass(frozen=True)
class Reader:
    """One kind of file from outside. A run gets a copy of what was built, with one file damaged; it writes to `out`."""

    files: tuple[str, ...]  # globs of the files that are damaged
    build: Callable[[Path], object]  # fills an empty folder
    run: Callable[[Path, str], object]  # (the folder, the damaged file's path in it): reads that file


def files_of(reader: Reader, base: Path) -> list[str]:
    """The files of a built folder that are damaged, by their paths inside it."""
    found = sorted({str(p.relative_to(base)) for pattern in reader.files for p in base.glob(pattern) if p.is_file()})
    if not found:
        raise FileNotFoundError(f"{base}: holds none of {', '.join(reader.files)}")
    return found


def _checkpoint(folder: Path, damaged: str) -> None:
    from zoo.checkpoints.checkpoint import Checkpoint

    checkpoint = Checkpoint.open((folder / damaged).parent)
    for name in checkpoint.names:
        checkpoint.read(name)
    _ = checkpoint.facts


def _config(folder: Path, damaged: str) -> None:
    from zoo.targets.blueprint import Blueprint

    Blueprint.from_config(folder / damaged)


def _zoo_add(folder: Path, damaged: str) -> None:
    from zoo.add import add

    add([str(folder / "donor")], folder / "out", quiet=True)


def _gguf(folder: Path, damaged: str) -> None:
    from zoo.add import add

    add([str(folder / damaged)], folder / "out", quiet=True)


def _tokenizer(folder: Path, damaged: str) -> None:
    from zoo.training.corpora import encode_corpus

    own = (folder / damaged).parent
    generate(folder / "donor", "weight-selection", folder / "out", donor=str(folder / "donor"), tokenizer=own)
    encode_corpus(folder / "text.txt", own, 256)


def _adapter(folder: Path, damaged: str) -> None:
    from headstart.evaluate.models import load_model, locate_checkpoint_and_adapter
    from zoo.targets.blueprint import Blueprint

    Blueprint.from_lora(folder / "base", folder / "adapter")
    base, adapter = locate_checkpoint_and_adapter(folder / "adapter", folder / "base")
    load_model(base, adapter, None)


def _zoo(folder: Path, damaged: str) -> None:
    from zoo.donors.index import list_donors
    from zoo.donors.verify import stray_files, verify

    list_donors(folder / "zoo")
    verify(folder / "zoo")
    stray_files(folder / "zoo")
    generate(folder / "target.json", "normal", folder / "out", zoo=folder / "zoo")


def _pipeline(folder: Path, damaged: str) -> None:
    from autoencoder.loading import load_autoencoder
    from diffusion.pipeline import load_pipeline

    if damaged.startswith("autoencoder"):
        load_autoencoder(folder / "autoencoder")
    else:
        load_pipeline(folder / "pipeline")


def _resume(folder: Path, damaged: str) -> None:
    from tests.support.generators import train_tiny_autoencoder

    train_tiny_autoencoder(folder / "zoo", folder / "state", folder / "text.txt", resume=True)


def _sampler(folder: Path, damaged: str) -> None:
    from headstart import samplers
    from zoo.targets.blueprint import Blueprint

    target = Blueprint.from_config(folder / "target.json")
    for _ in samplers.load((folder / damaged).parent).sample(target, 0):
        pass


def _record(folder: Path, damaged: str) -> None:
    """A file that `headstart run` or `--config` reads, up to the checked configuration."""
    from headstart.config import config_of
    from headstart.config_file import read_options, split_flags

    options, _ = split_flags(read_options(folder / damaged), damaged)
    config_of(options, damaged).to_command()


def _questions(folder: Path, damaged: str) -> None:
    from headstart.evaluate.local_tasks import local_task

    local_task("questions", folder / damaged)["custom_dataset"]()


def _analysis(folder: Path, damaged: str) -> None:
    lora(folder / "donor", "pareto", 2, folder / "out", reference=str(folder / damaged))


def _corpus(folder: Path, damaged: str) -> None:
    from zoo.training.corpora import encode_corpus

    encode_corpus(folder / damaged, None, 256)


READERS: dict[str, Reader] = {
    "safetensors": Reader(("*.safetensors", "facts.json"), materials.language_model, _checkpoint),
    "shards": Reader(("donor/*.index.json", "donor/*.safetensors"), materials.sharded_model, _checkpoint),
    "config": Reader(("*/config.json",), materials.config_files, _config),
    "donor": Reader(
        ("donor/*.json", "donor/*.safetensors", "donor/README.md"),
        lambda folder: materials.language_model(folder / "donor"),
        _zoo_add,
    ),
    "gguf": Reader(("*/*.gguf",), materials.gguf_files, _gguf),
    "tokenizer": Reader(("*/*token*.json",), materials.tokenizer_files, _tokenizer),
    "adapter": Reader(("adapter/adapter_config.json", "adapter/*.safetensors"), materials.lora_adapter, _adapter),
    "zoo": Reader(
        ("zoo/*.parquet", "zoo/*.json", "zoo/models/*/*.json", "zoo/models/*/*.parquet"), materials.stored_zoo, _zoo
    ),
    "state": Reader(("state/*", "state/.*"), materials.training_state, _resume),
    "pipeline": Reader(
        ("pipeline/**/*.json", "pipeline/**/*.safetensors", "autoencoder/*"), materials.trained_pipeline, _pipeline
    ),
    "sampler": Reader(("normal/*", "histogram/*", "weight-selection/*"), materials.fitted_samplers, _sampler),
    "record": Reader(("made/headstart.json", "run.yaml"), materials.run_records, _record),
    "questions": Reader(("*.jsonl",), materials.question_files, _questions),
    "comparison": Reader(
        ("out/runs/*.json",), materials.finished_comparison, lambda folder, _: materials.run_comparison(folder)
    ),
    "analysis": Reader(("made/analysis.json",), materials.saved_analysis, _analysis),
    "corpus": Reader(("rows.*", "plain.txt"), materials.corpus_files, _corpus),
}
