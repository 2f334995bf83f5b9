"""What the denoiser learns from: the latents of the donors at many depths, each with its metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autoencoder.donors import TrainingDonor
from autoencoder.field import Latents
from autoencoder.model import WeightAutoencoder
from autoencoder.objective import encode_donor
from diffusion.conditions import Wanted, condition_values, vocabulary_features
from diffusion.config import DiffusionTrainConfig
from zoo.streams import stream
from zoo.tensors import Metadata
from zoo.training.text_features import text_features
from zoo.units.family import Family

POOL = 768  # samples that are drawn before training, because features of texts take milliseconds
LEAST_BYTES = 2_000  # of a text whose features are a condition


@dataclass(frozen=True)
class LatentData:
    """The donors of a zoo as latents. All sequences have one item per donor."""

    donors: Sequence[TrainingDonor]
    latents: Sequence[Latents]
    texts: Sequence[bytes | None]
    excess: Sequence[float]  # nats above the best donor of the same text
    vocabularies: Sequence[Tensor]  # features of the token strings
    shapes: Mapping[Family, Sequence[Metadata]]  # random ones


@dataclass(frozen=True)
class Sample:
    """One model of the training: its latents, its shape, its condition, and the donors that it is made from."""

    latents: Latents
    shape: Metadata
    condition: Tensor  # [conditions.SIZE]
    donors: tuple[int, ...]
    share: float


@torch.no_grad()
def prepare_latents(
    autoencoder: WeightAutoencoder,
    donors: Sequence[TrainingDonor],
    texts: Sequence[bytes | None],
    shapes: Mapping[Family, Sequence[Metadata]],
) -> LatentData:
    """Encodes the donors of a zoo."""
    latents = [encode_donor(autoencoder, d) for d in donors]
    best: dict[str, float] = {}
    for donor in donors:
        if donor.loss is not None:
            best[donor.corpus] = min(best.get(donor.corpus, donor.loss), donor.loss)
    excess = [0.0 if d.loss is None else d.loss - best[d.corpus] for d in donors]
    strings = autoencoder.token_strings
    kept: dict[tuple[int, ...], Tensor] = {}
    vocabularies = []
    for donor in donors:
        key = (len(donor.rows), int(donor.rows.sum()))
        if key not in kept:
            kept[key] = vocabulary_features(strings[row] for row in donor.rows.tolist())
        vocabularies.append(kept[key])
    return LatentData(donors, latents, texts, excess, vocabularies, shapes)


def draw_sample(data: LatentData, config: DiffusionTrainConfig, name: str) -> Sample:
    """A donor's latents at a shape, or the mixture of two donors' with a mixture of their texts: a function of the seed
    and `name`."""
    rng = stream(config.seed, name)

    def draw(count: int) -> int:
        return int(torch.randint(count, (1,), generator=rng))

    first, second = draw(len(data.donors)), draw(len(data.donors))
    share = float(torch.rand((), generator=rng))
    mixes = float(torch.rand((), generator=rng)) < config.mixing
    donor, other = data.donors[first], data.donors[second]
    mixes = mixes and donor.family == other.family
    mixes = mixes and donor.is_final and other.is_final and torch.equal(donor.rows, other.rows)
    own, shapes = draw(2) == 0, data.shapes[donor.family]
    shape = donor.shape if own else replace(shapes[draw(len(shapes))], vocab=donor.shape.vocab)
    latents = data.latents[first].at_depth(shape.layers)
    text, excess = _excerpt(data.texts[first], config, rng), data.excess[first]
    chosen: tuple[int, ...] = (first,)
    if mixes:
        latents = latents.mixed(data.latents[second], share)
        piece = _excerpt(data.texts[second], config, rng)
        if text is not None and piece is not None:
            size = min(len(text), len(piece))
            text = text[: round(share * size)] + piece[: round((1 - share) * size)]
        excess = share * excess + (1 - share) * data.excess[second]
        chosen = (first, second)
    wanted = Wanted(shape, None if text is None else text_features(text), data.vocabularies[first], excess)
    condition = condition_values(wanted, len(data.shapes) > 1)
    return Sample(latents, shape, condition, chosen, share if mixes else 1.0)


def _excerpt(text: bytes | None, config: DiffusionTrainConfig, rng: torch.Generator) -> bytes | None:
    """A piece of a text of random length at a random place."""
    if text is None:
        return None
    most = min(len(text), config.sample_bytes)
    least = min(LEAST_BYTES, most)
    length = least + int(torch.randint(most - least + 1, (1,), generator=rng))
    start = int(torch.randint(len(text) - length + 1, (1,), generator=rng))
    return text[start : start + length]


def draw_pool(data: LatentData, config: DiffusionTrainConfig) -> list[Sample]:
    """The samples of a training."""
    return [draw_sample(data, config, f"sample {i}") for i in range(POOL)]
