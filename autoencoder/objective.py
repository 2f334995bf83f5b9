"""What is minimised: the error of reconstructed donors, and the loss of the models that the field writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autoencoder.behaviour import Skeleton, distillation_loss, field_decoder, logits, make_skeleton, text_loss
from autoencoder.config import AutoencoderTrainConfig
from autoencoder.donors import TrainingDonor
from autoencoder.field import Latents, WeightField, all_blocks
from autoencoder.model import WeightAutoencoder
from autoencoder.shapes import random_shape, shape_range
from zoo.streams import stream
from zoo.tensors import Metadata
from zoo.training.loop import sample_windows
from zoo.units.tables import BLOCK_TABLES, tables_to_decoder, tables_to_layer

KEPT_SKELETONS = 256


@dataclass(frozen=True)
class BehaviourStep:
    """What one step of behaviour trains on, a function of (seed, step)."""

    donors: tuple[int, ...]  # one, or two whose latents are mixed
    other: int  # a donor whose latents must write other weights
    share: float  # of the first donor's latents and text
    shape: int  # the number of a random shape; -1 for the first donor's own


class Skeletons:
    """Models without weights by shape, made when they are needed."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self._config, self._kept = config, {}  # type: ignore[var-annotated]

    def get(self, shape: Metadata) -> Skeleton:
        key = (shape.width, shape.layers, shape.heads, shape.kv_heads, shape.ffn, shape.vocab, shape.tied)
        if key not in self._kept:
            if len(self._kept) >= KEPT_SKELETONS:
                self._kept.clear()
            self._kept[key] = make_skeleton(self._config, shape)
        return self._kept[key]


def training_shapes(donors: Sequence[TrainingDonor], model: WeightAutoencoder, count: int, seed: int) -> list[Metadata]:
    """The random shapes of a training, without those of the donors. Their vocabulary is set for each donor."""
    known = [d.shape for d in donors]
    bounds = shape_range(known, model.sizes)
    return [random_shape(replace(known[0], tied=False), bounds, seed, f"shape {i}") for i in range(count)]


def draw_step(config: AutoencoderTrainConfig, donors: Sequence[TrainingDonor], step: int) -> BehaviourStep:
    """Which donors and which shape a step of behaviour has."""
    rng = stream(config.seed, f"behaviour {step}")
    first = int(torch.randint(len(donors), (1,), generator=rng))
    mixes = float(torch.rand((), generator=rng)) < config.mixing
    second = int(torch.randint(len(donors), (1,), generator=rng))
    share = float(torch.rand((), generator=rng))
    own = float(torch.rand((), generator=rng)) < OWN_SHAPE
    shape = -1 if own else int(torch.randint(config.shapes, (1,), generator=rng))
    both = donors[first], donors[second]
    mixes = mixes and all(d.is_final for d in both) and torch.equal(both[0].rows, both[1].rows)
    return BehaviourStep((first, second) if mixes else (first,), second, share if mixes else 1.0, shape)


OWN_SHAPE = 0.1  # how often a donor's latents are trained at its own shape


def mixed_windows(texts: Sequence[Tensor], chosen: BehaviourStep, config: AutoencoderTrainConfig, step: int) -> Tensor:
    """Windows int64 [B, T+1] of the texts of a step's donors, in the proportion of their latents."""
    found = sample_windows(texts[chosen.donors[0]], config.batch, config.sequence, config.seed, step)
    if len(chosen.donors) == 2:
        other = sample_windows(texts[chosen.donors[1]], config.batch, config.sequence, config.seed + 1, step)
        count = round(chosen.share * config.batch)
        found = torch.cat([found[:count], other[count:]])
        found = found[torch.randperm(len(found), generator=stream(config.seed, f"order {step}"))]
    return found


def noisy(latents: Latents, scale: float, rng: torch.Generator) -> Latents:
    """Latents with normal noise; the noise is drawn on the CPU."""

    def add(x: Tensor) -> Tensor:
        return x + scale * torch.randn(x.shape, generator=rng).to(x)

    return Latents(add(latents.model), add(latents.blocks))


def reconstruction_error(
    field: WeightField, donor: TrainingDonor, latents: Latents, device: torch.device
) -> dict[str, Tensor]:
    """By table, the squared error over the energy of each role, [P]."""

    def relative(found: Tensor, wanted: Tensor) -> Tensor:
        axes = tuple(i for i in range(wanted.ndim) if i != wanted.ndim - 2)
        return (found - wanted).square().sum(axes) / wanted.square().sum(axes)

    found = all_blocks(field, donor.shape, latents)
    errors = {t: relative(found[t], donor.blocks[t].to(device)) for t in BLOCK_TABLES}
    tokens = field.tokens(donor.shape, latents, donor.rows.to(device))
    return errors | {"token": relative(tokens, donor.tokens.to(device))}


def sameness(field: WeightField, shape: Metadata, one: Latents, other: Latents, margin: float) -> Tensor:
    """How far the squared relative distance of what two latents write is below margin², from 0 to 1.

    The loss on text alone makes the weights forget the latents: all donors of a text then write one model."""
    spread = (z.at_depth(shape.layers) for z in (one, other))
    a, b = (field.blocks(shape, z, torch.arange(shape.layers)) for z in spread)
    found = []
    for table in BLOCK_TABLES:
        energy = (a[table].square().sum() + b[table].square().sum()) / 2
        found.append(1 - (a[table] - b[table]).square().sum() / energy / margin**2)
    return torch.stack(found).clamp_min(0).mean()


def donor_logits(donor: TrainingDonor, skeletons: Skeletons, windows: Tensor) -> Tensor:
    """The donor's own logits on windows, from its tables."""
    device = windows.device
    layers = tuple(
        tables_to_layer({t: donor.blocks[t][i].to(device) for t in BLOCK_TABLES}) for i in range(donor.shape.layers)
    )
    shape = replace(donor.shape, tied=False)  # the canonical form is untied
    with torch.no_grad():
        decoder = tables_to_decoder(donor.tokens.to(device), layers, shape)
        return logits(skeletons.get(shape), decoder, windows[:, :-1])


def written_loss(
    field: WeightField,
    latents: Latents,
    donor: TrainingDonor,
    shape: Metadata,
    skeletons: Skeletons,
    windows: Tensor,
) -> Tensor:
    """The loss of the model that the field writes at a shape: on text, or for an early checkpoint of a run against the
    donor's logits, so that latents of early checkpoints write models of their quality."""
    decoder = field_decoder(field, shape, latents.at_depth(shape.layers), donor.rows.to(windows.device))
    skeleton = skeletons.get(shape)
    if donor.is_final:
        return text_loss(skeleton, decoder, windows)
    return distillation_loss(skeleton, decoder, windows, donor_logits(donor, skeletons, windows))
