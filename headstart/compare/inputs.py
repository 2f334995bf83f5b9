"""What a comparison reads and checks before it writes anything: what is trained, the corpus, the tokenizer."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from headstart.compare.labels import compared_labels, label_options, sampler_class
from headstart.compare.run_files import RUNS
from headstart.compare.settings import AdapterSettings, TrialSettings
from headstart.compare.starts import AdapterStarts, open_zoo
from headstart.compare.trials import training_token_count
from headstart.config import CompareConfig, LoraConfig
from headstart.devices import torch_device
from headstart.generate.sampling import language_model_blueprint
from headstart.lora.lora import open_base, prepare_lora
from headstart.lora.reference import resolve_reference
from headstart.report.scores import REFERENCE
from zoo.checkpoints.files import read_bytes
from zoo.checkpoints.sources import resolve_source
from zoo.donors.folder import FolderDonor, StandaloneDonor
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.limits import MAX_JSON
from zoo.targets.blueprint import Blueprint
from zoo.training.corpora import HELD_OUT, encode_read_corpus, read_for_tokenizer, text_sha256
from zoo.training.documents import Corpus, TextSource, read_corpus
from zoo.vocabulary import BYTE_VOCAB, find_tokenizer, fits_padded

MAX_CALIBRATION = 100_000  # bytes at the beginning of the corpus, for methods that look at activations
CALIBRATION = 0.8  # largest share of the corpus for them: the last tenth of the tokens is held out
ONE_THREAD_PARAMETERS = 5_000_000  # parameters of a target that does not train faster on several CPU threads


@dataclass(frozen=True)
class Inputs:
    """What was read and checked before anything is written."""

    blueprint: Blueprint  # of the target, or of the base of adapters
    parameters: int  # that are trained
    labels: tuple[str, ...]  # `default` among them
    corpus: Corpus
    tokens: Tensor  # int64, the encoded corpus
    tokenizer: Path | None  # None for bytes
    settings: TrialSettings
    is_small: bool  # trains as fast on one thread


def read_inputs(config: CompareConfig) -> Inputs:
    """Raises UserError for what the user can correct: see `compare`."""
    adapter = _adapter_settings(config)
    labels = compared_labels(config.methods, adapter is not None)
    for label in labels:
        sampler_class(label, adapter is not None)
    base = None if adapter is None else open_base(resolve_source(adapter.base), quiet=True)
    target = config.target if base is None else base.folder
    assert target is not None
    blueprint = language_model_blueprint(target)
    if blueprint.config is None or blueprint.metadata is None:
        raise UserError(f"{target}: is not a language model's config; compare only trains language models")
    if base is not None:
        _check_language_model(base, blueprint)
    tokenizer = find_target_tokenizer(config.tokenizer, target, config.zoo, blueprint.metadata.vocab)
    source = TextSource(str(config.corpus), config.split, config.text_column)
    corpus = read_for_tokenizer(source, tokenizer, blueprint.metadata.vocab)
    tokens = encode_read_corpus(corpus, str(config.corpus), tokenizer, blueprint.metadata.vocab)
    check_lengths(config.corpus, tokens, config.sequence, blueprint.config)
    is_small = blueprint.parameters <= ONE_THREAD_PARAMETERS and torch_device(config.device) == "cpu"
    settings = _trial_settings(config, blueprint.config, labels, tokenizer, is_small)
    settings = replace(settings, adapter=adapter)
    settings = replace(settings, fingerprint=_fingerprint(config, settings, tokens, base))
    parameters = blueprint.parameters if adapter is None else adapter_parameters(settings)
    return Inputs(blueprint, parameters, labels, corpus, tokens, tokenizer, settings, is_small)


def adapter_parameters(settings: TrialSettings) -> int:
    """Weights of an adapter. Raises UserError where the base cannot be adapted so."""
    return prepare_lora(AdapterStarts(settings).lora_config(REFERENCE, "adapter")).blueprint.parameters


def _trial_settings(
    config: CompareConfig, target: dict[str, Any], labels: Sequence[str], tokenizer: Path | None, is_small: bool
) -> TrialSettings:
    """All but the adapters, the hashes, and the files that are written later."""
    return TrialSettings(
        target=target,
        zoo=None if config.zoo is None else str(config.zoo),
        donor=config.donor,
        model=None if config.model is None else str(config.model),
        tokenizer=None if tokenizer is None else str(tokenizer),
        text="",
        method_options={label: label_options(label) for label in labels},
        steps=config.steps,
        batch_size=config.batch_size,
        sequence=config.sequence,
        windows=config.windows,
        device=torch_device(config.device),
        dtype=config.dtype,
        threads=1 if is_small or config.workers is not None else os.cpu_count() or 1,
        tokens="",
        runs=str(Path(config.out) / RUNS),
        fingerprint={},
    )


def _adapter_settings(config: CompareConfig) -> AdapterSettings | None:
    if config.base is None:
        return None
    assert config.rank is not None
    reference = None if config.reference is None else str(config.reference)
    return AdapterSettings(str(config.base), config.rank, config.alpha, config.targets or LoraConfig.targets, reference)


def _check_language_model(base: StandaloneDonor, blueprint: Blueprint) -> None:
    """UserError where the base lacks a tensor of a language model, such as the head."""
    missing = next((name for name in blueprint.names if name not in base.blueprint), None)
    if missing is not None:
        raise UserError(f"{base.name}: has no {missing}, which a language model needs; give another --base")


def _fingerprint(
    config: CompareConfig, settings: TrialSettings, tokens: Tensor, base: StandaloneDonor | None
) -> dict[str, Any]:
    """Hashes of all that is read, for the names of the runs."""
    found: dict[str, Any] = {
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "zoo": hash_zoo(config.zoo, config.donor),
        "model": hash_model(config.model),
        "text": hash_text(config.text),
    }
    if base is not None:
        starts = AdapterStarts(settings)
        references = {starts.reference(label) for label in settings.method_options} - {None}
        if config.reference is not None and not references:
            raise UserError(f"--reference {config.reference}: no method of --methods follows a model; leave it out")
        found |= {"base": base.sha256, "references": {str(name): _hash_reference(str(name)) for name in references}}
    return found


def _hash_reference(reference: str) -> str:
    """sha256 of a reference's weights, or of its analysis.json."""
    found = resolve_reference(reference, None)
    if found.analysis is not None:
        return f"{text_sha256(read_bytes(found.analysis, MAX_JSON))} {reference.partition('#')[2]}"
    assert found.source is not None
    return StandaloneDonor.open(found.source, quiet=True).sha256


def find_target_tokenizer(
    given: str | Path | None, target: str | Path | dict[str, Any], zoo: str | Path | None, vocab: int
) -> Path | None:
    """The folder of the tokenizer: the given one, else the target's, else the one that the donors with the target's
    vocabulary share. None for bytes. Raises UserError where the donors have different ones."""
    found = find_tokenizer(given, target)
    if found is not None:
        return found
    donors = _donors_with_vocabulary(zoo, vocab)
    if not donors:
        return None
    if any(donor.vocabulary() != donors[0].vocabulary() for donor in donors):
        if vocab == BYTE_VOCAB:
            return None
        raise UserError(f"{zoo}: the donors have different tokenizers; give the target's own with --tokenizer")
    return donors[0].folder


def _donors_with_vocabulary(zoo: str | Path | None, vocab: int) -> list[FolderDonor]:
    """The donors that have a tokenizer and `vocab` tokens, else those whose tokenizer fits with padding."""
    donors = Zoo.open(zoo).donors if zoo is not None else ()
    tokens = {donor: donor.vocabulary() for donor in donors if isinstance(donor, FolderDonor)}
    sizes = {donor: meta.vocab for donor in tokens if (meta := donor.blueprint.metadata) is not None}
    exact = [donor for donor, found in tokens.items() if found is not None and sizes.get(donor) == vocab]
    return exact or [donor for donor, found in tokens.items() if found is not None and fits_padded(found, vocab)]


def check_lengths(corpus: str | Path, tokens: Tensor, sequence: int, config: dict[str, Any]) -> None:
    """Raises UserError where the held-out text is shorter than a window, or a window longer than the context."""
    held_out = len(tokens) - training_token_count(tokens)
    if held_out < sequence + 1:
        least = math.ceil((sequence + 1) / HELD_OUT)
        raise UserError(f"{corpus}: {len(tokens)} tokens are too few; give at least {least} for windows of {sequence}")
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(positions, int) and sequence > positions:
        raise UserError(
            f"--sequence {sequence}: the target has {positions} positions; give at most {positions} tokens per window"
        )


def write_calibration_text(text: bytes, folder: Path) -> Path:
    """Writes the beginning of a corpus, without any held-out text, to a file."""
    path = folder / "calibration.txt"
    beginning = text[: min(MAX_CALIBRATION, int(len(text) * CALIBRATION))]
    path.write_bytes(beginning.decode("utf-8", errors="ignore").encode())
    return path


def hash_text(text: str | Path | None) -> str | None:
    """sha256 of what is read of a text that is given to methods; None without one.

    Raises UserError where there is no such text."""
    return None if text is None else text_sha256(read_corpus(TextSource(str(text))).text)


def hash_zoo(zoo: str | Path | None, donor: str | None = None) -> str | None:
    """sha256 of the names and hashes of the donors of a zoo; without a zoo, of the `donor` outside one."""
    opened = open_zoo(zoo, donor)
    if opened is None:
        return None
    lines = "".join(f"{d.name} {d.sha256}\n" for d in opened.donors)
    return hashlib.sha256(lines.encode()).hexdigest()


def hash_model(model: str | Path | None) -> str | None:
    """sha256 of the files of a trained model's folder; a hub id itself."""
    if model is None or not Path(model).is_dir():
        return None if model is None else str(model)
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(model).rglob("*") if p.is_file()):
        with path.open("rb") as f:
            digest.update(f"{path.relative_to(model)} {hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
