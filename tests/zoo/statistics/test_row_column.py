"""Row-column statistics: present in real checkpoints, gone in random ones, and couplings where they were planted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from tests.support.tiny import config
from zoo.donors.donor import Donor
from zoo.donors.folder import open_donor
from zoo.donors.memory import zoo_of
from zoo.errors import UserError
from zoo.statistics.row_column import (
    MAX_SHUFFLED,
    permutation_test,
    random_submatrix,
    row_column_statistics,
    row_column_study,
    shuffled_shape,
)

NAMES = ("row_spread", "column_spread", "row_correlation")


def donor(module: nn.Module) -> Donor:
    return zoo_of({"donor": module}).donors[0]


def llama(seed: int = 0, **more: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(**more))


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_layer=3, n_head=4, n_positions=16, **ids))


def even(p: list[float], permutations: int) -> float:
    """How likely these p-values are, if they are uniform on the steps of a permutation test."""
    spread = np.array(p) - np.random.default_rng(0).random(len(p)) / (1 + permutations)
    return scipy.stats.kstest(spread, "uniform").pvalue


def space(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [c for c in found["couplings"] if c["space"] == name]


def test_statistics_are_what_they_are_called() -> None:
    matrix = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, 30)[:, None]
    values = matrix.double().numpy()
    correlation = np.abs(np.corrcoef(values))
    wanted = [
        np.log((values**2).sum(1)).std(ddof=1),
        np.log((values**2).sum(0)).std(ddof=1),
        correlation[~np.eye(30, dtype=bool)].mean(),
    ]
    assert row_column_statistics(matrix[None])[0].tolist() == pytest.approx(wanted, rel=1e-4)
    found = permutation_test(matrix, 99, torch.Generator().manual_seed(0))
    assert [found[n] for n in NAMES] == pytest.approx(wanted, rel=1e-4)
    rng = np.random.default_rng(0)  # the null is that of shuffles from scratch
    null = row_column_statistics(torch.tensor(np.stack([rng.permutation(matrix.flatten().numpy()) for _ in range(300)])
                                   .reshape(300, 30, 20))).mean(0)  # fmt: skip
    assert [found[f"{n}_null"] for n in NAMES] == pytest.approx(null.tolist(), rel=0.03)
    assert found["row_spread_p"] == pytest.approx(0.01)


@pytest.mark.parametrize("heavy", [False, True])
def test_p_values_are_uniform_in_random_places(heavy: bool) -> None:
    torch.manual_seed(0)
    drawn = []
    for i in range(120):
        shape = [(24, 16), (16, 40)][i % 2]
        matrix = torch.distributions.StudentT(3.0).sample(shape) if heavy else torch.randn(shape)
        drawn.append(permutation_test(matrix, 39, torch.Generator().manual_seed(i)))
    for name in NAMES:
        assert even([found[f"{name}_p"] for found in drawn], 39) > 0.01


def test_random_checkpoints_show_nothing() -> None:
    found = [
        row_column_study(donor(make(seed)), permutations=39, seed=seed) for make in (llama, gpt2) for seed in range(2)
    ]
    tensors = [t for f in found for t in f["tensors"]]
    assert len(tensors) == 2 * (2 + 2 * 7) + 2 * (2 + 3 * 6)
    for name in NAMES:
        assert even([t[f"{name}_p"] for t in tensors], 39) > 0.01
    assert even([c["p"] for f in found for c in f["couplings"]], 39) > 0.01
    assert {c["space"] for f in found for c in f["couplings"]} == {"ffn", "value", "query-key", "residual"}


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105", "arthur/run0-ep025"])
def test_real_checkpoints_show_it(shared_data: Path, name: str) -> None:
    found = row_column_study(open_donor(shared_data / "models" / name), permutations=49, most=128)
    for statistic in NAMES:
        assert np.mean([t[f"{statistic}_p"] <= 0.021 for t in found["tensors"]]) > 0.5
    coupled = [c for c in space(found, "ffn") if c["a"] == "mlp.up"]
    assert len(coupled) == 5 - name.startswith("arthur")
    assert sum(c["p"] == 1 / 50 and c["correlation"] > 0.2 for c in coupled) >= len(coupled) - 1


def test_the_coupling_goes_with_the_order_of_one_side(shared_data: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared_data / "models" / "makemore-en-a")
    before = [c for s in ("ffn", "value") for c in space(row_column_study(donor(model), 99, most=16), s)]
    assert all(c["correlation"] > 0.6 and c["p"] == 1 / 100 for c in before)
    with torch.no_grad():
        for block in model.transformer.h:  # c_proj is [in, out]
            for weight in (block.mlp.c_proj.weight, block.attn.c_proj.weight):
                weight.copy_(weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))])
    after = [c for s in ("ffn", "value") for c in space(row_column_study(donor(model), 99, most=16), s)]
    assert all(abs(c["correlation"]) < 0.35 for c in after) and sum(c["p"] < 0.05 for c in after) <= 1


@torch.no_grad()
def plant_llama() -> tuple[nn.Module, dict[str, int]]:
    model = llama(layers=2, kv=2)
    generator = torch.Generator().manual_seed(1)
    layer = model.model.layers[1]
    groups = torch.rand(16, generator=generator) + 0.2  # 2 KV heads of 8
    heads = groups.view(2, 1, 8).expand(2, 2, 8).flatten()  # 4 query heads: 0 and 1 read KV head 0
    layer.self_attn.v_proj.weight *= groups[:, None]
    layer.self_attn.o_proj.weight *= heads
    layer.self_attn.k_proj.weight *= groups[:, None]
    layer.self_attn.q_proj.weight *= heads[:, None]
    units = torch.rand(40, generator=generator) + 0.2
    layer.mlp.gate_proj.weight *= units[:, None]
    layer.mlp.down_proj.weight *= 1 / units
    stream = torch.rand(32, generator=generator) + 0.2
    model.model.layers[0].mlp.down_proj.weight *= stream[:, None]
    layer.mlp.up_proj.weight *= stream
    return model, {"ffn": -1, "value": 1, "query-key": 1, "residual": 1}


@torch.no_grad()
def plant_gpt2() -> tuple[nn.Module, dict[str, int]]:
    model = gpt2()
    units = torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.2
    block = model.transformer.h[1]
    block.attn.c_attn.weight[:, 64:] *= units  # [in, q k v]
    block.attn.c_proj.weight *= units[:, None]
    return model, {"value": 1}


@pytest.mark.parametrize("plant", [plant_llama, plant_gpt2])
def test_a_planted_coupling_is_found_where_it_is(plant: Callable[[], tuple[nn.Module, dict[str, int]]]) -> None:
    model, planted = plant()
    found = row_column_study(donor(model))
    for name, sign in planted.items():
        there = [c for c in space(found, name) if c["layer"] == 1 and c["a"] != "mlp.up"]
        assert len(there) == 1 and sign * there[0]["correlation"] > 0.5 and there[0]["p"] <= 0.02
    others = [c for c in found["couplings"] if c["layer"] == 0]
    assert len(others) >= 4 and min(c["p"] for c in others) > 0.01


def test_the_residual_stream_from_the_embedding_to_the_head() -> None:
    shared = space(row_column_study(donor(llama(tie_word_embeddings=True))), "residual")
    assert [(c["layer"], c["a"], c["b"]) for c in shared] == [
        (0, "embed", "attn.q + attn.k + attn.v + mlp.gate + mlp.up"),
        (1, "attn.o + mlp.down", "attn.q + attn.k + attn.v + mlp.gate + mlp.up"),
        (None, "attn.o + mlp.down", "head"),
    ]


def test_each_stack_of_an_encoder_decoder_has_its_couplings() -> None:
    torch.manual_seed(0)
    sizes = dict(vocab_size=48, d_model=32, max_position_embeddings=16, pad_token_id=0)
    layers = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    model = BartForConditionalGeneration(BartConfig(**sizes, **layers, encoder_ffn_dim=64, decoder_ffn_dim=64))
    layer = model.model.encoder.layers[1]
    with torch.no_grad():
        energies = torch.linspace(0.2, 3, 64)
        layer.fc1.weight.mul_(energies[:, None])
        layer.fc2.weight.mul_(energies)
    found = row_column_study(donor(model), permutations=99)
    ffn = {(c["stack"], c["layer"]): c for c in space(found, "ffn")}
    assert len(ffn) == 4
    assert [place for place, c in ffn.items() if c["p"] == 0.01] == [("model.encoder.layers.", 1)]
    head = [c for c in space(found, "residual") if c["b"] == "head"]
    assert [c["stack"] for c in head] == ["model.decoder.layers."]


def test_the_digits_network() -> None:
    """What writes a hidden unit strongly is read strongly; before training it is not."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    untrained = row_column_study(donor(model), 99, most=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
    for _ in range(300):
        batch = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    found = row_column_study(donor(model), 99, most=32)
    assert [(c["space"], c["a"], c["b"]) for c in found["couplings"]] == [
        ("hidden", "0.weight", "2.weight"), ("hidden", "2.weight", "4.weight")
    ]  # fmt: skip
    assert all(c["correlation"] > 0.5 and c["p"] == 1 / 100 for c in found["couplings"])
    assert all(abs(c["correlation"]) < 0.25 for c in untrained["couplings"])


def test_large_matrices_are_cut_and_seeds_count() -> None:
    matrix = torch.arange(40.0).view(8, 5)
    small = random_submatrix(matrix, 4, torch.Generator().manual_seed(0))
    assert small.shape == (4, 4) and bool((small.diff(dim=0) > 0).all()) and bool((small.diff(dim=1) > 0).all())
    shapes = {(64, 256): (64, 256), (600, 700): (256, 256), (200, 600): (200, 327), (8192, 20): (512, 20)}
    for shape, shuffled in shapes.items():
        assert shuffled_shape(torch.empty(shape, device="meta"), 512) == shuffled
        assert shuffled[0] * shuffled[1] <= MAX_SHUFFLED
    found = row_column_study(donor(llama()), permutations=9, most=16)
    assert found == row_column_study(donor(llama()), permutations=9, most=16)
    assert found != row_column_study(donor(llama()), permutations=9, most=16, seed=1)


@torch.no_grad()
def test_what_has_nothing_to_shuffle_is_left_out() -> None:
    model = llama()
    model.model.layers[0].mlp.down_proj.weight.zero_()
    ticks: list[int] = []
    found = row_column_study(donor(model), permutations=9, progress=ticks.append)
    assert len(found["tensors"]) == 2 + 2 * 7 - 1
    assert [c["layer"] for c in space(found, "ffn")] == [1, 1]
    assert sum(ticks) == len(donor(model).blueprint.specs)
    model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj"):
        row_column_study(donor(model), permutations=9)
