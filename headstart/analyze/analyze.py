"""`headstart analyze`: what the weights of donors look like, beside what chance alone would give.

Every part of a donor's analysis is kept, as soon as it is finished, in a hidden folder beside the output, named after
a hash of all that it depends on: the same command takes it up again after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from headstart import __version__
from headstart.analyze.parts import AnalysisTask, Cache, Progress, analyze_donor, to_json_values
from headstart.report.analysis import render_analysis
from headstart.versions import package_versions
from zoo.checkpoints.writer import new_folder, replace_file
from zoo.donors.donor import Donor, provenance
from zoo.donors.zoo import Zoo, open_standalone
from zoo.errors import UserError
from zoo.statistics.signature import signature_distances

DIGITS = 10  # of all numbers: sums of the same values in another place in memory differ in the last two or three
PARTS = 8  # that `analyze_donor` yields of a donor


def analyze(
    out: str | Path,
    zoo: str | Path | None = None,
    donor: str | None = None,
    ranks: Sequence[int] = (16, 64, 256),
    bootstraps: int = 500,
    seed: int = 0,
    device: str = "cpu",
    quiet: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Analyzes the donors of `zoo`, or one, and writes analysis.json and report.html into the new folder `out`;
    returns what analysis.json holds.

    zoo         a zoo's folder; without one, `donor` is a checkpoint folder or a hub id
    donor       only this donor
    ranks       of how many singular values the similarity of layers is made; a donor whose smallest projection has
                fewer is compared by that many, and the report says so
    bootstraps  replicates behind each p-value of their similarity, of as many independent values as layers are worth

    One tensor is in memory at a time. What a donor does not admit (the similarity of two layers, say) is left out
    with the reason, and the rest goes on. Raises UserError before any work: neither zoo nor donor, an unknown donor,
    an `out` that exists, numbers out of bounds."""
    out = Path(out)
    asked = tuple(sorted(set(ranks)))
    if not asked or asked[0] < 2:
        given = ",".join(map(str, ranks))
        raise UserError(f"--ranks {given}: a direction needs two numbers or more; give ranks from 2 on, say 16,64,256")
    if bootstraps < 1:
        raise UserError(f"--bootstraps {bootstraps}: must be at least 1")
    work = out.parent / f".{out.name}.work"
    with new_folder(out) as folder:
        donors = _donors(zoo, donor, quiet)
        models: dict[str, dict[str, Any]] = {}
        with tqdm(total=len(donors) * PARTS, desc="analyze", unit="part", disable=quiet) as bar:
            for d in donors:
                models[d.name] = found = {}
                for name, value in analyze_donor(
                    AnalysisTask(d, asked, bootstraps, seed, device, _keeper(work, bar, d.name))
                ):
                    found[name] = value
                    bar.update()
        results = to_json_values(
            {
                "command": command or _command(out, zoo, donor, asked, bootstraps, seed),
                "versions": package_versions(),
                "seed": seed,
                "ranks": asked,
                "bootstraps": bootstraps,
                "donors": [_about(d) for d in donors],
                "models": models,
                "signatures": _signatures(models),
            },
            DIGITS,
        )
        (folder / "analysis.json").write_text(json.dumps(results, ensure_ascii=False) + "\n")
        (folder / "report.html").write_text(render_analysis(results))
    shutil.rmtree(work, ignore_errors=True)
    return results


def _donors(zoo: str | Path | None, donor: str | None, quiet: bool) -> tuple[Donor, ...]:
    if zoo is None and donor is None:
        raise UserError("nothing to analyze: give --zoo DIR, --donor FOLDER (or a hub id), or both to choose a donor")
    if zoo is None:
        return open_standalone(str(donor), quiet).donors
    opened = Zoo.open(zoo)
    if not opened.names:
        raise UserError(f"{zoo}: holds no donors; add some with `headstart zoo add`")
    return opened.donors if donor is None else (opened.donor(donor),)


def _about(donor: Donor) -> dict[str, Any]:
    metadata = donor.blueprint.metadata
    return provenance(donor) | {
        "architecture": donor.config.get("model_type", "unknown"),
        "parameters": donor.parameters,
        "layers": None if metadata is None else metadata.layers,
        "width": None if metadata is None else metadata.width,
    }


def _keeper(work: Path, bar: Any, donor: str) -> Cache:
    """`keep` of a donor's task: JSON files in `work`, and a word beside the progress bar on what is being done."""

    def keep(what: str, depends_on: list[Any], make: Callable[[Progress], Any]) -> Any:
        digest = hashlib.sha256(json.dumps([__version__, what, depends_on]).encode()).hexdigest()
        path = work / f"{what}-{digest[:24]}.json"
        if path.is_file():
            return json.loads(path.read_text())
        done, shown = 0, 0.0

        def tick(more: int) -> None:
            nonlocal done, shown
            done += more
            if time.monotonic() > shown + 0.2:
                shown = time.monotonic()
                bar.set_postfix_str(f"{donor}: {what} {done}")

        bar.set_postfix_str(f"{donor}: {what}")
        value = to_json_values(make(tick))
        replace_file(path, json.dumps(value).encode())
        return value

    return keep


def _signatures(models: dict[str, Any]) -> dict[str, Any]:
    """kind of signature -> table of distances between the donors that have it; only where two of them do."""
    tables = {}
    for kind in ("std", "clustering"):
        known = {name: m["signature"][kind] for name, m in models.items() if kind in m["signature"]}
        if len(known) > 1:
            tables[kind] = signature_distances(known)
    return tables


def _command(
    out: Path, zoo: str | Path | None, donor: str | None, ranks: Sequence[int], bootstraps: int, seed: int
) -> str:
    """The command line that does what this call does."""
    where = [word for key, value in (("--zoo", zoo), ("--donor", donor)) if value for word in (key, str(value))]
    numbers = ["--ranks", ",".join(map(str, ranks)), "--bootstraps", str(bootstraps), "--seed", str(seed)]
    return shlex.join(["headstart", "analyze", *where, "--out", str(out), *numbers])
