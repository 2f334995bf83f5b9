"""What is minimised: the error of reconstructed donors, and the loss of the models that the field writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autoencoder.behaviour import (
    Skeleton,
    distillation_loss,
    field_decoder,
    first_positions,
    logits,
    make_skeleton,
    text_loss,
)
from autoencoder.config import AutoencoderTrainConfig
from autoencoder.donors import TrainingDonor
from autoencoder.field import Latents, WeightField, all_blocks
from autoencoder.model import WeightAutoencoder
from autoencoder.shapes import random_shape, shape_range
from zoo.streams import stream
from zoo.targets.resizing import has_size
from zoo.tensors import Metadata
from zoo.training.loop import sample_windows
from zoo.units.decoder import Decoder
from zoo.units.family import PLAIN, Family, family_of
from zoo.units.tables import BLOCK_TABLES, split_constants, tables_to_decoder, tables_to_layer

KEPT_SKELETONS = 256


@dataclass(frozen=True)
class BehaviourStep:
    """What one step of behaviour trains on, a function of (seed, step)."""

    donors: tuple[int, ...]  # one, or two whose latents are mixed
    other: int  # a donor whose latents must write other weights
    share: float  # of the first donor's latents and text
    shape: int  # the number of a random shape; -1 for the first donor's own


class Skeletons:
    """Models without weights by shape, made when they are needed from the config of a donor of the same kind."""

    def __init__(self, donors: Sequence[TrainingDonor]) -> None:
        self._configs = {_kind(donor.shape): donor.donor.config for donor in reversed(by_free_sizes(donors))}
        self._kept: dict[tuple[object, ...], Skeleton] = {}

    def get(self, shape: Metadata) -> Skeleton:
        heads = (shape.heads, shape.kv_heads, shape.head_dim)
        key = (*_kind(shape), shape.width, shape.layers, *heads, shape.ffn, shape.vocab, shape.tied)
        if key not in self._kept:
            if len(self._kept) >= KEPT_SKELETONS:
                self._kept.clear()
            self._kept[key] = make_skeleton(self._configs[_kind(shape)], shape)
        return self._kept[key]


def by_free_sizes(donors: Sequence[TrainingDonor]) -> list[TrainingDonor]:
    """The donors in order, those first whose architecture has a size of heads that does not depend on the width."""
    return sorted(donors, key=lambda donor: not has_size(donor.donor.config, "head_dim"))


def _kind(shape: Metadata) -> tuple[object, ...]:
    """What decides about a model, beside its sizes."""
    return family_of(shape), shape.rope_theta, shape.positions


def training_shapes(
    donors: Sequence[TrainingDonor], model: WeightAutoencoder, count: int, seed: int
) -> dict[Family, list[Metadata]]:
    """The random shapes of a training by family, without those of the donors. Each donor sets their vocabulary."""
    found: dict[Family, list[Metadata]] = {}
    for number, family in enumerate(model.sizes.families):
        own = by_free_sizes([d for d in donors if d.family == family])
        known = [d.shape for d in own]
        bounds = shape_range(known, model.sizes, own[0].donor.config)
        base = replace(known[0], tied=family != PLAIN and all(d.is_tied for d in own))
        names = [f"shape {i}" if family == PLAIN else f"shape {i} of family {number}" for i in range(count)]
        bases = [replace(base, head_dim=_random_head_dim(known, seed, name)) for name in names]
        found[family] = [random_shape(b, bounds, seed, name) for b, name in zip(bases, names, strict=True)]
    return found


def _random_head_dim(shapes: Sequence[Metadata], seed: int, name: str) -> int:
    """The size of heads of a random shape: that of a donor of its family."""
    sizes = sorted({shape.head_dim for shape in shapes}, reverse=True)
    return sizes[int(torch.randint(len(sizes), (1,), generator=stream(seed, f"heads of {name}")))]


def draw_step(config: AutoencoderTrainConfig, donors: Sequence[TrainingDonor], step: int) -> BehaviourStep:
    """Which donors and which shape a step of behaviour has."""
    rng = stream(config.seed, f"behaviour {step}")
    numbers = _drawn_from(config, donors, step, rng)
    first = numbers[int(torch.randint(len(numbers), (1,), generator=rng))]
    mixes = float(torch.rand((), generator=rng)) < config.mixing
    second = numbers[int(torch.randint(len(numbers), (1,), generator=rng))]
    share = float(torch.rand((), generator=rng))
    own = float(torch.rand((), generator=rng)) < OWN_SHAPE
    shape = -1 if own else int(torch.randint(config.shapes, (1,), generator=rng))
    both = donors[first], donors[second]
    alike = both[0].family == both[1].family
    mixes = mixes and alike and not config.distill
    mixes = mixes and all(d.is_final for d in both) and torch.equal(both[0].rows, both[1].rows)
    other = second if alike else first
    return BehaviourStep((first, second) if mixes else (first,), other, share if mixes else 1.0, shape)


def _drawn_from(
    config: AutoencoderTrainConfig, donors: Sequence[TrainingDonor], step: int, rng: torch.Generator
) -> list[int]:
    """The numbers of the donors of a step: last checkpoints of runs, or, late and now and then, early ones."""
    final = [i for i, d in enumerate(donors) if d.is_final]
    early = [i for i, d in enumerate(donors) if not d.is_final]
    if not final or not early:
        return final or early
    late = config.is_late(step, config.early_from)
    return early if late and float(torch.rand((), generator=rng)) < config.early else final


LEAST_ENERGY = 1e-4  # mean square of a role below which its relative error counts less
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

    def relative(table: str, found: Tensor, wanted: Tensor) -> Tensor:
        role_axis = wanted.ndim - (1 if table.endswith("_numbers") else 2)
        axes = tuple(i for i in range(wanted.ndim) if i != role_axis)
        energy = wanted.square().sum(axes)
        if donor.family != PLAIN:  # some biases are zero
            energy = energy + LEAST_ENERGY * wanted.numel() / wanted.shape[role_axis]
        return (found - wanted).square().sum(axes) / energy

    found = all_blocks(field, donor.shape, latents)
    errors = {t: relative(t, found[t], x.to(device)) for t, x in donor.blocks.items()}
    written = split_constants(field.tokens(donor.shape, latents, donor.rows.to(device)), donor.family)
    own = split_constants(donor.tokens.to(device), donor.family)
    errors |= {t: relative(t, written[t], x) for t, x in own.items()}
    if donor.positions is not None:
        positions = field.positions(donor.shape, latents)
        assert positions is not None
        errors["position"] = relative("position", positions, donor.positions.to(device))
    return errors


def text_error(latents: Latents, coordinates: Tensor) -> Tensor:
    """The mean squared difference of the first numbers of a model's latent from the coordinates [k] of its text.

    Reconstruction does not tell texts apart: most of what it sees is how long a donor was trained."""
    return (latents.model[: len(coordinates)] - coordinates.to(latents.model)).square().mean()


def encode_donor(model: WeightAutoencoder, donor: TrainingDonor) -> Latents:
    """The latents of a donor."""
    device = model.device
    positions = None if donor.positions is None else donor.positions.to(device)
    blocks = {name: table.to(device) for name, table in donor.blocks.items()}
    return model.encode(blocks, donor.tokens.to(device), donor.family, positions)


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


@torch.no_grad()
def donor_decoder(donor: TrainingDonor, device: torch.device) -> Decoder:
    """A donor's tables as a canonical decoder, which is untied."""
    shape = replace(donor.shape, tied=False)
    layers = tuple(
        tables_to_layer({t: x[i].to(device) for t, x in donor.blocks.items()}, shape) for i in range(shape.layers)
    )
    positions = None if donor.positions is None else donor.positions.to(device)
    return tables_to_decoder(donor.tokens.to(device), layers, shape, positions)


def donor_logits(donor: TrainingDonor, skeletons: Skeletons, windows: Tensor, starts: Tensor | None = None) -> Tensor:
    """The donor's own logits on windows, from its tables. starts: as for `logits`."""
    decoder = donor_decoder(donor, windows.device)
    with torch.no_grad():
        return logits(skeletons.get(decoder.metadata), decoder, windows[:, :-1], starts)


def written_loss(
    field: WeightField,
    latents: Latents,
    donor: TrainingDonor,
    shape: Metadata,
    skeletons: Skeletons,
    windows: Tensor,
    distill: bool = False,
) -> Tensor:
    """The loss of the model that the field writes at a shape: on text, or, with `distill` and for an early checkpoint
    of a run, against the donor's logits. So latents of early checkpoints write models of their quality."""
    decoder = field_decoder(field, shape, latents.at_depth(shape.layers), donor.rows.to(windows.device))
    skeleton = skeletons.get(shape)
    windows, starts = first_positions(skeleton, windows)
    if donor.is_final and not distill:
        return text_loss(skeleton, decoder, windows, starts)
    return distillation_loss(skeleton, decoder, windows, donor_logits(donor, skeletons, windows, starts), starts)
