"""`headstart lora`: a base and a method in, an initial adapter that `PeftModel.from_pretrained` loads out."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headstart import samplers
from headstart.generate.generate import DTYPES, TOKENIZER_FILES
from headstart.generate.sampling import build_sampler, fit_sampler
from headstart.lora import card as lora_card
from headstart.versions import package_versions
from zoo.checkpoints.sources import Source, count_tensors, resolve
from zoo.checkpoints.writer import new_folder, plan_shards, write_checkpoint
from zoo.donors.donor import Donor, provenance
from zoo.donors.folder import FolderDonor, StandaloneDonor, standalone_name
from zoo.donors.memory import ModuleDonor
from zoo.donors.zoo import Zoo
from zoo.errors import UserError, unknown
from zoo.lora.adapters import LoraSampler, change_norm, compensation, refuse_shared
from zoo.lora.bases import PeftBaseDonor, base_on_disk, changed_base, refuse_changed
from zoo.targets.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, require_peft
from zoo.targets.blueprint import Adapter, Blueprint, adapter_blueprint

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)

GIVEN = {"base": "--base", "reference_model": "--reference"}  # options that are arguments of their own
BASE = "base"  # the folder of a changed base, inside the adapter's
ONE_FILE = "1000TB"  # PEFT reads an adapter from one file


def lora(
    base: str | Path,
    method: str,
    rank: int,
    out: str | Path,
    reference: str | Path | None = None,
    alpha: float | None = None,
    targets: str | Sequence[str] = "all-linear",
    settings: Sequence[str] = (),
    plan: bool = False,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    quiet: bool = False,
    command: str | None = None,
) -> Path | dict[str, Any]:
    """Fills a LoRA adapter of `base` by `method` and writes the folder `out`; returns its path.

    base       what is adapted: a folder or a hub id; of a hub id only the config is fetched where that is enough
    reference  for methods that follow another model: a folder, hub id or analysis.json[#MODEL]
    alpha      lora_alpha; None: the rank, so that B A counts once
    targets    modules to adapt, as a list or with commas, or all-linear
    settings   KEY=VALUE, the method's options
    dtype      of the tensors written; else float32 for the adapter, and for a changed base what it has
    plan       returns what would be read, downloaded and written (tensors, bytes), and does nothing

    A method that moves a part of the base into the adapter (`compensated`) has `out`/base written as well: a
    checkpoint with W - scaling B A for W (in float32, then rounded to its dtype), one tensor at a time, which the
    adapter's config names as its base. Raises UserError before any work is done, and leaves nothing behind when it
    fails later.
    """
    out = Path(out)
    cls = samplers.lora_sampler(method)
    require_peft()
    if reference is not None and "reference_model" not in cls.__dataclass_fields__:
        raise UserError(f"{method} takes no --reference: leave it out")
    if alpha is not None and not 0 < alpha < math.inf:
        raise UserError(f"--alpha {alpha}: give a positive number")
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    for setting in settings:
        key = setting.partition("=")[0]
        if key in GIVEN and key in cls.__dataclass_fields__:
            raise UserError(f"--set {setting}: give it as {GIVEN[key]}")
    source = resolve(str(base))
    followed = None if reference is None else follow(str(reference), source)
    sampler = build_sampler(
        cls, settings, base=standalone_name(source), reference_model=followed and followed.name, device=device
    )
    assert isinstance(sampler, LoraSampler)
    blueprint = _blueprint(source, str(base), rank, alpha, targets)
    assert blueprint.adapter is not None
    sampler.check(blueprint)
    if sampler.compensated:
        _check_name(out)
        refuse_shared(blueprint.adapter)
        blueprint.adapter.config["base_model_name_or_path"] = str((out / BASE).resolve())
    if plan:
        return _plan(sampler, source, followed, blueprint, out, dtype)
    donor = StandaloneDonor.open(source, quiet) if source.folder is not None or sampler.reads_base else None
    zoo = _zoo(source, donor, followed, quiet)
    words = {"reference": reference, "alpha": alpha, "targets": targets, "seed": seed, "dtype": dtype}
    step0: dict[str, Any] = {"largest_change": 0.0, "module": None}
    with new_folder(out) as folder:
        fit_sampler(sampler, zoo, blueprint)
        filled = watched(sampler.sample(blueprint, seed), blueprint.adapter, donor, step0)
        write_checkpoint(folder, blueprint, filled, None if dtype is None else DTYPES[dtype], ONE_FILE)
        (folder / "model.safetensors").rename(folder / ADAPTER_WEIGHTS)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(blueprint.adapter.config, indent=2) + "\n")
        grouping = getattr(sampler, "grouping", None)
        made = {
            "method": method,
            "options": sampler.options(),
            "seed": seed,
            "command": command or _command(str(base), method, rank, out, settings, words),
            "versions": package_versions() | {"peft": importlib.metadata.version("peft")},
            "donors": _records(source, donor, sampler, zoo),
            "grouping": None if grouping is None else grouping.to_json(),
            "tensors": {"sampled": len(blueprint.names), "defaulted": 0},
            "parameters": blueprint.parameters,
            "base": str(base),
            "adapter": _described(blueprint.adapter),
            "step0": step0,
            "changed_base": {"folder": BASE, **lora_card.CHANGED_BASE} if sampler.compensated else None,
        }
        if sampler.compensated:
            assert donor is not None
            _write_base(folder / BASE, donor, blueprint.adapter, folder / ADAPTER_WEIGHTS, dtype, device)
            (folder / BASE / "README.md").write_text(lora_card.base_text(made, donor.license))
        (folder / "headstart.json").write_text(json.dumps(made, indent=2) + "\n")
        (folder / "README.md").write_text(lora_card.text(made, cls, _auto_class(blueprint.adapter), source.repo))
    return out


@torch.no_grad()
def initialize_lora_weights(
    peft_model: PeftModel,
    sampler: LoraSampler | str,
    reference: str | Path | nn.Module | None = None,
    seed: int = 0,
    adapter_name: str = "default",
) -> None:
    """Fills the adapter of a model that `get_peft_model` made, in place, in the manner of PEFT's own
    initialize_lora_eva_weights: the values are those of `headstart lora` for this base, sampler and seed.

    sampler    a LoRA sampler, which is fitted here, or the name of a method
    reference  for samplers that follow another model: as for `headstart lora`, or a module in memory

    A compensated sampler changes the base's weights in place too, to W - scaling B A (in float32, rounded to their
    dtype). Then save the adapter with `save_pretrained(DIR)` before training: only
    `save_pretrained(OUT, path_initial_model_for_weight_conversion=DIR)` makes of the trained adapter one for the base
    as it was. Raises UserError, and changes nothing, for a quantised base, DoRA and other variants, a merged adapter,
    weights on the meta device, and a base that another adapter or PEFT's own initialisation depends on.
    """
    require_peft()
    if isinstance(sampler, str):
        sampler = samplers.lora_sampler(sampler)()
    base = PeftBaseDonor.from_peft(peft_model)
    blueprint = adapter_blueprint(peft_model, base.blueprint, adapter_name)
    assert blueprint.adapter is not None
    sampler.check(blueprint)
    refuse_changed(peft_model, adapter_name, sampler.compensated)
    if sampler.compensated:
        refuse_shared(blueprint.adapter)
    members: list[Donor] = [base]
    if reference is not None:
        if not hasattr(sampler, "reference_model"):
            raise UserError(f"{sampler.name} follows no other model: leave reference out")
        if isinstance(reference, nn.Module):
            members.append(ModuleDonor.from_module("reference", reference))
            sampler = replace(sampler, reference_model="reference")  # type: ignore[call-arg]
        else:
            sampler = replace(sampler, reference_model=str(reference))  # type: ignore[call-arg]
    sampler.fit(Zoo.of_donors(members), blueprint)
    filled = dict(sampler.sample(blueprint, seed))
    model = peft_model.get_base_model()
    for pair in blueprint.adapter.pairs:
        layer: Any = model.get_submodule(pair.module)
        a, b = (side[adapter_name].weight for side in (layer.lora_A, layer.lora_B))
        a.copy_(filled[pair.a])
        b.copy_(filled[pair.b])
        if sampler.compensated:
            weight = layer.get_base_layer().weight
            weight.copy_(compensation(weight, pair, a, b))


@dataclass(frozen=True)
class Followed:
    """The model that a method follows: a checkpoint, or its saved analysis."""

    name: str  # what the sampler calls it: a donor of the zoo, or FILE[#MODEL]
    source: Source | None  # None: the base itself, or an analysis
    analysis: Path | None = None


def follow(reference: str, base: Source | None) -> Followed:
    """UserError for what is neither a checkpoint nor an analysis. The base may be its own reference."""
    from baselines.lora.pareto import ANALYSIS_PATTERN

    if found := ANALYSIS_PATTERN.fullmatch(reference):
        if not Path(found[1]).is_file():
            raise UserError(f"{found[1]}: no such file; `headstart analyze` writes an analysis.json")
        return Followed(reference, None, Path(found[1]))
    source = resolve(reference)
    if base is not None and source.given == base.given:
        return Followed(standalone_name(base), None)
    name = standalone_name(source)
    return Followed(name if base is None or name != standalone_name(base) else source.given, source)


def watched(
    tensors: Iterator[tuple[str, Tensor]], adapter: Adapter, donor: Donor | None, step0: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors as they come; `step0` is told of the pair with the largest ||scaling B A|| / ||W|| (Frobenius norms),
    None where a change is there and W is not at hand."""
    pairs = {name: pair for pair in adapter.pairs for name in (pair.a, pair.b)}
    waiting: dict[str, Tensor] = {}
    for name, tensor in tensors:
        pair = pairs.get(name)
        if pair is not None:
            waiting[name] = tensor
            if pair.a in waiting and pair.b in waiting:
                change: float | None = change_norm(pair, waiting.pop(pair.a), waiting.pop(pair.b))
                if change:
                    norm = float(donor.read(pair.weight, torch.float32).norm()) if donor is not None else 0.0
                    change = change / norm if norm else None
                most = step0["largest_change"]
                if most is not None and (change is None or change > most):
                    step0 |= {"largest_change": change, "module": pair.module}
        yield name, tensor


def _write_base(
    out: Path, donor: FolderDonor, adapter: Adapter, adapter_file: Path, dtype: str | None, device: str
) -> None:
    blueprint = base_on_disk(donor)
    coarse = {str(blueprint[pair.weight].dtype).removeprefix("torch.") for pair in adapter.pairs} - {"float32"}
    if coarse and dtype is None:
        log.info(
            "the changed base is written in %s, as it was: with the adapter it differs from the original by rounding; "
            "--dtype float32 keeps that out", " and ".join(sorted(coarse)),
        )  # fmt: skip
    changed = changed_base(donor, adapter, adapter_file, device)
    write_checkpoint(out, blueprint, changed, None if dtype is None else DTYPES[dtype])
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (donor.folder / name).is_file():
            shutil.copyfile(donor.folder / name, out / name)


def _blueprint(source: Source, given: str, rank: int, alpha: float | None, targets: str | Sequence[str]) -> Blueprint:
    words = targets.split(",") if isinstance(targets, str) else list(targets)
    words = [word.strip() for word in words if word.strip()]
    if not words:
        raise UserError("--targets: give module names with commas, or all-linear")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"--rank {rank}: give a whole number from 1 on")
    value = rank if alpha is None else int(alpha) if float(alpha).is_integer() else alpha
    _, _, revision = given.partition("@") if source.repo is not None else ("", "", "")
    return Blueprint.from_lora(
        source.given if source.folder is None else source.folder,
        {
            "r": rank,
            "lora_alpha": value,
            "target_modules": words if words != ["all-linear"] else "all-linear",
            "base_model_name_or_path": source.repo or given,
            "revision": revision or None,
        },
    )


def _check_name(out: Path) -> None:
    """A changed base is undone by PEFT's conversion, which takes the folder's name for that of an adapter."""
    if "." in out.name or out.name in ("", "default"):
        raise UserError(
            f"--out {out}: PEFT takes this folder's name for an adapter's when it converts what was trained back to "
            "the original base; give one without dots that is not 'default'"
        )


def _zoo(source: Source, donor: Donor | None, followed: Followed | None, quiet: bool) -> Zoo | None:
    """The base, where its weights are here, then the reference."""
    members: list[Donor] = [] if donor is None else [donor]
    if followed is not None and followed.source is not None:
        found = StandaloneDonor.open(followed.source, quiet)
        members.append(replace(found, name=followed.name))
    return Zoo.of_donors(members, source.given) if members else None


def _records(source: Source, donor: Donor | None, sampler: LoraSampler, zoo: Zoo | None) -> list[dict[str, Any]]:
    """The base, whose hash is not known where only its config was fetched (its commit is), and the reference, be it
    only known by its analysis."""
    unread = {"name": standalone_name(source), "revision": source.commit, "sha256": None, "license": source.license}
    base = unread if donor is None else provenance(donor)
    return [base, *(d for d in sampler.provenance(zoo) if d["sha256"] != base["sha256"])]


def _described(adapter: Adapter) -> dict[str, Any]:
    names = sorted({pair.module.rpartition(".")[2] for pair in adapter.pairs})
    config = adapter.config
    return {"rank": config["r"], "alpha": config["lora_alpha"], "targets": names, "pairs": len(adapter.pairs)}


def _auto_class(adapter: Adapter) -> str:
    """The class of transformers that loads the base."""
    known = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
    task, mapping = adapter.config["task_type"], adapter.config["auto_mapping"] or {}
    return known.get(task) or mapping.get("base_model_class", "AutoModel")


def _plan(
    sampler: LoraSampler, source: Source, followed: Followed | None, blueprint: Blueprint, out: Path, dtype: str | None
) -> dict[str, Any]:
    sources = {standalone_name(source): source} if source.folder is not None or sampler.reads_base else {}
    if followed is not None and followed.source is not None:
        sources[followed.name] = followed.source
    read = [{"name": name, "tensors": count_tensors(s), "bytes": s.size} for name, s in sources.items()]
    if followed is not None and followed.analysis is not None:
        read.append({"name": str(followed.analysis), "tensors": 0, "bytes": followed.analysis.stat().st_size})
    assert blueprint.adapter is not None
    written = {"adapter": blueprint}
    if sampler.compensated:
        here = source.folder is not None
        written["base"] = base_on_disk(StandaloneDonor.open(source, quiet=True)) if here else blueprint.adapter.base
    as_dtype = None if dtype is None else DTYPES[dtype]
    write = {
        name: {
            "tensors": len(b.names),
            "parameters": b.parameters,
            "bytes": sum(shard.size for shard in plan_shards(b.specs, as_dtype)),
        }
        for name, b in written.items()
    }
    return {
        "method": sampler.name,
        "options": sampler.options(),
        "read": {"donors": read, "tensors": sum(r["tensors"] for r in read), "bytes": sum(r["bytes"] for r in read)},
        "download": {"bytes": sum(s.download for s in sources.values())},
        "write": {
            "folder": str(out),
            **{key: sum(part[key] for part in write.values()) for key in ("tensors", "parameters", "bytes")},
            **write,
        },
    }


def _command(base: str, method: str, rank: int, out: Path, settings: Sequence[str], given: dict[str, Any]) -> str:
    """The command line that does what this call does."""
    words = ["headstart", "lora", "--base", base, "--method", method, "--rank", str(rank), "--out", str(out)]
    for key, value in given.items():
        if value is not None:
            words += [
                f"--{key}",
                value if isinstance(value, str) else ",".join(value) if key == "targets" else str(value),
            ]
    words += [word for setting in settings for word in ("--set", setting)]
    return shlex.join(words)
