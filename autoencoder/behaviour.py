"""The behaviour of generated weights: the loss of the language model that they make, differentiable in the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from autoencoder.field import Latents, WeightField, all_blocks
from zoo.targets.blueprint import Blueprint
from zoo.targets.configs import parse_config
from zoo.targets.resizing import resized_config
from zoo.tensors import Metadata
from zoo.units.decoder import Decoder, write_decoder
from zoo.units.gains import tie_head
from zoo.units.tables import BLOCK_TABLES, tables_to_decoder, tables_to_layer


@dataclass(frozen=True)
class Skeleton:
    """A language model of transformers without weights, and the names of its tensors."""

    module: nn.Module
    blueprint: Blueprint

    @property
    def shape(self) -> Metadata:
        assert self.blueprint.metadata is not None
        return self.blueprint.metadata


def make_skeleton(config: Mapping[str, Any], shape: Metadata) -> Skeleton:
    """The model of a config at another shape; its parameters take no memory."""
    from transformers import AutoModelForCausalLM

    data = resized_config(config, shape)
    with init_empty_weights(include_buffers=False):
        module = AutoModelForCausalLM.from_config(parse_config(data), attn_implementation="sdpa")
    return Skeleton(module, Blueprint.from_config(data))


def field_decoder(field: WeightField, shape: Metadata, latents: Latents, rows: Tensor | None = None) -> Decoder:
    """The canonical decoder that a field writes, differentiable. rows: the field's row of each token."""
    blocks = all_blocks(field, shape, latents)
    layers = tuple(tables_to_layer({t: blocks[t][i] for t in BLOCK_TABLES}) for i in range(shape.layers))
    return tables_to_decoder(field.tokens(shape, latents, rows), layers, shape)


def logits(skeleton: Skeleton, decoder: Decoder, tokens: Tensor) -> Tensor:
    """The logits [B, T, V] of the model that a decoder makes, for tokens int64 [B, T]."""
    tied = skeleton.shape.tied
    written = dict(write_decoder(tie_head(decoder) if tied else decoder, skeleton.blueprint))
    if tied:
        written |= {name: written[shared] for name, shared in skeleton.blueprint.ties.items()}
    return functional_call(skeleton.module, written, (), {"input_ids": tokens, "use_cache": False}).logits


def text_loss(skeleton: Skeleton, decoder: Decoder, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the tokens 1 to T of windows int64 [B, T+1]."""
    found = logits(skeleton, decoder, windows[:, :-1])
    return F.cross_entropy(found.flatten(0, 1).float(), windows[:, 1:].flatten())


def distillation_loss(skeleton: Skeleton, decoder: Decoder, windows: Tensor, teacher: Tensor) -> Tensor:
    """Mean cross-entropy in nats against the teacher's probabilities. teacher: its logits, [B, T, V]."""
    found = logits(skeleton, decoder, windows[:, :-1])
    return F.cross_entropy(found.flatten(0, 1).float(), teacher.flatten(0, 1).float().softmax(-1))
