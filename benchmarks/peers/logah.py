"""A low-rank hypernetwork after LoGAH (2405.16287), rebuilt small: it reads no donor.

A network reads the role, the depth and the shape, and writes each table of a block as a product of two matrices of low
rank, which are cut to the shape. It is trained through the loss of the models that it writes, on random shapes. The
paper reads the whole graph of a model by a Graphormer; depth and shape say all of a Llama's graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoencoder.behaviour import field_decoder, text_loss
from autoencoder.donors import field_sizes, read_training_donors
from autoencoder.field import FieldSizes, Latents, WeightField, all_blocks
from autoencoder.objective import Skeletons
from autoencoder.shapes import random_shape, shape_range
from zoo.donors.zoo import Zoo
from zoo.streams import stream
from zoo.tensors import Metadata
from zoo.training.loop import sample_windows
from zoo.training.shared_steps import new_optimizer, warm_cosine
from zoo.units.tables import TABLE_ROLES

NARROW = 32  # numbers that the factors are linear in
BATCH, SEQUENCE = 16, 64
SHAPES = 128
GRADIENT = 1.0  # largest norm
START = 0.8  # RMS of a reader's entries times sqrt(width), as the embedded donors started
WRITERS = ("down", "o", "embed")  # into the residual stream; tables keep them as they are on disk


@dataclass(frozen=True)
class LogahTrainConfig:
    """lr was the best of 3e-4, 1e-3 and 3e-3 after 500 steps."""

    steps: int = 4000
    lr: float = 1e-3
    seed: int = 0


class LowRankField(WeightField):
    """Writes tables as products of two generated factors; its latents do nothing."""

    def __init__(self, sizes: FieldSizes, rank: int) -> None:
        super().__init__(sizes)
        self.rank = rank
        self.bases, self.maps, self.mixers = nn.ParameterDict(), nn.ParameterDict(), nn.ModuleDict()
        self.narrow, self.left, self.right = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for table, roles in TABLE_ROLES.items():
            self.narrow[table] = nn.Linear(sizes.hidden, NARROW)
            self.left[table] = nn.Linear(NARROW, sizes.slots(table) * rank)
            self.right[table] = nn.Linear(NARROW, rank * len(roles) * sizes.width)

    def _entries(self, table: str, condition: Tensor, slots: Tensor, shape: Metadata) -> dict[str, Tensor]:
        narrow = self.narrow[table](condition)
        left = self.left[table](narrow).unflatten(1, (-1, self.rank))[:, slots]
        roles = len(TABLE_ROLES[table])
        right = self.right[table](narrow).unflatten(1, (self.rank, roles, -1))[..., : shape.width]
        return {table: torch.einsum("lnr,lrpw->lnpw", left, right) * self.get_buffer(f"scale_{table}")[:, None]}

    @torch.no_grad()
    def set_scales(self, shape: Metadata) -> None:
        """Scales each role so that what an untrained network writes for a shape has the RMS of a usual start."""
        latents = no_latents(self.sizes, shape.layers)
        found = {**all_blocks(self, shape, latents), "token": self.tokens(shape, latents)}
        for table, roles in TABLE_ROLES.items():
            rms = found[table].square().flatten(0, -3).mean((0, 2)).sqrt()
            writes = torch.tensor([role in WRITERS for role in roles])
            usual = torch.where(writes, START / shape.width**0.5, START)
            self.get_buffer(f"scale_{table}").copy_(usual / rms)


def rank_within(sizes: FieldSizes, numbers: int) -> int:
    """The largest rank whose hypernetwork stores at most so many numbers."""
    rank = 1
    while parameters(LowRankField(sizes, rank + 1)) <= numbers:
        rank += 1
    return rank


def parameters(field: nn.Module) -> int:
    return sum(p.numel() for p in field.parameters())


def no_latents(sizes: FieldSizes, layers: int) -> Latents:
    return Latents(torch.zeros(sizes.model_latent), torch.zeros(layers, sizes.block_latent))


def train(zoo: Zoo, text: Tensor, numbers: int, config: LogahTrainConfig) -> LowRankField:
    """A hypernetwork of at most so many numbers, trained on a text int64 [N]. The zoo gives the range of shapes."""
    donors, strings = read_training_donors(zoo, True)
    sizes = field_sizes(donors, len(strings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        field = LowRankField(sizes, rank_within(sizes, numbers))
    field.set_scales(donors[0].shape)
    bounds = shape_range([d.shape for d in donors], sizes)
    shapes = [random_shape(donors[0].shape, bounds, config.seed, f"shape {i}") for i in range(SHAPES)]
    skeletons = Skeletons(donors)
    optimizer = new_optimizer(field.parameters(), config.lr)
    for step in _steps(config):
        number = int(torch.randint(SHAPES, (1,), generator=stream(config.seed, f"shape of step {step}")))
        shape = shapes[number]
        decoder = field_decoder(field, shape, no_latents(sizes, shape.layers), donors[0].rows)
        windows = sample_windows(text, BATCH, SEQUENCE, config.seed, step)
        loss = text_loss(skeletons.get(shape), decoder, windows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(field.parameters(), GRADIENT)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * warm_cosine(step, config.steps, 20, 0.05)
        optimizer.step()
    return field


def _steps(config: LogahTrainConfig) -> Iterator[int]:
    from tqdm import tqdm

    yield from tqdm(range(config.steps), desc="logah", unit="step")
