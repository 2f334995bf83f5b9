"""`headstart generate`: a config and a method in, a folder that `AutoModelForCausalLM.from_pretrained` loads out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autoencoder.loading import download_size
from headstart import samplers
from headstart.config import GenerateConfig
from headstart.devices import torch_device, torch_dtype
from headstart.generate.card import checkpoint_card
from headstart.generate.generation_config import copy_generation_config
from headstart.generate.next_step import next_step
from headstart.generate.sampling import (
    build_sampler,
    language_model_blueprint,
    log_defaulted,
    option_fields,
    sample_with_defaults,
)
from headstart.generate.tokenizer_files import copy_tokenizer, keep_tokenizer_class, shared_tokenizer
from headstart.versions import package_versions
from zoo.checkpoints.atomic import new_folder
from zoo.checkpoints.hub import HUB_ID
from zoo.checkpoints.sources import Source, count_tensors, resolve_source
from zoo.checkpoints.writer import Shard, allocate_shards, plan_shards, write_description, write_tensors
from zoo.donors.folder import FolderDonor, standalone_name
from zoo.donors.zoo import Zoo, open_standalone
from zoo.errors import UserError
from zoo.parallel.processes import Processes, this_process
from zoo.targets.blueprint import Blueprint
from zoo.vocabulary import find_tokenizer

if TYPE_CHECKING:
    from zoo.sampler import Sampler


def generate(
    config: GenerateConfig, *, plan: bool = False, quiet: bool = False, command: str | None = None
) -> Path | dict[str, Any]:
    """Fills the blueprint of a target by a method and writes a checkpoint folder; returns its path.

    plan     return what would be read, downloaded and written (tensors, bytes), and do nothing
    command  what the record names as the command; else the command line that does the same

    The tensors go to disk as they are made. Several processes (`accelerate launch`) share them, in one folder that all
    can write, and the files are those of one process. Raises UserError before any work where the method lacks
    something or does not fit. A failure later leaves nothing behind.
    """
    job = _prepare(config)
    if plan and job.standalone is not None and job.standalone.folder is None:  # a plan downloads nothing
        read = [{"name": config.donor, "tensors": count_tensors(job.standalone), "bytes": job.standalone.size}]
        return _plan(job, read, job.standalone.download)
    zoo = _open_zoo(job, quiet)
    if plan:
        return _plan(job, _planned_donors(job, zoo), _model_download(config.model))
    out, processes = Path(config.out), this_process()
    with processes.ending_together():
        if not processes.is_first:
            _write_share(job, zoo, Path(processes.from_first()), processes)
            processes.wait_for_all()
            return out
        with new_folder(out) as folder:
            processes.from_first(str(folder))
            defaulted = _write_share(job, zoo, folder, processes)
            log_defaulted(job.blueprint, defaulted)
            _write_description(job, zoo, folder, defaulted, command or config.to_command())
        processes.wait_for_all()
    return out


@dataclass(frozen=True)
class GenerateJob:
    """A checked configuration: all that is known before a weight is read."""

    config: GenerateConfig
    sampler: Sampler
    blueprint: Blueprint
    dtype: torch.dtype  # of the written tensors
    shards: list[Shard]  # the files of the written tensors
    standalone: Source | None  # a donor outside a zoo
    tokenizer: Path | None  # the folder of the given or the target's tokenizer


def _prepare(config: GenerateConfig) -> GenerateJob:
    """Raises UserError where the options do not fit one another, or the method lacks something."""
    cls = samplers.model_sampler(config.method)
    for key in ("donor", "model", "text"):
        if getattr(config, key) is not None and key not in option_fields(cls):
            raise UserError(f"{config.method} takes no --{key}: leave it out")
    _check_model(config.model)
    tokenizer = find_tokenizer(config.tokenizer, config.target)
    standalone = resolve_source(config.donor) if config.zoo is None and config.donor is not None else None
    sampler = build_sampler(
        cls,
        config.set,
        donor=config.donor if standalone is None else standalone_name(standalone),
        model=config.model,
        device=torch_device(config.device),
        tokenizer=None if tokenizer is None else str(tokenizer),
        text=None if config.text is None else str(config.text),
    )
    _check_needs(sampler, config)
    blueprint = language_model_blueprint(config.target)
    dtype = _output_dtype(config, blueprint)
    shards = plan_shards(blueprint.specs, dtype, config.max_shard_size)
    return GenerateJob(config, sampler, blueprint, dtype, shards, standalone, tokenizer)


def _output_dtype(config: GenerateConfig, blueprint: Blueprint) -> torch.dtype:
    """The dtype of --dtype, else of the target's config, else float32."""
    if config.dtype is not None:
        return torch_dtype(config.dtype)
    stated = blueprint.config or {}
    where = "config" if isinstance(config.target, dict) else str(config.target)
    return torch_dtype(str(stated.get("dtype") or stated.get("torch_dtype") or "float32"), where)


def _open_zoo(job: GenerateJob, quiet: bool) -> Zoo | None:
    if job.standalone is not None:
        return open_standalone(job.standalone, quiet)
    return None if job.config.zoo is None else Zoo.open(job.config.zoo)


def _write_share(job: GenerateJob, zoo: Zoo | None, folder: Path, processes: Processes) -> list[str]:
    """Writes the tensors of this process. Returns the names of all that keep the default initialisation, in the first
    process; in the others nothing."""
    sampler, blueprint = job.sampler, job.blueprint
    if processes.count > 1:
        own = processes.own_share(blueprint.specs, lambda spec: spec.numel)
        sampler.only = frozenset(spec.name for spec in own)
    sampler.fit(zoo, blueprint)
    defaulted: list[str] = []
    if processes.is_first:
        allocate_shards(folder, job.shards)
    processes.wait_for_all()

    def checked_tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in sample_with_defaults(sampler, blueprint, job.config.seed, defaulted):
            processes.check_others()
            yield name, tensor

    write_tensors(folder, blueprint, job.shards, checked_tensors(), job.dtype, sampler.only)
    return [name for names in processes.gather(defaulted) for name in names]


def _write_description(job: GenerateJob, zoo: Zoo | None, folder: Path, defaulted: list[str], command: str) -> None:
    """Writes everything but the tensors: config, tokenizer, headstart.json, card."""
    sampler, blueprint, config = job.sampler, job.blueprint, job.config
    write_description(folder, blueprint, job.shards, job.dtype)
    donors = _folder_donors(zoo, sampler.donors)
    counts = {"sampled": len(blueprint.names) - len(defaulted), "defaulted": len(defaulted)}
    tokenizer = job.tokenizer or shared_tokenizer(donors, blueprint)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
        keep_tokenizer_class(tokenizer, folder)
    copy_generation_config(config.target, donors, blueprint, folder)
    record = {
        "method": config.method,
        "options": sampler.options(),
        "seed": config.seed,
        "command": command,
        "versions": package_versions(),
        "reproducible": sampler.reproducibility(),
        "device": sampler.device,
        "donors": sampler.provenance(zoo),
        "tensors": counts,
        "parameters": blueprint.parameters,
        **sampler.details(blueprint),
        "next_step": next_step(sampler.name),
        "config": config.to_record(),
    }
    (folder / "headstart.json").write_text(json.dumps(record, indent=2) + "\n")
    checkpoint_card(record, type(sampler), blueprint, _hub_ids(donors)).save(folder / "README.md")


def _check_needs(sampler: Sampler, config: GenerateConfig) -> None:
    for need in sampler.needs:
        if need in ("donor", "donors") and config.zoo is None and config.donor is None:
            raise UserError(f"{sampler.name} needs a donor: give --zoo DIR, or --donor FOLDER")
        if need == "model" and not getattr(sampler, "model", None):
            raise UserError(f"{sampler.name} needs a trained model: give --model DIR (`headstart train` makes one)")


def _check_model(model: str | Path | None) -> None:
    if model is not None and not Path(model).exists() and ("@" in str(model) or not HUB_ID.fullmatch(str(model))):
        raise UserError(f"--model {model}: is neither a folder nor a hub id; give a trained model's folder or org/name")


def _folder_donors(zoo: Zoo | None, names: Sequence[str]) -> list[FolderDonor]:
    """Donors of a zoo on disk, which all lie in folders."""
    donors = [zoo.donor(name) for name in names] if zoo is not None else []
    return [donor for donor in donors if isinstance(donor, FolderDonor)]


def _hub_ids(donors: Sequence[FolderDonor]) -> list[str]:
    """The hub ids of the donors that came from the hub. Their revision is a commit; that of a folder is a hash."""
    sources = [d.source.partition(":")[0] for d in donors if not d.revision.startswith("sha256:")]  # without a file
    return sorted({source.partition("@")[0] for source in sources if HUB_ID.fullmatch(source)})


def _planned_donors(job: GenerateJob, zoo: Zoo | None) -> list[dict[str, Any]]:
    donors = _folder_donors(zoo, job.sampler.planned_donors(zoo, job.blueprint))
    return [
        {"name": d.name, "tensors": len(d.names), "bytes": sum(entry.nbytes for entry in d.entries.values())}
        for d in donors
    ]


def _plan(job: GenerateJob, read: list[dict[str, Any]], download: int) -> dict[str, Any]:
    return {
        "method": job.sampler.name,
        "options": job.sampler.options(),
        "read": {"donors": read, "tensors": sum(r["tensors"] for r in read), "bytes": sum(r["bytes"] for r in read)},
        "download": {"bytes": download},
        "write": {
            "folder": str(job.config.out),
            "tensors": len(job.blueprint.names),
            "parameters": job.blueprint.parameters,
            "bytes": sum(shard.size for shard in job.shards),
        },
    }


def _model_download(model: str | Path | None) -> int:
    """Bytes of a trained model that is a hub id and not in the cache."""
    return 0 if model is None else download_size(model)
