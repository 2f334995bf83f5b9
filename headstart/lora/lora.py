"""`headstart lora`: a base and a method in, an initial adapter that `PeftModel.from_pretrained` loads out."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headstart import samplers
from headstart.config import LoraConfig
from headstart.devices import torch_device, torch_dtype
from headstart.generate.sampling import build_sampler
from headstart.generate.tokenizer_files import copy_tokenizer
from headstart.lora.card import CHANGED_BASE, PublishedBase, adapter_card, base_card
from headstart.lora.first_step import FirstStepChange
from headstart.lora.reference import ReferenceModel, resolve_reference
from headstart.versions import package_versions
from zoo.checkpoints.atomic import new_folder
from zoo.checkpoints.sources import Source, count_tensors, resolve_source
from zoo.checkpoints.writer import fill_folder, plan_shards
from zoo.donors.donor import Donor, provenance
from zoo.donors.folder import FolderDonor, StandaloneDonor, standalone_name
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.lora.adapters import LoraSampler, refuse_tied_weights
from zoo.lora.bases import blueprint_as_stored, compensated_base
from zoo.targets.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, require_peft
from zoo.targets.blueprint import Adapter, Blueprint

log = logging.getLogger(__name__)

OWN_OPTIONS = {"base": "--base", "reference_model": "--reference"}  # options of methods that are not given with --set
BASE_FOLDER = "base"  # the folder of a changed base, inside the adapter's
CACHED_SNAPSHOT = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})")
ONE_FILE = "1000TB"  # shard size; PEFT reads an adapter from one file


def lora(
    config: LoraConfig, *, plan: bool = False, quiet: bool = False, command: str | None = None
) -> Path | dict[str, Any]:
    """Fills a LoRA adapter of a base by a method and writes an adapter folder; returns its path.

    plan     return what would be read, downloaded and written (tensors, bytes), and do nothing
    command  what the record names as the command; else the command line that does the same

    Of a base on the hub only the config is downloaded where that is enough. A compensated method moves a part of the
    base into the adapter. For those, `out`/base is written too: a checkpoint with W - scaling B A in place of W
    (computed in float32, rounded to its dtype), one tensor at a time. The adapter's config names it as the base.

    Raises UserError before any work, and leaves nothing behind when it fails later.
    """
    job = prepare_lora(config)
    if plan:
        return _plan(job)
    base = _open_base(job, quiet)
    zoo = _open_zoo(job, base, quiet)
    with new_folder(Path(config.out)) as folder:
        _write(job, base, zoo, folder, command or config.to_command())
    return Path(config.out)


def fit_lora(config: LoraConfig) -> LoraSampler:
    """The fitted method of a configuration. Raises UserError as `lora` does, and writes nothing."""
    job = prepare_lora(config)
    job.sampler.fit(_open_zoo(job, _open_base(job, quiet=True), quiet=True), job.blueprint)
    return job.sampler


@dataclass(frozen=True)
class LoraJob:
    """A checked configuration: all that is known before a weight is read."""

    config: LoraConfig
    source: Source  # of the base
    reference: ReferenceModel | None
    sampler: LoraSampler
    blueprint: Blueprint

    @property
    def adapter(self) -> Adapter:
        assert self.blueprint.adapter is not None
        return self.blueprint.adapter

    @property
    def dtype(self) -> Any:
        """The torch.dtype of the written tensors; None for float32 in the adapter and the stored one in the base."""
        return None if self.config.dtype is None else torch_dtype(self.config.dtype)


def prepare_lora(config: LoraConfig) -> LoraJob:
    """Checks a configuration. Raises UserError where its options do not fit one another, the base or the method."""
    cls = samplers.lora_sampler(config.method)
    require_peft()
    if config.reference is not None and "reference_model" not in cls.__dataclass_fields__:
        raise UserError(f"{config.method} takes no --reference: leave it out")
    for key, value in config.set.items():
        if key in OWN_OPTIONS and key in cls.__dataclass_fields__:
            raise UserError(f"--set {key}={value}: give it as {OWN_OPTIONS[key]}")
    source = resolve_source(str(config.base))
    reference = None if config.reference is None else resolve_reference(str(config.reference), source)
    sampler = build_sampler(
        cls,
        config.set,
        base=standalone_name(source),
        reference_model=reference and reference.name,
        device=torch_device(config.device),
    )
    assert isinstance(sampler, LoraSampler)
    job = LoraJob(config, source, reference, sampler, _blueprint(config, source))
    sampler.check(job.blueprint)
    if sampler.compensated:
        _check_folder_name(Path(config.out))
        refuse_tied_weights(job.adapter)
        job.adapter.config["base_model_name_or_path"] = f"./{BASE_FOLDER}"
    return job


def _blueprint(config: LoraConfig, source: Source) -> Blueprint:
    alpha = config.rank if config.alpha is None else config.alpha
    base, revision = _base_name(config, source)
    return Blueprint.from_lora(
        source.address if source.folder is None else source.folder,
        {
            "r": config.rank,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "target_modules": "all-linear" if config.targets == ("all-linear",) else list(config.targets),
            "base_model_name_or_path": base,
            "revision": revision,
        },
    )


def _base_name(config: LoraConfig, source: Source) -> tuple[str, str | None]:
    """The base in adapter_config.json: a hub id and its revision, or a folder without the folders above it.

    A snapshot in the hub's cache has the id of its repository. `./NAME` stands for a folder that was given by an
    absolute path; no library takes it for a hub id.
    """
    base = str(config.base)
    if source.repo is not None:
        return source.repo, base.partition("@")[2] or None
    path = Path(base)
    cached = CACHED_SNAPSHOT.fullmatch("/".join(path.absolute().parts[-3:]))
    if cached is not None:
        return f"{cached['owner']}/{cached['name']}", cached["commit"]
    return (f"./{path.name}" if path.is_absolute() else base), None


def _published_base(job: LoraJob) -> PublishedBase:
    name, revision = _base_name(job.config, job.source)
    on_hub = job.source.repo is not None or revision is not None
    return PublishedBase(name, on_hub, revision, _auto_class(job.adapter), job.adapter.base.config)


def _check_folder_name(out: Path) -> None:
    """PEFT's conversion back to the original base takes the folder's name for that of an adapter."""
    if "." in out.name or out.name in ("", "default"):
        raise UserError(
            f"--out {out}: PEFT uses this folder's name as an adapter's name when it converts the trained adapter back "
            "to the original base; give a name without dots that is not 'default'"
        )


def _open_base(job: LoraJob, quiet: bool) -> StandaloneDonor | None:
    """The base; None where it is on the hub and the method reads only its config."""
    if job.source.folder is None and not job.sampler.reads_base:
        return None
    return open_base(job.source, quiet)


def open_base(source: Source, quiet: bool) -> StandaloneDonor:
    """The base of an adapter, downloaded where it is on the hub. Raises UserError where it is quantised."""
    base = StandaloneDonor.open(source, quiet)
    if base.quantisation.weights:
        raise UserError(f"{base.name}: is quantised ({base.quantisation}); give the original model as --base")
    return base


def _open_zoo(job: LoraJob, base: Donor | None, quiet: bool) -> Zoo | None:
    """The base, where its weights are read, then the reference."""
    donors: list[Donor] = [] if base is None else [base]
    if job.reference is not None and job.reference.source is not None:
        donors.append(replace(StandaloneDonor.open(job.reference.source, quiet), name=job.reference.name))
    return Zoo.of_donors(donors, job.source.address) if donors else None


def _write(job: LoraJob, base: FolderDonor | None, zoo: Zoo | None, folder: Path, command: str) -> None:
    change = FirstStepChange()
    job.sampler.fit(zoo, job.blueprint)
    tensors = change.watch(job.sampler.sample(job.blueprint, job.config.seed), job.adapter, base)
    fill_folder(folder, job.blueprint, tensors, job.dtype, ONE_FILE)
    (folder / "model.safetensors").rename(folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(job.adapter.config, indent=2) + "\n")
    grouping = getattr(job.sampler, "grouping", None)
    record = {
        "method": job.config.method,
        "options": job.sampler.options(),
        "seed": job.config.seed,
        "command": command,
        "versions": package_versions() | {"peft": importlib.metadata.version("peft")},
        "reproducible": job.sampler.reproducibility(),
        "donors": _provenances(job, base, zoo),
        "grouping": None if grouping is None else grouping.to_json(),
        "tensors": {"sampled": len(job.blueprint.names), "defaulted": 0},
        "parameters": job.blueprint.parameters,
        "base": str(job.config.base),
        "adapter": _summary(job.adapter),
        "step0": change.to_record(),
        "changed_base": {"folder": BASE_FOLDER, **CHANGED_BASE} if job.sampler.compensated else None,
        "config": job.config.to_record(),
    }
    published = _published_base(job)
    if job.sampler.compensated:
        assert base is not None
        _write_base(job, base, folder / BASE_FOLDER, folder / ADAPTER_WEIGHTS)
        base_card(record, base.license, published).save(folder / BASE_FOLDER / "README.md")
    (folder / "headstart.json").write_text(json.dumps(record, indent=2) + "\n")
    adapter_card(record, type(job.sampler), published).save(folder / "README.md")


def _write_base(job: LoraJob, base: FolderDonor, folder: Path, adapter_file: Path) -> None:
    """Writes the changed base with its tokenizer."""
    blueprint = blueprint_as_stored(base)
    stored = {str(blueprint[pair.weight].dtype).removeprefix("torch.") for pair in job.adapter.pairs} - {"float32"}
    if stored and job.dtype is None:
        log.info(
            "the changed base is written in %s, the dtype of the original, so with the adapter it differs from the "
            "original by rounding; --dtype float32 avoids that", " and ".join(sorted(stored)),
        )  # fmt: skip
    tensors = compensated_base(base, job.adapter, adapter_file, torch_device(job.config.device))
    folder.mkdir()
    fill_folder(folder, blueprint, tensors, job.dtype)
    copy_tokenizer(base.folder, folder, extra=("generation_config.json",))


def _provenances(job: LoraJob, base: Donor | None, zoo: Zoo | None) -> list[dict[str, Any]]:
    """The base, then the reference, even where only its analysis was read. The hash of a base is unknown where only its
    config was downloaded."""
    source = job.source
    unread = {"name": standalone_name(source), "revision": source.commit, "sha256": None, "license": source.license}
    first = unread if base is None else provenance(base)
    return [first, *(d for d in job.sampler.provenance(zoo) if d["sha256"] != first["sha256"])]


def _summary(adapter: Adapter) -> dict[str, Any]:
    names = sorted({pair.module.rpartition(".")[2] for pair in adapter.pairs})
    config = adapter.config
    return {"rank": config["r"], "alpha": config["lora_alpha"], "targets": names, "pairs": len(adapter.pairs)}


def _auto_class(adapter: Adapter) -> str:
    """The class of transformers that loads the base."""
    known = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
    task, mapping = adapter.config["task_type"], adapter.config["auto_mapping"] or {}
    return known.get(task) or mapping.get("base_model_class", "AutoModel")


def _plan(job: LoraJob) -> dict[str, Any]:
    source, reference, sampler = job.source, job.reference, job.sampler
    sources = {standalone_name(source): source} if source.folder is not None or sampler.reads_base else {}
    if reference is not None and reference.source is not None:
        sources[reference.name] = reference.source
    read = [{"name": name, "tensors": count_tensors(s), "bytes": s.size} for name, s in sources.items()]
    if reference is not None and reference.analysis is not None:
        read.append({"name": str(reference.analysis), "tensors": 0, "bytes": reference.analysis.stat().st_size})
    written = {"adapter": job.blueprint}
    if sampler.compensated:
        written["base"] = job.adapter.base
        if source.folder is not None:
            written["base"] = blueprint_as_stored(StandaloneDonor.open(source, quiet=True))
    sizes = {
        name: {
            "tensors": len(blueprint.names),
            "parameters": blueprint.parameters,
            "bytes": sum(shard.size for shard in plan_shards(blueprint.specs, job.dtype)),
        }
        for name, blueprint in written.items()
    }
    return {
        "method": sampler.name,
        "options": sampler.options(),
        "read": {"donors": read, "tensors": sum(r["tensors"] for r in read), "bytes": sum(r["bytes"] for r in read)},
        "download": {"bytes": sum(s.download for s in sources.values())},
        "write": {
            "folder": str(job.config.out),
            **{key: sum(size[key] for size in sizes.values()) for key in ("tensors", "parameters", "bytes")},
            **sizes,
        },
    }
