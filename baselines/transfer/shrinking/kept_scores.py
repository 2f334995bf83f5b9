"""Scores by weights that a zoo keeps, so that a donor is not read again for the next target."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from baselines.transfer.shrinking.importance import Scores, score_by_weights
from zoo.checkpoints.atomic import replacement_file
from zoo.checkpoints.headers import read_header
from zoo.donors.donor import Donor
from zoo.donors.folder import ZooDonor
from zoo.donors.layout import fit_path
from zoo.errors import UserError
from zoo.sandbox import library_errors

log = logging.getLogger(__name__)

PARTS = ("residual", "ffn", "heads", "expert_ffn", "shared_ffn")
ENERGY = "energy/"
CODE = (Path(__file__).with_name("importance.py"),)  # other code may give other scores


def kept_or_scored(donor: Donor, device: str) -> Scores:
    """`score_by_weights`, from the zoo of the donor where it is kept there; else it is kept there now.

    The file is named by the donor's content, the kind of device and the code that scores. One that cannot be read is
    replaced with a warning, and a zoo that cannot be written keeps nothing.
    """
    if not isinstance(donor, ZooDonor):
        return score_by_weights(donor, device)
    zoo, depends_on = donor.folder.parent.parent, [donor.sha256, torch.device(device).type]
    path = fit_path(zoo, "scores", depends_on, CODE).with_suffix(".safetensors")
    if path.exists():
        try:
            return _read(path, donor)
        except UserError as error:
            log.warning("%s; it is computed again", error)
    scores = score_by_weights(donor, device)
    try:
        path.parent.mkdir(exist_ok=True)
        with replacement_file(path) as partial:
            save_file(_tensors(scores), partial)
    except (UserError, OSError) as error:
        log.info("the scores of %s are not kept: %s", donor.name, error)
    return scores


def _tensors(scores: Scores) -> dict[str, Tensor]:
    parts = {part: getattr(scores, part).contiguous() for part in PARTS}
    return parts | {f"{ENERGY}{name}": energy.contiguous().clone() for name, energy in scores.energy.items()}


def _read(path: Path, donor: Donor) -> Scores:
    """UserError for a file that is damaged or of another donor."""
    advice = "remove it"
    read_header(path)
    with library_errors(f"{path}: cannot be read", advice):
        tensors = load_file(path)
    meta = donor.blueprint.metadata
    assert meta is not None
    norms = {f"{ENERGY}{spec.name}": spec.shape for spec, _ in donor.blueprint.find("norm")}
    sizes = {"residual": (meta.width,), "heads": (meta.layers, meta.heads), **norms}
    sizes["ffn"] = (meta.layers, 0 if meta.experts else meta.ffn)
    if tensors.keys() != {*PARTS, *norms} or any(tuple(tensors[name].shape) != size for name, size in sizes.items()):
        raise UserError(f"{path}: does not hold the scores of {donor.name}; {advice}")
    if any(tensor.dtype != torch.float64 or not tensor.isfinite().all() for tensor in tensors.values() if len(tensor)):
        raise UserError(f"{path}: holds other values than scores; {advice}")
    energy = {name.removeprefix(ENERGY): tensor for name, tensor in tensors.items() if name.startswith(ENERGY)}
    return Scores(**{part: tensors[part] for part in PARTS}, energy=energy)
