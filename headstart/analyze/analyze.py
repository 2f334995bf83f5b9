"""`headstart analyze`: statistics of the weights of donors, each beside its null.

Every part of a donor's analysis is stored when it is finished, in a hidden folder beside the output. Its file is named
after a hash of all that it depends on. So the same command continues after an interruption.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from headstart import __version__
from headstart.analyze.parts import AnalysisTask, Cache, Progress, analyze_donor, to_json_values
from headstart.config import AnalyzeConfig
from headstart.devices import torch_device
from headstart.report.analysis import render_analysis
from headstart.versions import package_versions
from zoo.checkpoints.atomic import new_folder, replace_file
from zoo.checkpoints.files import parse_json, read_bytes
from zoo.donors.donor import Donor, provenance
from zoo.donors.zoo import Zoo, open_standalone
from zoo.errors import UserError
from zoo.limits import MAX_JSON
from zoo.statistics.signature import signature_distances

DIGITS = 10  # of all numbers: the last two or three digits of a sum depend on where its values lie in memory
PARTS = 8  # that `analyze_donor` yields of a donor


def analyze(config: AnalyzeConfig, *, quiet: bool = False, command: str | None = None) -> dict[str, Any]:
    """Analyzes the donors of a zoo, or one donor, and writes analysis.json and report.html into the new folder
    `config.out`; returns the content of analysis.json.

    - `ranks` are numbers of singular values by which layers are compared. A donor whose smallest projection has fewer
      is compared by that many, and the report says so.
    - `bootstraps` is the number of bootstrap samples for each p-value of the layers' similarity.

    command  what the results name as the command; else the command line that does the same

    One tensor is in memory at a time. A part that a donor does not allow (such as the similarity of two layers) is left
    out with its reason, and the rest goes on. Raises UserError before any work: an unknown donor, or an `out` that
    exists."""
    out = Path(config.out)
    cache_folder = out.parent / f".{out.name}.work"
    with new_folder(out) as folder:
        results = _analyze_donors(config, cache_folder, quiet)
        results |= {"command": command or config.to_command(), "config": config.to_record()}
        (folder / "analysis.json").write_text(json.dumps(results, ensure_ascii=False) + "\n")
        (folder / "report.html").write_text(render_analysis(results))
        shutil.rmtree(cache_folder, ignore_errors=True)  # before the folder appears: then nothing is left beside it
    return results


def _analyze_donors(config: AnalyzeConfig, cache_folder: Path, quiet: bool) -> dict[str, Any]:
    ranks, device = tuple(sorted(set(config.ranks))), torch_device(config.device)
    donors = _open_donors(config, quiet)
    models: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(donors) * PARTS, desc="analyze", unit="part", disable=quiet) as bar:
        for donor in donors:
            models[donor.name] = found = {}
            cache = _cache(cache_folder, bar, donor.name)
            task = AnalysisTask(donor, ranks, config.bootstraps, config.seed, device, cache)
            for name, value in analyze_donor(task):
                found[name] = value
                bar.update()
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


def _cache(folder: Path, bar: Any, donor: str) -> Cache:
    """The cache of a donor's task: JSON files in `folder`. The progress bar names the part that is computed."""

    def cached(what: str, depends_on: list[Any], compute: Callable[[Progress], Any]) -> Any:
        digest = hashlib.sha256(json.dumps([__version__, what, depends_on]).encode()).hexdigest()
        path = folder / f"{what}-{digest[:24]}.json"
        if path.is_file():
            with contextlib.suppress(UserError):  # a damaged part is computed again
                return parse_json(read_bytes(path, MAX_JSON), str(path))
        done, last_shown = 0, 0.0

        def report(more: int) -> None:
            nonlocal done, last_shown
            done += more
            if time.monotonic() > last_shown + 0.2:
                last_shown = time.monotonic()
                bar.set_postfix_str(f"{donor}: {what} {done}")

        bar.set_postfix_str(f"{donor}: {what}")
        value = to_json_values(compute(report))
        replace_file(path, json.dumps(value).encode())
        return value

    return cached


def _signatures(models: dict[str, Any]) -> dict[str, Any]:
    """Kind of signature -> table of distances between the donors that have it, where at least two have it."""
    tables = {}
    for kind in ("std", "clustering"):
        known = {name: m["signature"][kind] for name, m in models.items() if kind in m["signature"]}
        if len(known) > 1:
            tables[kind] = signature_distances(known)
    return tables
