"""Losses on a text, of models built from tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.head_start.tasks import SEQUENCE, WINDOWS
from benchmarks.peers.weights import stored_tensors
from zoo.donors.donor import Donor
from zoo.targets.blueprint import Blueprint
from zoo.training.corpora import encode_corpus
from zoo.training.loop import evaluate


def build_model(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """A transformers model with this config and these tensors, float32, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    parsed = AutoConfig.for_model(**config)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32)
    missing, unknown = model.load_state_dict(dict(tensors), strict=False)
    lost = set(missing) - set(model.all_tied_weights_keys)
    if lost or unknown:
        raise ValueError(f"tensors and config disagree: {sorted(lost)[:3]} missing, {list(unknown)[:3]} unknown")
    model.tie_weights()
    return model.eval()


def held_out_loss(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], tokens: Tensor, windows: int = WINDOWS
) -> float:
    """Nats per token on tokens, int64 [N], in windows of 64."""
    return evaluate(build_model(config, tensors), tokens, SEQUENCE, limit=windows)


def finite_loss(config: Mapping[str, Any], tensors: Mapping[str, Tensor], tokens: Tensor) -> float | None:
    """`held_out_loss`, or None if it is not finite."""
    loss = held_out_loss(config, tensors, tokens)
    return loss if math.isfinite(loss) else None


def donor_loss(donor: Donor, tokens: Tensor) -> float | None:
    """The loss of a donor without further training, or None if it is not finite."""
    return finite_loss(donor.config, stored_tensors(donor), tokens)


def loss_on_file(blueprint: Blueprint, tensors: Mapping[str, Tensor], text: str | Path) -> float:
    """Nats per token on a file that is read as bytes."""
    assert blueprint.config is not None and blueprint.metadata is not None
    return held_out_loss(blueprint.config, tensors, encode_corpus(text, None, blueprint.metadata.vocab))
