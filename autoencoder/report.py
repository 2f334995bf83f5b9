"""What the trained autoencoder keeps of its donors: errors and losses, beside PCA with as many numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from autoencoder.behaviour import field_decoder, first_positions, text_loss
from autoencoder.donors import TrainingDonor, count_numbers, field_numbers
from autoencoder.model import WeightAutoencoder
from autoencoder.objective import Skeletons, donor_logits, encode_donor, reconstruction_error
from zoo.linear_algebra import symmetric_eigenvectors
from zoo.training.loop import spread_windows
from zoo.units.tables import TABLE_ROLES

FLOP_STEPS = 6  # of a stage, whose operations are counted
WINDOWS, SEQUENCE = 32, 64  # of text, on which decoded donors are judged


def stage_flops(loss: Callable[[int, int, int], Tensor], bounds: Sequence[int]) -> float:
    """The floating-point operations of a training, as torch counts them: matrix products and attention, with their
    gradients. bounds: the first step of each stage and the end of the last; some steps of each stage are counted.

    loss: `Objective`'s, of (step, part, parts)."""
    total = 0.0
    for first, end in itertools.pairwise(bounds):
        steps = torch.linspace(first, end - 1, min(FLOP_STEPS, end - first)).long().tolist()
        with FlopCounterMode(display=False) as counter:
            for step in steps:
                loss(step, 0, 1).backward()
        total += (end - first) * counter.get_total_flops() / max(len(steps), 1)
    return total


@torch.no_grad()
def training_report(
    model: WeightAutoencoder, donors: Sequence[TrainingDonor], texts: Sequence[Tensor], skeletons: Skeletons
) -> dict[str, Any]:
    """{numbers, decoded}: how many numbers the field stores beside the donors' weights; and for each donor its loss on
    its training text as it is, decoded at its own shape, and after a PCA with as many numbers, with the relative
    squared errors of its tables."""
    numbers = {"field": field_numbers(model.sizes), "donors": sum(count_numbers(d) for d in donors)}
    share = numbers["field"] / numbers["donors"]
    axes = {family: pca_axes([d for d in donors if d.family == family], share) for family in model.sizes.families}
    rows = {}
    for donor, text in zip(donors, texts, strict=True):
        windows = spread_windows(text, WINDOWS, SEQUENCE)
        latents = encode_donor(model, donor)
        shape = replace(donor.shape, tied=False)
        windows, first = first_positions(skeletons.get(shape), windows)
        decoder = field_decoder(model.field, shape, latents, donor.rows)
        errors = reconstruction_error(model.field, donor, latents, torch.device("cpu"))
        projected = pca_projection(donor, axes[donor.family])
        rows[donor.name] = {
            "donor_loss": _loss(donor, skeletons, windows, first),
            "decoded_loss": float(text_loss(skeletons.get(shape), decoder, windows, first)),
            "pca_loss": _loss(projected, skeletons, windows, first),
            "error": {table: float(error.mean()) for table, error in errors.items()},
            "pca_error": {table: _error(projected, donor, table) for table in TABLE_ROLES},
        }
    network = sum(p.numel() for p in model.field.parameters()) - numbers["field"]
    return {"numbers": {**numbers, "network": network}, "decoded": rows}


def pca_axes(donors: Sequence[TrainingDonor], share: float) -> dict[str, Tensor]:
    """By table, the principal axes [S, P * W] of the entries of all donors of a family, padded to the widest stream W.
    Axes and coordinates together have `share` of the entries' numbers."""
    width = max(d.shape.width for d in donors)
    axes = {}
    for table in TABLE_ROLES:
        entries = [_entries(d, table) for d in donors]
        rows = torch.cat([_padded(e, width) for e in entries]).double()
        wanted = share * sum(e.numel() for e in entries)
        size = max(1, min(rows.shape[1], round(wanted / sum(rows.shape))))
        axes[table] = symmetric_eigenvectors(rows.mT @ rows)[1].mT[:size].float()
    return axes


def pca_projection(donor: TrainingDonor, axes: Mapping[str, Tensor]) -> TrainingDonor:
    """A donor whose entries are projected to the axes. Tables that only some families have stay as they are."""

    def project(table: str) -> Tensor:
        own = donor.tokens if table == "token" else donor.blocks[table]
        roles, width = own.shape[-2:]
        flat = _padded(_entries(donor, table), axes[table].shape[1] // roles)
        found = (flat @ axes[table].mT @ axes[table]).unflatten(1, (roles, -1))[..., :width]
        return found.reshape(own.shape)

    blocks = {table: project(table) if table in axes else own for table, own in donor.blocks.items()}
    return replace(donor, tokens=project("token"), blocks=blocks)


def _entries(donor: TrainingDonor, table: str) -> Tensor:
    """All entries of a table, [N, P, d]."""
    return donor.tokens if table == "token" else donor.blocks[table].flatten(0, -3)


def _padded(entries: Tensor, width: int) -> Tensor:
    """Entries [N, P, d] with zeros up to a width, [N, P * width]."""
    return F.pad(entries, (0, width - entries.shape[-1])).flatten(1)


def _error(found: TrainingDonor, wanted: TrainingDonor, table: str) -> float:
    own = _entries(wanted, table)
    return float((_entries(found, table) - own).square().sum() / own.square().sum())


def _loss(donor: TrainingDonor, skeletons: Skeletons, windows: Tensor, starts: Tensor | None) -> float:
    own = donor_logits(donor, skeletons, windows, starts)
    return float(F.cross_entropy(own.flatten(0, 1), windows[:, 1:].flatten()))
