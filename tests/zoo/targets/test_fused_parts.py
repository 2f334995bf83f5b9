"""What the parts of a fused attention tensor are, found by setting parts to zero and running the model."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from tests.support.architectures import FUSED
from tests.zoo.targets.test_roles import randomised
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata, join_parts, split_parts

ATTENTION = [name for name in FUSED if not name.startswith("glm")]  # these fuse gate and up alone
IDS = torch.tensor([[5, 9, 33, 21]])


@pytest.fixture(params=ATTENTION)
def model(request: pytest.FixtureRequest) -> nn.Module:
    config = dict(FUSED[request.param])
    if config["model_type"] == "persimmon":
        config["qk_layernorm"] = False  # a norm would put its bias where the query is zero
    model = randomised(config)
    meta = Blueprint.from_module(model).metadata
    assert meta is not None
    for role, heads in (("attn.q", meta.heads), ("attn.k", meta.kv_heads)):
        scale_rows(model, role, range(heads * meta.head_dim), 0.2)  # large scores would hide what changes
    return model


def rows_of(heads: Iterable[int], size: int) -> list[int]:
    return [head * size + i for head in heads for i in range(size)]


def scale_rows(model: nn.Module, role: str, rows: Iterable[int], factor: float) -> None:
    """Multiplies rows of a part of the fused tensor (and its bias) by a factor."""
    blueprint, state = Blueprint.from_module(model), dict(model.state_dict())
    for kind in ("weight", "bias"):
        for spec, _ in blueprint.find(role, layer=0, kind=kind):
            parts = {r: m.clone() for r, m in split_parts(spec, state[spec.name]).items()}
            parts[role][list(rows)] *= factor
            state[spec.name].copy_(join_parts(spec, parts))


def head_outputs(model: nn.Module, meta: Metadata) -> Tensor:
    """[tokens, heads, head_dim]: what the attention of the first layer hands to its output projection."""
    ((spec, _),) = Blueprint.from_module(model).find("attn.o", layer=0)
    seen: list[Tensor] = []
    handle = model.get_submodule(spec.name.removesuffix(".weight")).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach())
    )
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    handle.remove()
    return seen[0][0].unflatten(-1, (meta.heads, meta.head_dim))


def changed_heads(before: Tensor, after: Tensor) -> list[int]:
    return [head for head in range(before.shape[1]) if not torch.allclose(before[:, head], after[:, head], atol=1e-6)]


def test_values_of_a_group_reach_its_query_heads_alone(model: nn.Module) -> None:
    meta = Blueprint.from_module(model).metadata
    assert meta is not None
    per_group = meta.heads // meta.kv_heads
    last = meta.kv_heads - 1
    scale_rows(model, "attn.v", rows_of(range(last), meta.head_dim), 0.0)
    found = head_outputs(model, meta).abs().sum((0, 2)) > 0
    assert found.nonzero().flatten().tolist() == list(range(last * per_group, meta.heads))
    scale_rows(model, "attn.v", rows_of([last], meta.head_dim), 0.0)
    assert not head_outputs(model, meta).any()


def test_a_query_changes_its_own_head_and_a_key_those_of_its_group(model: nn.Module) -> None:
    meta = Blueprint.from_module(model).metadata
    assert meta is not None
    per_group = meta.heads // meta.kv_heads
    before = head_outputs(model, meta)
    scale_rows(model, "attn.q", rows_of([1], meta.head_dim), 0.0)
    without_query = head_outputs(model, meta)
    assert changed_heads(before, without_query) == [1]
    # Without a query its head attends by positions alone, so that its key changes the other heads of the group only.
    scale_rows(model, "attn.k", rows_of([1 // per_group], meta.head_dim), 0.0)
    group = range(1 // per_group * per_group, 1 // per_group * per_group + per_group)
    assert changed_heads(without_query, head_outputs(model, meta)) == [head for head in group if head != 1]
