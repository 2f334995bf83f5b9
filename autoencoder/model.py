"""The weight autoencoder: a donor of any shape becomes a few latents, and latents become a model of any shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from autoencoder.encoder import WeightEncoder
from autoencoder.field import FieldSizes, Latents, WeightField
from autoencoder.growing import capped_shape, grow_positions, grow_tables, grow_tokens
from zoo.tensors import Metadata
from zoo.units.decoder import Decoder
from zoo.units.family import PLAIN, Family, coordinates, family_of
from zoo.units.lazy import LazySequence
from zoo.units.tables import BLOCK_TABLES, numbers_of, tables_to_decoder, tables_to_layer

LEAST_DEVIATION = 0.01  # of a number of the latents over donors; smaller ones are noise


class WeightAutoencoder(ModelMixin, ConfigMixin):
    """An encoder of tables to latents, and a field that writes tables of any shape.

    sizes: those of `FieldSizes`. tokens: the token string of each of the field's rows. hidden: of the encoder.
    architecture: of the donors, for the card. donors: their provenance. families: of the donors; None for a Llama's."""

    CONFIG_KINDS: ClassVar = {
        "sizes": {str: int},
        "tokens": [str],
        "architecture": str,
        "hidden": int,
        "donors": (None, [dict]),
        "families": (None, [dict]),
    }

    @register_to_config
    def __init__(
        self,
        sizes: dict[str, int],
        tokens: list[str],
        architecture: str,
        hidden: int = 96,
        donors: list[dict[str, Any]] | None = None,
        families: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        known = (PLAIN,) if families is None else tuple(Family.from_json(family) for family in families)
        self.sizes = FieldSizes(**sizes, families=known)  # type: ignore[arg-type]
        if len(tokens) != self.sizes.tokens:
            raise ValueError(f"{len(tokens)} token strings for {self.sizes.tokens} rows of the field")
        self.encoder = WeightEncoder(self.sizes, hidden)
        self.field = WeightField(self.sizes)

    @property
    def token_strings(self) -> tuple[str, ...]:
        return tuple(self.config["tokens"])

    def encode(
        self,
        blocks: Mapping[str, Tensor],
        tokens: Tensor,
        family: Family = PLAIN,
        positions: Tensor | None = None,
    ) -> Latents:
        """The latents of a model. blocks: its tables, each with a first axis of L; tokens: [V, 2, d]; family: the
        model's; positions: [P, 1, c], if the family has learned ones."""
        return self.encoder(blocks, tokens, family, positions)

    @torch.no_grad()
    def token_pairs(self, shape: Metadata, latents: Latents) -> Tensor:
        """The vocabulary pairs of all of the field's tokens at a shape, [tokens, 2, d] on the CPU."""
        inner = capped_shape(shape, self.sizes)
        return grow_tokens(self.field.tokens(inner, latents), shape).cpu()

    @torch.no_grad()
    def decode(self, shape: Metadata, latents: Latents, pairs: Tensor) -> Decoder:
        """The canonical decoder of a shape, on the CPU; a block is written when it is read, and does not stay.

        pairs [V, 2, d]: the vocabulary of the target, see `token_pairs`. A shape beyond the field's is grown from the
        largest one within it: copies share their output, further coordinates hold weak noise."""
        inner = capped_shape(shape, self.sizes)
        spread = latents.at_depth(shape.layers)

        def layer(index: int) -> Any:
            with torch.no_grad():
                block = self.field.blocks(inner, spread, torch.tensor([index]))
            tables = {name: table[0].cpu() for name, table in block.items()}
            return tables_to_layer(grow_tables(tables, shape, index), shape)

        outline = (_outline(shape),) * shape.layers
        positions = self.field.positions(inner, latents)
        positions = None if positions is None else grow_positions(positions.cpu(), shape)
        return tables_to_decoder(pairs, LazySequence(layer, shape.layers, outline), shape, positions)


def _outline(shape: Metadata) -> Any:
    groups, share, h, family = shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim, family_of(shape)
    slots = {"neuron": (shape.ffn,), "query": (groups, share, h), "key": (groups, h), "block": (1,)}
    sizes: dict[str, tuple[int, ...]] = {}
    for table in (*BLOCK_TABLES, "block"):
        if roles := len(family.vector_roles(table)):
            sizes[table] = (*slots[table], roles, coordinates(shape))
        if numbers := len(family.number_roles(table)):
            sizes[numbers_of(table)] = (*slots[table], numbers)
    return tables_to_layer({t: torch.empty(size, device="meta") for t, size in sizes.items()}, shape)


def new_autoencoder(
    sizes: FieldSizes, tokens: tuple[str, ...], architecture: str, donors: list[dict[str, Any]], seed: int
) -> WeightAutoencoder:
    """An untrained autoencoder; its random numbers depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        families = None if sizes.families == (PLAIN,) else [asdict(family) for family in sizes.families]
        return WeightAutoencoder(sizes.to_json(), list(tokens), architecture, donors=donors, families=families)


@torch.no_grad()
def normalise_latents(model: WeightAutoencoder, found: Sequence[Latents]) -> None:
    """Gives each number of the latents mean 0 and deviation 1 over the donors, whose latents so far are `found`. What
    the field writes for a donor stays the same."""
    parts = {
        "model": torch.stack([z.model for z in found]),
        "block": torch.cat([z.blocks for z in found]),
    }
    first = model.field.condition[0]
    assert isinstance(first, torch.nn.Linear)
    end = first.in_features
    for name, size in (("block", model.sizes.block_latent), ("model", model.sizes.model_latent)):
        mean, deviation = parts[name].mean(0), parts[name].std(0, correction=0).clamp_min(LEAST_DEVIATION)
        old_mean, old_deviation = model.encoder.get_buffer(f"{name}_norm")
        norm = torch.stack([old_mean + old_deviation * mean, old_deviation * deviation])
        model.encoder.get_buffer(f"{name}_norm").copy_(norm)
        weight = first.weight[:, end - size : end]
        first.get_parameter("bias").add_(weight @ mean)
        weight *= deviation
        end -= size
