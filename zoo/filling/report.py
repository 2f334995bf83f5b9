"""What `zoo add` says about each source."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.sources import Source
from zoo.donors.records import read_record
from zoo.statistics.health import Finding, summarise_findings


@dataclass(frozen=True)
class AddSettings:
    """What every step of an addition needs to know."""

    quiet: bool
    health: bool


@dataclass(frozen=True)
class Report:
    """What happens, or would happen, to one source. `read`, `download` and `write` are bytes."""

    source: str
    name: str | None  # of the donor; None where all possible names are taken
    revision: str | None  # None in the plan of a source that is not read
    license: str
    state: str  # new or present in a plan, else added or present
    tensors: int | None  # None, as `write`, in the plan of a GGUF file that is not on this machine
    read: int
    download: int
    write: int | None
    health: str | None = None  # None where nothing was added


def report_present(source: Source, home: Path, download: int) -> Report:
    """The report of a source that is the donor in the folder `home` already."""
    record = read_record(home)
    tensors = len(Checkpoint.open(home).names)
    return Report(
        source.address, home.name, record["revision"], record["license"], "present", tensors, source.size, download, 0
    )


def report_added(source: Source, home: Path, download: int, findings: list[Finding], settings: AddSettings) -> Report:
    """The report of a source that became the donor in the folder `home`. Prints the findings about its health."""
    for finding in [] if settings.quiet else findings:
        print(f"{home.name}: {finding.text}", file=sys.stderr)
    record = read_record(home)
    written = sum(stamp["size"] for stamp in record["files"].values()) if "gguf" in record else source.size
    tensors = len(Checkpoint.open(home).names)
    health = summarise_findings(findings) if settings.health else "not checked"
    return Report(
        source.address, home.name, record["revision"], record["license"], "added", tensors, source.size, download,
        written, health,
    )  # fmt: skip
