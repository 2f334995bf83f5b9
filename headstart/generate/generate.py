"""`headstart generate`: a config and a method in, a folder that `AutoModelForCausalLM.from_pretrained` loads out."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headstart import samplers
from headstart.generate import card
from headstart.generate.sampling import (
    build_sampler,
    fit_sampler,
    language_model_blueprint,
    option_fields,
    sample_with_defaults,
)
from headstart.versions import package_versions
from zoo.checkpoints.hub import HUB_ID, with_retries
from zoo.checkpoints.sources import count_tensors, resolve
from zoo.checkpoints.writer import new_folder, plan_shards, write_checkpoint
from zoo.donors.standalone import lone_name, single
from zoo.donors.store import Donor, Zoo
from zoo.errors import UserError, unknown
from zoo.targets.blueprint import Blueprint
from zoo.vocabulary import find_tokenizer

if TYPE_CHECKING:
    from zoo.sampler import Sampler

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


def generate(
    target: str | Path | dict[str, Any],
    method: str,
    out: str | Path,
    zoo: str | Path | None = None,
    donor: str | None = None,
    model: str | None = None,
    settings: Sequence[str] = (),
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    plan: bool = False,
    quiet: bool = False,
    command: str | None = None,
    tokenizer: str | Path | None = None,
) -> Path | dict[str, Any]:
    """Fills the blueprint of `target` by `method` and writes the checkpoint folder `out`; returns its path.

    target     a config.json, a folder that holds one, a hub id, or a parsed config
    zoo        a zoo's folder; without one, `donor` is a checkpoint folder or a hub id
    donor      the name of a donor (for methods that take one)
    model      a trained pipeline or autoencoder, for methods that need one
    settings   KEY=VALUE, the method's options
    dtype      of the written tensors; else what the target's config says, else float32
    plan       returns what would be read, downloaded and written (tensors, bytes), and does nothing
    tokenizer  a folder or tokenizer.json to copy; else the target folder's, else the donors'

    The tensors go to disk one at a time. Under several processes (`accelerate launch`) the first one does all of it
    and the others return at once, so the output is that of one process. Raises UserError before any work is done
    where the method lacks something or does not fit, and leaves nothing behind when it fails later.
    """
    out = Path(out)
    cls = samplers.model_sampler(method)
    words = {"zoo": zoo, "donor": donor, "model": model, "seed": seed, "dtype": dtype, "tokenizer": tokenizer}
    for key in ("donor", "model"):
        if words[key] is not None and key not in option_fields(cls):
            raise UserError(f"{method} takes no --{key}: leave it out")
    _check_model(model)
    vocabulary_from = find_tokenizer(tokenizer, target)
    alone = resolve(donor) if zoo is None and donor is not None else None
    sampler = build_sampler(
        cls,
        settings,
        donor=donor if alone is None else lone_name(alone),
        model=model,
        device=device,
        tokenizer=None if vocabulary_from is None else str(vocabulary_from),
    )
    _check_needs(sampler, zoo, donor)
    blueprint = language_model_blueprint(target)
    saved_as = _dtype(dtype, blueprint)
    if plan and alone is not None and alone.folder is None:  # nothing is fetched for a plan
        read = [{"name": donor, "tensors": count_tensors(alone), "bytes": alone.size}]
        return _plan(sampler, read, alone.download, blueprint, out, saved_as)
    source = single(alone, quiet) if alone is not None else Zoo.open(zoo) if zoo is not None else None
    if plan:
        names = sampler.reads(source, blueprint)
        donors = [source.donor(name) for name in names] if source is not None else []
        read = [
            {"name": d.name, "tensors": len(d.names), "bytes": sum(e.nbytes for e in d.entries.values())}
            for d in donors
        ]
        return _plan(sampler, read, _model_download(model), blueprint, out, saved_as)
    if int(os.environ.get("RANK", "0")) > 0:
        return out
    with new_folder(out) as folder:
        fit_sampler(sampler, source, blueprint)
        donors = [source.donor(name) for name in sampler.donors] if source is not None else []
        counts = {"sampled": 0, "defaulted": 0}
        write_checkpoint(folder, blueprint, sample_with_defaults(sampler, blueprint, seed, counts), dtype=saved_as)
        vocabulary_from = vocabulary_from or _donor_tokenizer(donors, blueprint)
        if vocabulary_from is not None:
            _copy_tokenizer(vocabulary_from, folder)
        record = {
            "method": method,
            "options": sampler.options(),
            "seed": seed,
            "command": command or _command(target, method, out, settings, words),
            "versions": package_versions(),
            "donors": sampler.provenance(source),
            "tensors": counts,
            "parameters": blueprint.parameters,
        }
        (folder / "headstart.json").write_text(json.dumps(record, indent=2) + "\n")
        (folder / "README.md").write_text(card.text(record, cls, blueprint, _bases(donors)))
    return out


def _dtype(asked: str | None, blueprint: Blueprint) -> torch.dtype:
    config = blueprint.config or {}
    name = asked or config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]


def _check_needs(sampler: Sampler, zoo: str | Path | None, donor: str | None) -> None:
    for need in sampler.needs:
        if need in ("donor", "donors") and zoo is None and donor is None:
            raise UserError(f"{sampler.name} needs a donor: give --zoo DIR, or --donor FOLDER")
        if need == "model" and not getattr(sampler, "model", None):
            raise UserError(f"{sampler.name} needs a trained model: give --model DIR (`headstart train` makes one)")


def _donor_tokenizer(donors: Sequence[Donor], blueprint: Blueprint) -> Path | None:
    """The folder of the donors' tokenizer, if they agree on one and the target has a row for each of its tokens."""
    found = [(d.folder, vocabulary) for d in donors if (vocabulary := d.vocabulary()) is not None]
    if not found:
        return None
    folder, first = found[0]
    if len(found) < len(donors) or any(vocabulary != first for _, vocabulary in found):
        log.info("no tokenizer is copied: the donors do not share one; give --tokenizer")
        return None
    if blueprint.metadata is None or max(first.values()) >= blueprint.metadata.vocab:
        log.info("no tokenizer is copied: the donors' has more tokens than the target; give --tokenizer")
        return None
    return folder


def _bases(donors: Sequence[Donor]) -> list[str]:
    """Hub ids of the donors that came from the hub: those have a commit, folders the hash of what they held."""
    hub = [d.record["source"] for d in donors if not d.revision.startswith("sha256:")]
    return sorted({source.partition("@")[0] for source in hub if HUB_ID.fullmatch(source)})


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _plan(
    sampler: Sampler,
    read: list[dict[str, Any]],
    download: int,
    blueprint: Blueprint,
    out: Path,
    dtype: torch.dtype,
) -> dict[str, Any]:
    return {
        "method": sampler.name,
        "options": sampler.options(),
        "read": {"donors": read, "tensors": sum(r["tensors"] for r in read), "bytes": sum(r["bytes"] for r in read)},
        "download": {"bytes": download},
        "write": {
            "folder": str(out),
            "tensors": len(blueprint.names),
            "parameters": blueprint.parameters,
            "bytes": sum(shard.size for shard in plan_shards(blueprint.specs, dtype)),
        },
    }


def _model_download(model: str | None) -> int:
    """Bytes of a trained model that is a hub id and not in the cache."""
    if model is None or Path(model).exists():
        return 0
    from huggingface_hub import snapshot_download

    files = with_retries(lambda: snapshot_download(model, dry_run=True), f"--model {model}")
    return sum(file.file_size or 0 for file in files if file.will_download)


def _check_model(model: str | None) -> None:
    if model is not None and not Path(model).exists() and ("@" in model or not HUB_ID.fullmatch(model)):
        raise UserError(f"--model {model}: no such folder, and no hub id; give a trained model's folder, or org/name")


def _command(
    target: str | Path | dict[str, Any], method: str, out: Path, settings: Sequence[str], given: dict[str, Any]
) -> str:
    """The command line that does what this call does."""
    where = "config.json" if isinstance(target, dict) else str(target)
    words = ["headstart", "generate", "--target", where, "--method", method, "--out", str(out)]
    words += [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]
    words += [word for setting in settings for word in ("--set", setting)]
    return shlex.join(words)
