"""The behaviour of generated weights: the loss of the language model that they make, differentiable in the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from autoencoder.field import Latents, WeightField, all_blocks
from zoo.targets.blueprint import Blueprint
from zoo.targets.configs import names_in_memory, parse_config
from zoo.targets.resizing import resized_config
from zoo.tensors import Metadata
from zoo.units.decoder import Decoder, write_decoder
from zoo.units.tables import tables_to_decoder, tables_to_layer, to_checkpoint


@dataclass(frozen=True)
class Skeleton:
    """A language model of transformers without weights, and the names of its tensors."""

    module: nn.Module
    blueprint: Blueprint
    names: Mapping[str, str]  # name on disk -> name in memory

    def in_memory(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by their names in memory instead of those on disk, tied ones included."""
        ties = {tied: tensors[stored] for tied, stored in self.blueprint.ties.items() if stored in tensors}
        return {self.names.get(name, name): tensor for name, tensor in {**tensors, **ties}.items()}

    @property
    def shape(self) -> Metadata:
        assert self.blueprint.metadata is not None
        return self.blueprint.metadata


def make_skeleton(config: Mapping[str, Any], shape: Metadata) -> Skeleton:
    """The model of a config at another shape; its parameters take no memory."""
    from transformers import AutoModelForCausalLM

    data = resized_config(config, shape)
    attention = "eager" if data.get("attn_logit_softcapping") or shape.architecture == "gemma2" else "sdpa"
    with init_empty_weights(include_buffers=False):
        module = AutoModelForCausalLM.from_config(parse_config(data), attn_implementation=attention)
    return Skeleton(module.eval(), Blueprint.from_config(data), names_in_memory(module))


def field_decoder(field: WeightField, shape: Metadata, latents: Latents, rows: Tensor | None = None) -> Decoder:
    """The canonical decoder that a field writes, differentiable. rows: the field's row of each token."""
    blocks = all_blocks(field, shape, latents)
    layers = tuple(tables_to_layer({t: x[i] for t, x in blocks.items()}, shape) for i in range(shape.layers))
    return tables_to_decoder(field.tokens(shape, latents, rows), layers, shape, field.positions(shape, latents))


def first_positions(skeleton: Skeleton, windows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Windows int64 [B, T+1] that learned positions have room for, and the position [B] at which each starts; None for
    a model without learned positions.

    Half of the windows start at 0, the others anywhere, so that all positions are trained. The tokens of a window
    decide, so that nothing depends on how windows are shared between processes."""
    if not skeleton.shape.positions:
        return windows, None
    limit = int(skeleton.module.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
    windows = windows[:, : limit + 1]
    room = limit - (windows.shape[1] - 1)
    starts = windows.sum(1) % (2 * room + 1)
    return windows, torch.where(starts > room, 0, starts)


def logits(skeleton: Skeleton, decoder: Decoder, tokens: Tensor, starts: Tensor | None = None) -> Tensor:
    """The logits [B, T, V] of the model that a decoder makes, for tokens int64 [B, T]. starts: the position [B] of the
    first token of each window; None: 0."""
    tied = skeleton.shape.tied
    written = skeleton.in_memory(dict(write_decoder(to_checkpoint(decoder, tied), skeleton.blueprint)))
    inputs = {"input_ids": tokens, "use_cache": False}
    if starts is not None:
        inputs["position_ids"] = starts[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    return functional_call(skeleton.module, written, (), inputs).logits


def text_loss(skeleton: Skeleton, decoder: Decoder, windows: Tensor, starts: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats of the tokens 1 to T of windows int64 [B, T+1]. starts: as for `logits`."""
    found = logits(skeleton, decoder, windows[:, :-1], starts)
    return F.cross_entropy(found.flatten(0, 1).float(), windows[:, 1:].flatten())


def distillation_loss(
    skeleton: Skeleton, decoder: Decoder, windows: Tensor, teacher: Tensor, starts: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy in nats against the teacher's probabilities. teacher: its logits, [B, T, V]. starts: as for
    `logits`."""
    found = logits(skeleton, decoder, windows[:, :-1], starts)
    return F.cross_entropy(found.flatten(0, 1).float(), teacher.flatten(0, 1).float().softmax(-1))
