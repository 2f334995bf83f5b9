"""Which coordinates of a head a rotary embedding turns in pairs, found by turning them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.architectures.checks import TOLERANCE, Outcome
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Rotary, TensorSpec, join_parts, split_parts

ROLES = ("attn.q", "attn.k")


def rotary_pairs(model: nn.Module) -> Outcome:
    """Whether the rotary pairs of a model are those that its metadata states.

    A rotation of queries and keys in the plane of each pair commutes with the embedding, so that it keeps the logits;
    in other planes it changes them. Fails where the stated planes change the logits and the other ones keep them.
    """
    metadata = Blueprint.from_module(model).metadata
    if metadata is None or metadata.rope_theta is None:
        return Outcome(True, "none")
    changes = [
        largest_change(model, replace(metadata.rotary, neighbours=other))
        for other in (metadata.rotary.neighbours, not metadata.rotary.neighbours)
    ]
    stated, other = (change is not None and change < TOLERANCE for change in changes)
    if stated:
        return Outcome(True, "neighbours" if metadata.rotary.neighbours else "halves")
    if other:
        return Outcome(
            False, f"{'halves' if metadata.rotary.neighbours else 'neighbours'} and not as its metadata says"
        )
    return Outcome(True, "not seen")


def largest_change(model: nn.Module, rotary: Rotary) -> float | None:
    """How far the logits move, over their standard deviation, when queries and keys are turned in the planes of the
    pairs; None where the model has no tensor with queries and keys alone, or needs more inputs than tokens."""
    blueprint, state = Blueprint.from_module(model), model.state_dict()
    specs = [spec for spec in blueprint.specs if {part.role for part in spec.parts} & set(ROLES)]
    if not specs or rotary.size % 2 or any(spec.name not in state for spec in specs):
        return None
    kept = {spec.name: state[spec.name].clone() for spec in specs}
    generator = torch.Generator().manual_seed(0)
    for spec in specs:  # attention far from uniform, without biases
        values = torch.randn(spec.shape, generator=generator) if spec.kind == "weight" else torch.zeros(spec.shape)
        state[spec.name].copy_(values)
    metadata = blueprint.metadata
    assert metadata is not None
    angles = 3.0 * torch.rand(rotary.size // 2, generator=generator)
    try:
        before = _logits(model)
        for spec in specs:
            if spec.kind == "weight":
                state[spec.name].copy_(_turned(spec, state[spec.name], metadata.head_dim, rotary, angles))
        after = _logits(model)
    except (ValueError, TypeError, RuntimeError, IndexError):
        return None
    finally:
        for name, values in kept.items():
            state[name].copy_(values)
    return float((after - before).abs().max() / before.std())


def _turned(spec: TensorSpec, values: Tensor, head_dim: int, rotary: Rotary, angles: Tensor) -> Tensor:
    parts = split_parts(spec, values)
    for role in ROLES:
        if role in parts:
            heads = parts[role].unflatten(0, (-1, head_dim)).clone()  # [heads, h, d]
            first, second = rotary.planes()
            a, b, cos, sin = heads[:, first], heads[:, second], angles.cos()[:, None], angles.sin()[:, None]
            heads[:, first], heads[:, second] = cos * a - sin * b, sin * a + cos * b
            parts[role] = heads.flatten(0, 1)
    return join_parts(spec, parts)


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(input_ids=torch.arange(1, 25).view(2, 12)).logits
    return out.double()
