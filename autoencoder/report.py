"""What the trained autoencoder keeps of its donors: errors and losses, beside PCA with as many numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from autoencoder.behaviour import field_decoder, text_loss
from autoencoder.donors import TrainingDonor, count_numbers, field_numbers
from autoencoder.model import WeightAutoencoder
from autoencoder.objective import Skeletons, donor_logits, reconstruction_error

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
    """{numbers, decoded}: how many numbers the field stores beside the donors' weights, and for each donor its loss on
    its training text as it is and decoded at its own shape, and the relative error of its tables."""
    rows = {}
    for donor, text in zip(donors, texts, strict=True):
        starts = torch.linspace(0, len(text) - SEQUENCE - 1, WINDOWS).long()
        windows = text[starts[:, None] + torch.arange(SEQUENCE + 1)]
        latents = model.encode(donor.blocks, donor.tokens)
        own = donor_logits(donor, skeletons, windows)
        shape = replace(donor.shape, tied=False)
        decoder = field_decoder(model.field, shape, latents, donor.rows)
        errors = reconstruction_error(model.field, donor, latents, torch.device("cpu"))
        rows[donor.name] = {
            "donor_loss": float(torch.nn.functional.cross_entropy(own.flatten(0, 1), windows[:, 1:].flatten())),
            "decoded_loss": float(text_loss(skeletons.get(shape), decoder, windows)),
            "error": {table: float(error.mean()) for table, error in errors.items()},
        }
    numbers = {"field": field_numbers(model.sizes), "donors": sum(count_numbers(d) for d in donors)}
    network = sum(p.numel() for p in model.field.parameters()) - numbers["field"]
    return {"numbers": {**numbers, "network": network}, "decoded": rows}
