"""The reference of a LoRA method that follows another model: a checkpoint, or its saved analysis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zoo.checkpoints.sources import Source, resolve_source
from zoo.donors.folder import standalone_name
from zoo.errors import UserError


@dataclass(frozen=True)
class ReferenceModel:
    """A resolved reference. Its name is how the sampler finds it: a donor of the zoo, or FILE[#MODEL]."""

    name: str
    source: Source | None  # None for the base itself, and for an analysis
    analysis: Path | None = None


def resolve_reference(reference: str, base: Source | None) -> ReferenceModel:
    """The reference behind a folder, a hub id or analysis.json[#MODEL]. It may be the base itself. Raises UserError for
    anything else."""
    from baselines.lora.pareto import ANALYSIS_PATTERN

    if found := ANALYSIS_PATTERN.fullmatch(reference):
        if not Path(found[1]).is_file():
            raise UserError(f"{found[1]}: no such file; `headstart analyze` writes an analysis.json")
        return ReferenceModel(reference, None, Path(found[1]))
    source = resolve_source(reference)
    if base is not None and source.address == base.address:
        return ReferenceModel(standalone_name(base), None)
    name = standalone_name(source)
    return ReferenceModel(name if base is None or name != standalone_name(base) else source.address, source)
