"""The model card of a generated checkpoint: what it is, what made it, and that it is not trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from headstart.generate.next_step import next_step_line
from zoo.cards.card import (
    card_data,
    donors_section,
    how_it_was_made,
    model_card,
    pipeline_tag,
    warnings_section,
)

if TYPE_CHECKING:
    from zoo.sampler import Sampler
    from zoo.targets.blueprint import Blueprint


def checkpoint_card(
    record: dict[str, Any], method: type[Sampler], blueprint: Blueprint, base_models: Sequence[str]
) -> ModelCard:
    """README.md of a checkpoint, from the content of headstart.json. `base_models` are the hub ids of its donors."""
    counts = record["tensors"]
    details = [
        f"Seed {record['seed']}. {counts['sampled']} tensors come from the method, {counts['defaulted']} from the "
        "default initialisation."
    ]
    sections = [
        _introduction(record, blueprint),
        how_it_was_made(record, method.summary, method.reference, details),
        _training_section(record),
        donors_section(record["donors"]),
        warnings_section(record["donors"]),
    ]
    return model_card(card_data(record["donors"], base_models, pipeline_tag(blueprint.config)), sections)


def _training_section(record: dict[str, Any]) -> str:
    if record.get("next_step") is None:
        return ""
    line = next_step_line(record["next_step"])
    return f"""## Training

{line[0].upper()}{line[1:]}. `examples/pretrain.py` of headstart trains on with transformers' `Trainer`.
"""


def _introduction(record: dict[str, Any], blueprint: Blueprint) -> str:
    meta = blueprint.metadata
    shape = ""
    if meta is not None:
        shape = (
            f" It is a {meta.architecture} of {meta.layers} layers and width {meta.width}, with {meta.heads} query and"
            f" {meta.kv_heads} key-value heads of {meta.head_dim}, FFN width {meta.ffn} and a vocabulary of"
            f" {meta.vocab}."
        )
    return f"""# Initial weights by {record["method"]}

These are weights to start training from, **not a trained model**.{shape} It has {record["parameters"]:,} parameters.
"""
