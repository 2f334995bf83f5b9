"""Mimetic attention: the products that it promises, against closed forms and independent decompositions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from baselines.schemes.mimetic import Mimetic
from zoo.donors.memory import load_into
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.tensors import split_parts

WIDTH = 384  # of ViT-Small
LLAMA = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 6,
}  # fmt: skip
TARGETS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-gqa": LLAMA | {"num_key_value_heads": 2},
    "qwen2-gqa": LLAMA | {"model_type": "qwen2", "num_key_value_heads": 3},
    "gpt2": {"model_type": "gpt2", "vocab_size": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 6},
    "gpt_neox": LLAMA | {"model_type": "gpt_neox"},
}
OFF = ~torch.eye(WIDTH, dtype=torch.bool)


@dataclass(frozen=True)
class Heads:
    """One layer, head by head, as x W multiplies: q, k, v [heads, width, head_dim], o [heads, head_dim, width]."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


def layers(config: dict[str, Any], seed: int = 0, **options: Any) -> list[Heads]:
    blueprint = Blueprint.from_config(config)
    metadata = blueprint.metadata
    assert metadata is not None
    found: dict[tuple[int | None, str], Tensor] = {}
    for name, tensor in Mimetic(**options).fit(None, blueprint).sample(blueprint, seed):
        spec = blueprint[name]
        assert tensor.shape == spec.shape and tensor.dtype == torch.float32
        found |= {(spec.layer, role): part for role, part in split_parts(spec, tensor).items()}
    group = metadata.heads // metadata.kv_heads
    result = []
    for layer in range(metadata.layers):
        rows = {r: found[layer, f"attn.{r}"].unflatten(0, (-1, metadata.head_dim)).mT for r in "qkv"}
        k, v = (rows[r].repeat_interleave(group, 0) for r in "kv")
        o = found[layer, "attn.o"].mT.unflatten(0, (-1, metadata.head_dim))
        result.append(Heads(rows["q"], k, v, o))
    return result


def best_approximations(rank: int, alpha: float, beta: float, count: int = 12) -> Tensor:
    """[count, WIDTH, WIDTH]: truncated SVDs of alpha Z + beta I, from another stream."""
    torch.manual_seed(123)
    products = alpha * torch.randn(count, WIDTH, WIDTH) / WIDTH**0.5 + beta * torch.eye(WIDTH)
    u, s, vh = torch.linalg.svd(products)
    return u[:, :, :rank] * s[:, None, :rank] @ vh[:, :rank]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_values_and_outputs_of_all_heads_are_the_promised_product(name: str) -> None:
    for layer in layers(TARGETS[name]):
        product = (layer.v @ layer.o).sum(0)
        std = 0.4 / WIDTH**0.5
        assert abs(product.diagonal().mean() + 0.4) < 3 * std / WIDTH**0.5
        assert abs(product[OFF].mean()) < 3 * std / WIDTH
        assert abs(product[OFF].std() / std - 1) < 3 / math.sqrt(2 * WIDTH**2)
        assert abs(product.diagonal().std() / std - 1) < 3 / math.sqrt(2 * WIDTH)  # 0.02


def test_the_published_mistake_would_show() -> None:
    """Factors that are not transposed into torch's layout give a diagonal of deviation 0.24 instead of 0.02."""
    (layer, *_) = layers(TARGETS["llama"])
    left, right = layer.v.movedim(0, 1).flatten(1), layer.o.flatten(0, 1)  # U sqrt S, sqrt S V^T
    right_way, wrong_way = left @ right, left.mT @ right.mT
    assert 0.017 < right_way.diagonal().std() < 0.024
    assert wrong_way.diagonal().std() > 0.15


@pytest.mark.parametrize("name", TARGETS)
def test_queries_and_keys_of_a_head_are_the_best_approximation(name: str) -> None:
    """Every head without sharing; the first of each group with it."""
    expected = best_approximations(64, 0.7, 0.7)
    diagonal, spread = expected.diagonal(dim1=1, dim2=2).mean(1), expected[:, OFF].std(1)
    values = torch.linalg.svdvals(expected)[:, :64].mean(0)
    kv_heads = TARGETS[name].get("num_key_value_heads", 6)
    for layer in layers(TARGETS[name]):
        for product in (layer.q @ layer.k.mT)[:: 6 // kv_heads]:
            assert abs(product.diagonal().mean() - diagonal.mean()) < 5 * diagonal.std()
            assert abs(product[OFF].std() - spread.mean()) < 5 * spread.std()
            assert abs(product[OFF].mean()) < 5 * expected[:, OFF].mean(1).std()
            got = torch.linalg.svdvals(product)
            assert got[64] < 1e-5 * got[0] and ((got[:64] - values).abs() < 0.04 * values).all()
        energy = [m.square().sum() for m in (layer.q[0], layer.k[0])]
        assert abs(energy[0] / energy[1] - 1) < 1e-3  # both take the square root of the values


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-gqa"])
def test_shared_keys_fit_the_other_heads_of_their_group(name: str) -> None:
    """M K (K^T K)^-1 K^T is M projected to 64 of 384 dimensions: diagonal 0.7 64/384, energy (0.7^2 + 0.7^2) 64."""
    kv_heads = TARGETS[name]["num_key_value_heads"]
    others = [h for h in range(6) if h % (6 // kv_heads)]
    for layer in layers(TARGETS[name]):
        assert torch.equal(layer.k[0], layer.k[1])
        products = layer.q @ layer.k.mT
        means = products.diagonal(dim1=1, dim2=2).mean(1)[others]
        assert ((means - 0.7 * 64 / WIDTH).abs() < 4 * 0.7 * math.sqrt(64) / WIDTH**1.5).all()
        energies = products.square().sum((1, 2))[others]
        assert ((energies / (2 * 0.49 * 64) - 1).abs() < 0.03).all()
        shared = 0.7 * layer.k[0] @ torch.linalg.pinv(layer.k[0])  # of the first group: the identity, as keys see it
        noise = (products[: 6 // kv_heads] - shared).flatten(1)
        assert torch.corrcoef(noise).sub(torch.eye(len(noise))).abs().max() < 0.05


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-gqa"])
def test_shared_values_are_the_best_product_of_their_rank(name: str) -> None:
    rank = 64 * TARGETS[name]["num_key_value_heads"]
    expected = best_approximations(rank, 0.4, -0.4)
    diagonal, spread = expected.diagonal(dim1=1, dim2=2).mean(1), expected[:, OFF].std(1)
    group = 6 // TARGETS[name]["num_key_value_heads"]
    for layer in layers(TARGETS[name]):
        product = (layer.v @ layer.o).sum(0)
        assert abs(product.diagonal().mean() - diagonal.mean()) < 5 * diagonal.std()
        assert abs(product[OFF].std() - spread.mean()) < 5 * spread.std()
        assert torch.linalg.matrix_rank(product) == rank
        assert torch.equal(layer.o[0], layer.o[group - 1]) and not torch.equal(layer.o[0], layer.o[group])


def test_options_set_the_products_and_the_sign_by_depth() -> None:
    config = LLAMA | {"num_hidden_layers": 3, "hidden_size": 96, "num_attention_heads": 1}
    got = layers(config, vo_beta=0.5, vo_alpha=0.1, qk_alpha=0.2, qk_beta=-0.3, vo_depth="flip")
    for layer, beta in zip(got, (0.5, 0.0, -0.5), strict=True):
        vo, qk = layer.v[0] @ layer.o[0], layer.q[0] @ layer.k[0].mT
        assert abs(vo.diagonal().mean() - beta) < 3 * 0.1 / 96 and abs(qk.diagonal().mean() + 0.3) < 3 * 0.2 / 96
        off = ~torch.eye(96, dtype=torch.bool)
        assert abs(vo[off].std() / (0.1 / 96**0.5) - 1) < 0.04 and abs(qk[off].std() / (0.2 / 96**0.5) - 1) < 0.04


def test_heads_wider_than_the_stream_hold_the_whole_product() -> None:
    config = LLAMA | {"hidden_size": 36, "head_dim": 48, "num_key_value_heads": 2}
    for layer in layers(config):
        vo, qk = (layer.v @ layer.o).sum(0), layer.q[0] @ layer.k[0].mT
        assert abs(vo.diagonal().mean() + 0.4) < 3 * 0.4 / 36 and abs(qk.diagonal().mean() - 0.7) < 3 * 0.7 / 36
        assert (layer.v.norm(dim=1) > 0.01).all() and (layer.k.norm(dim=1) > 0.01).all()


def test_bytes_depend_on_the_seed_only_and_survive_saving(tmp_path: Path) -> None:
    blueprint = Blueprint.from_config(TARGETS["qwen2-gqa"] | {"hidden_size": 48, "num_attention_heads": 6})
    sampler = Mimetic(vo_beta=0.4).fit(None, blueprint)
    sampler.save(tmp_path)
    first, again = dict(sampler.sample(blueprint, 1)), dict(Mimetic.load(tmp_path).sample(blueprint, 1))
    assert len(first) == 8 and all(torch.equal(first[n], again[n]) for n in first)
    assert all("bias" not in n for n in first)
    assert not any(torch.equal(first[n], t) for n, t in sampler.sample(blueprint, 2))
    q = "model.layers.{}.self_attn.q_proj.weight"
    assert not torch.equal(first[q.format(0)], first[q.format(1)])


class Block(nn.Module):
    """Attention as vision transformers name it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(24, 24, bias=False) for _ in range(4))


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": Block()}) for _ in range(2)])


def test_torchs_attention_and_plain_projections() -> None:
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    filled = load_into(attention, Mimetic().sample(Blueprint.from_module(attention)))
    assert filled == ["in_proj_weight", "out_proj.weight"]
    value = attention.in_proj_weight[128:]
    product = (attention.out_proj.weight @ value).detach()  # x -> W_O W_V x, the transpose of W_V W_O
    assert abs(product.diagonal().mean() + 0.4) < 3 * 0.4 / 64
    first = attention.in_proj_weight[:16].mT @ attention.in_proj_weight[64:80]
    assert torch.linalg.matrix_rank(first.detach(), rtol=1e-4) == 16 and first.diagonal().mean() > 0.15
    vision = Blueprint.from_module(Vision())
    assert len(dict(Mimetic(heads=3).fit(None, vision).sample(vision))) == 8
    with pytest.raises(UserError, match=r"the number of heads of blocks\.0\.attn is unknown; set heads=N"):
        Mimetic().planned_donors(None, vision)
    with pytest.raises(UserError, match="not attention of 5 heads"):
        Mimetic(heads=5).fit(None, vision)


def test_a_target_without_attention_is_refused() -> None:
    for module in (nn.Sequential(nn.Linear(4, 4)), nn.MultiheadAttention(8, 2, kdim=4, vdim=4)):
        with pytest.raises(UserError, match="no attention of the target"):
            Mimetic().planned_donors(None, Blueprint.from_module(module))
