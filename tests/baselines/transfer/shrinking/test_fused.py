"""Pruning of fused projections and experts, against splits that are written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from baselines.transfer.shrinking.base import Shrinking
from baselines.transfer.shrinking.pruning import Pruning
from baselines.transfer.shrinking.subcloning import Subcloning
from tests.baselines.transfer.growth.test_fused import random_donor
from tests.support.architectures import EXPERTS, FUSED
from zoo.donors.memory import zoo_of
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata

METHODS = [Pruning(correct=False), Subcloning(rescale="none")]
NARROWER: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 16, "n_head": 2},
    "falcon": {"hidden_size": 16, "num_attention_heads": 2},
    "falcon-mha": {"hidden_size": 16, "num_attention_heads": 2},
    "falcon-40b": {"hidden_size": 16, "num_attention_heads": 2, "num_kv_heads": 1},
    "mpt": {"d_model": 16, "n_heads": 2},
    "gpt_bigcode": {"n_embd": 16, "n_head": 2, "n_inner": 24},
    "codegen": {"n_embd": 32, "n_head": 4, "n_inner": 24},
}
DONORS = {**FUSED, "codegen": {**FUSED["codegen"], "n_embd": 64, "n_head": 8}}  # it needs a multiple of four heads


def split(name: str, fused: Tensor, meta: Metadata) -> tuple[Tensor, Tensor, Tensor]:
    """q [K, G, h, d], k [K, h, d] and v [K, h, d] of a fused weight."""
    groups, queries, size = meta.kv_heads, meta.heads // meta.kv_heads, meta.head_dim
    if name == "mpt":
        q, k, v = fused.chunk(3)
        return q.view(groups, queries, size, -1), k.view(groups, size, -1), v.view(groups, size, -1)
    if name == "codegen":
        q, v, k = fused.view(4, 3, groups // 4, size, -1).unbind(1)
        return q.reshape(groups, 1, size, -1), k.reshape(groups, size, -1), v.reshape(groups, size, -1)
    heads = fused.view(groups, queries + 2, size, -1)
    return heads[:, :-2], heads[:, -2], heads[:, -1]


def fit(sampler: Shrinking, config: dict[str, Any], change: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    donor, blueprint = random_donor(config), Blueprint.from_config({**config, **change})
    tensors = dict(sampler.fit(zoo_of({"donor": donor}), blueprint).sample(blueprint, 0))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {s.name: s.shape for s in blueprint.specs}
    return donor, tensors


@pytest.mark.parametrize("sampler", METHODS, ids=lambda sampler: sampler.name)
@pytest.mark.parametrize("name", NARROWER)
def test_whole_heads_are_kept(name: str, sampler: Shrinking) -> None:
    donor, tensors = fit(sampler, DONORS[name], NARROWER[name])
    before, after = Blueprint.from_module(donor), Blueprint.from_config({**DONORS[name], **NARROWER[name]})
    assert before.metadata is not None and after.metadata is not None
    kept = sampler.kept_parts
    for layer in range(2):
        spec = before.find("attn.q", layer=layer)[0][0]
        q, k, v = split(name, donor.state_dict()[spec.name], before.metadata)
        small_q, small_k, small_v = split(name, tensors[spec.name], after.metadata)
        groups, residual = kept.groups[layer], kept.residual
        assert len(set(groups.tolist())) == after.metadata.kv_heads and len(set(residual.tolist())) == len(residual)
        assert torch.equal(small_k, k[groups][..., residual]) and torch.equal(small_v, v[groups][..., residual])
        chosen = torch.stack([q[g][queries] for g, queries in zip(groups, kept.queries[layer], strict=True)])
        assert torch.equal(small_q, chosen[..., residual])


@pytest.mark.parametrize("sampler", METHODS, ids=lambda sampler: sampler.name)
def test_gate_and_up_keep_the_same_neurons(sampler: Shrinking) -> None:
    donor, tensors = fit(sampler, FUSED["glm4"], {"intermediate_size": 24})
    name = "model.layers.1.mlp.gate_up_proj.weight"
    gate, up = donor.state_dict()[name].chunk(2)
    neurons = sampler.kept_parts.ffn[1]
    assert torch.equal(tensors[name], torch.cat([gate[neurons], up[neurons]]))


@pytest.mark.parametrize("sampler", METHODS, ids=lambda sampler: sampler.name)
def test_a_router_keeps_the_rows_of_its_experts(sampler: Shrinking) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 2}
    change = {**sizes, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12}
    donor, tensors = fit(sampler, EXPERTS["qwen2_moe"], change)
    state, kept = donor.state_dict(), sampler.kept_parts
    mlp = "model.layers.1.mlp."
    assert torch.equal(tensors[f"{mlp}gate.weight"], state[f"{mlp}gate.weight"][::2][:, kept.residual])
    gate, up = state[f"{mlp}experts.gate_up_proj"][2].chunk(2)
    neurons = kept.expert_ffn[1]
    assert torch.equal(tensors[f"{mlp}experts.1.up_proj.weight"], up[neurons][:, kept.residual])
    assert torch.equal(tensors[f"{mlp}experts.1.gate_proj.weight"], gate[neurons][:, kept.residual])
    shared = kept.shared_ffn[1]
    assert len(set(shared.tolist())) == 12
    down = state[f"{mlp}shared_expert.down_proj.weight"]
    assert torch.equal(tensors[f"{mlp}shared_expert.down_proj.weight"], down[kept.residual][:, shared])
    gate_of_shared = state[f"{mlp}shared_expert_gate.weight"][:, kept.residual]
    assert torch.equal(tensors[f"{mlp}shared_expert_gate.weight"], gate_of_shared)


def test_neurons_beside_the_experts_that_do_nothing_go_first() -> None:
    donor = random_donor(EXPERTS["qwen2_moe"])
    with torch.no_grad():
        for layer in donor.model.layers:
            layer.mlp.shared_expert.down_proj.weight[:, ::2] = 0
    blueprint = Blueprint.from_config({**EXPERTS["qwen2_moe"], "shared_expert_intermediate_size": 12})
    sampler = Pruning().fit(zoo_of({"donor": donor}), blueprint)
    assert sampler.kept_parts.shared_ffn.tolist() == [list(range(1, 24, 2))] * 2


def test_what_is_kept_beside_experts_is_saved() -> None:
    blueprint = Blueprint.from_config({**EXPERTS["qwen2_moe"], "shared_expert_intermediate_size": 12})
    sampler = Pruning().fit(zoo_of({"donor": random_donor(EXPERTS["qwen2_moe"])}), blueprint)
    tensors = sampler.kept_parts.tensors()
    assert set(tensors) == {"layers", "residual", "groups", "queries", "ffn", "expert_ffn", "shared_ffn"}
    dense = Blueprint.from_config({**FUSED["bloom"], "hidden_size": 16, "n_head": 2})
    pruned = Pruning().fit(zoo_of({"donor": random_donor(FUSED["bloom"])}), dense)
    assert "shared_ffn" not in pruned.kept_parts.tensors()  # as older versions saved it


def test_layers_with_and_without_experts_have_no_common_importance() -> None:
    config = {**EXPERTS["qwen2_moe"], "mlp_only_layers": [0]}
    blueprint = Blueprint.from_config({**config, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1})
    with pytest.raises(UserError, match="layers of several kinds, which no importance compares"):
        Pruning().fit(zoo_of({"donor": random_donor(config)}), blueprint)
