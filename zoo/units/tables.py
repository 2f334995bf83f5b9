"""Tables: the residual vectors of a canonical decoder, by what they belong to. A block becomes tables, and back.

| table | shape | residual vectors of an entry |
|---|---|---|
| neuron | [F, 3, d] | gate, up, down |
| query | [K, G, h, 2, d] | q, o of one component of a query head |
| key | [K, h, 2, d] | k, v of one component of a KV head |
| token | [V, 2, d] | embed, head |

Unlike units (`units.py`), keys and values of a group appear once. Readers are width-free: multiplied by sqrt(d), as in
units. Letters: d width, F neurons, K KV heads, G query heads per KV head, h head dimension, V tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from zoo.tensors import Metadata
from zoo.units.decoder import Decoder, Layer

TABLE_ROLES: dict[str, tuple[str, ...]] = {
    "neuron": ("gate", "up", "down"),
    "query": ("q", "o"),
    "key": ("k", "v"),
    "token": ("embed", "head"),
}
BLOCK_TABLES = ("neuron", "query", "key")


def layer_to_tables(layer: Layer, metadata: Metadata) -> dict[str, Tensor]:
    """The tables of one canonical block, in its dtype."""
    root = metadata.width**0.5
    assert layer.gate is not None
    groups = metadata.kv_heads
    return {
        "neuron": torch.stack([layer.gate * root, layer.up * root, layer.down], dim=1),
        "query": torch.stack([layer.q * root, layer.o], dim=2).unflatten(0, (groups, -1)),
        "key": torch.stack([layer.k * root, layer.v * root], dim=2),
    }


def token_table(decoder: Decoder) -> Tensor:
    """The vocabulary of a canonical decoder, [V, 2, d]."""
    return torch.stack([decoder.embed, decoder.head * decoder.metadata.width**0.5], dim=1)


def tables_to_layer(tables: Mapping[str, Tensor]) -> Layer:
    """The inverse of `layer_to_tables`, with unit gains."""
    width = tables["neuron"].shape[-1]
    root = width**-0.5
    query, key, neuron = tables["query"].flatten(0, 1), tables["key"], tables["neuron"]
    ones = torch.ones(width, dtype=key.dtype, device=key.device)
    return Layer(
        q=query[:, :, 0] * root,
        k=key[:, :, 0] * root,
        v=key[:, :, 1] * root,
        o=query[:, :, 1],
        gate=neuron[:, 0] * root,
        up=neuron[:, 1] * root,
        down=neuron[:, 2],
        gain={"attn": ones, "mlp": ones},
    )


def tables_to_decoder(tokens: Tensor, layers: Sequence[Layer], metadata: Metadata) -> Decoder:
    """A canonical decoder with unit gains and an untied head, of a token table [V, 2, d] and layers."""
    width = tokens.shape[-1]
    return Decoder(
        metadata=replace(metadata, tied=False),
        embed=tokens[:, 0],
        head=tokens[:, 1] * width**-0.5,
        layers=layers,
        gain={"final": torch.ones(width, dtype=tokens.dtype, device=tokens.device)},
    )
