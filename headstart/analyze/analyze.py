"""`headstart analyze`: statistics of the weights of donors, each beside its null.

The work is a list of jobs: one for each tensor, one for each pair of projections, and a few more. Several processes
(`accelerate launch`) share them. Every result is stored when it is there, in a hidden folder beside the output. So the
same command continues after an interruption.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from headstart.analyze.jobs import run_jobs, to_json_values
from headstart.analyze.parts import DonorAnalysis
from headstart.analyze.tensors import AnalysisTask
from headstart.config import AnalyzeConfig
from headstart.devices import torch_device
from headstart.report.analysis import render_analysis
from headstart.versions import package_versions
from zoo.checkpoints.atomic import new_folder
from zoo.donors.donor import Donor, provenance
from zoo.donors.zoo import Zoo, open_standalone
from zoo.errors import UserError
from zoo.parallel.processes import local_index, this_process
from zoo.statistics.signature import signature_distances

DIGITS = 10  # of all numbers: the last two or three digits of a sum depend on where its values lie in memory


def analyze(config: AnalyzeConfig, *, quiet: bool = False, command: str | None = None) -> dict[str, Any]:
    """Analyzes the donors of a zoo, or one donor, and writes analysis.json and report.html into the new folder
    `config.out`; returns the content of analysis.json.

    - `ranks` are numbers of singular values by which layers are compared. A donor whose smallest projection has fewer
      is compared by that many, and the report says so.
    - `bootstraps` is the number of bootstrap samples for each p-value of the layers' similarity.

    command  what the results name as the command; else the command line that does the same

    One tensor is in memory at a time. A part that a donor does not allow (such as the similarity of two layers) is left
    out with its reason, and the rest goes on. Several processes share the work; the first one writes the same bytes as
    a single one would, and the others return {}. Raises UserError before any work: an unknown donor, or an `out` that
    exists."""
    out = Path(config.out)
    cache_folder = out.parent / f".{out.name}.work"
    processes = this_process()
    with processes.ending_together():
        if not processes.is_first:
            processes.wait_for_all()  # until the first one has the output folder
            _analyze_donors(config, cache_folder, quiet=True)
            processes.wait_for_all()
            if local_index() == 0:  # on another machine, whose folder may be another one
                shutil.rmtree(cache_folder, ignore_errors=True)
            return {}
        with new_folder(out) as folder:
            processes.wait_for_all()
            results = _analyze_donors(config, cache_folder, quiet)
            results |= {"command": command or config.to_command(), "config": config.to_record()}
            (folder / "analysis.json").write_text(json.dumps(results, ensure_ascii=False) + "\n")
            (folder / "report.html").write_text(render_analysis(results))
            shutil.rmtree(cache_folder, ignore_errors=True)  # before the folder appears: then nothing is left beside it
        processes.wait_for_all()
    return results


def _analyze_donors(config: AnalyzeConfig, cache_folder: Path, quiet: bool) -> dict[str, Any]:
    """The results, without the command. In all processes but the first: empty."""
    ranks, device = tuple(sorted(set(config.ranks))), torch_device(config.device)
    donors = _open_donors(config, quiet)
    processes = this_process()
    analyses = [DonorAnalysis(AnalysisTask(donor, ranks, config.bootstraps, config.seed, device)) for donor in donors]
    with tqdm(desc="analyze", unit="job", disable=quiet) as bar:
        found = run_jobs([job for analysis in analyses for job in analysis.first_jobs()], cache_folder, bar)
        stacks = processes.from_first([a.stacks(found) for a in analyses] if processes.is_first else None)
        pairs = [
            job
            for analysis, own in zip(analyses, stacks, strict=True)
            for jobs in analysis.pair_jobs(own).values()
            for job in jobs
        ]
        found |= run_jobs(pairs, cache_folder, bar)
        if not processes.is_first:
            return {}
    models = {a.donor.name: dict(a.parts(found, own)) for a, own in zip(analyses, stacks, strict=True)}
    results = {
        "command": None,
        "versions": package_versions(),
        "seed": config.seed,
        "ranks": ranks,
        "bootstraps": config.bootstraps,
        "donors": [_summary(donor) for donor in donors],
        "models": models,
        "signatures": _signatures(models),
    }
    return to_json_values(results, DIGITS)


def _open_donors(config: AnalyzeConfig, quiet: bool) -> tuple[Donor, ...]:
    if config.zoo is None:
        return open_standalone(str(config.donor), quiet).donors
    zoo = Zoo.open(config.zoo)
    if not zoo.names:
        raise UserError(f"{config.zoo}: holds no donors; add some with `headstart zoo add`")
    return zoo.donors if config.donor is None else (zoo.donor(config.donor),)


def _summary(donor: Donor) -> dict[str, Any]:
    metadata = donor.blueprint.metadata
    return provenance(donor) | {
        "architecture": donor.config.get("model_type", "unknown"),
        "parameters": donor.parameters,
        "layers": None if metadata is None else metadata.layers,
        "width": None if metadata is None else metadata.width,
    }


def _signatures(models: dict[str, Any]) -> dict[str, Any]:
    """Kind of signature -> table of distances between the donors that have it, where at least two have it."""
    tables = {}
    for kind in ("std", "clustering"):
        known = {name: m["signature"][kind] for name, m in models.items() if kind in m["signature"]}
        if len(known) > 1:
            tables[kind] = signature_distances(known)
    return tables
