"""Distances between layers against plain numpy on real and on tiny checkpoints, and the null models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import make_llama
from zoo.donors.folder import StandaloneDonor
from zoo.donors.memory import zoo_of
from zoo.errors import UserError
from zoo.statistics.similarity import (
    PROJECTIONS,
    compare_projections,
    fit_pooled_distances,
    layer_distances,
    null_model_stacks,
    pooled_distances,
    singular_value_stacks,
)

NAMES = {
    "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
SIZES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_inner": 48, "n_positions": 16},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
    "phi3": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
}


def donor_of(kind, **more):
    """A tiny model in memory of three layers, as a donor, with the model."""
    torch.manual_seed(0)
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **({"num_hidden_layers": 3} | SIZES[kind] | tokens | more))
    model = AutoModelForCausalLM.from_config(config)
    return zoo_of({kind: model}).donor(kind), model


def by_numpy(matrix, rank):
    return np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:rank]


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105"])
def test_stacks_of_a_real_checkpoint_are_those_of_numpy(shared_data, name):
    folder = shared_data / "models" / name
    tensors = load_file(folder / "model.safetensors")
    seen = []
    found = singular_value_stacks(StandaloneDonor.open(folder, quiet=True), [16], progress=seen.append)
    assert list(found) == list(PROJECTIONS)
    assert sum(seen) == 35
    for role, stack in found.items():
        assert stack.shape == (5, 16)
        assert stack.dtype == torch.float64
        for layer in range(5):
            matrix = tensors[f"model.layers.{layer}.{NAMES[role]}.weight"].astype(np.float64)
            np.testing.assert_allclose(stack[layer], np.linalg.svd(matrix, compute_uv=False)[:16], rtol=1e-6)


def test_distances_are_one_minus_the_cosine(shared_data):
    found = singular_value_stacks(StandaloneDonor.open(shared_data / "models" / "stories260K", quiet=True), [16])
    a, b = found["attn.v"].numpy(), found["mlp.gate"].numpy()
    values, pairs = layer_distances(found["attn.v"], found["mlp.gate"])
    assert len(values) == 25
    for value, (i, j) in zip(values, pairs, strict=True):
        cosine = a[i] @ b[j] / np.linalg.norm(a[i]) / np.linalg.norm(b[j])
        assert value == pytest.approx(1 - cosine, abs=1e-14, rel=1e-9)
    values, pairs = layer_distances(found["attn.v"])
    assert [tuple(p) for p in pairs] == [(i, j) for i in range(5) for j in range(i + 1, 5)]


def test_equal_layers_have_no_distance():
    a = torch.tensor([[3.0, 2.0, 1.0], [6.0, 4.0, 2.0], [3.0, 2.0, 0.5]], dtype=torch.float64)
    values, pairs = layer_distances(a)
    assert [tuple(p) for p in pairs] == [(0, 2), (1, 2)]
    assert values[0] == pytest.approx(values[1])
    assert len(layer_distances(a, a)[0]) == 4


def test_fused_and_transposed_projections_are_split():
    donor, model = donor_of("gpt2")
    found = singular_value_stacks(donor, [8])
    assert set(found) == {*PROJECTIONS} - {"mlp.gate"}
    for layer, block in enumerate(model.transformer.h):
        parts = dict(zip(("attn.q", "attn.k", "attn.v"), block.attn.c_attn.weight.detach().split(32, 1), strict=True))
        parts |= {"attn.o": block.attn.c_proj.weight, "mlp.up": block.mlp.c_fc.weight}
        for role, matrix in parts.items():
            np.testing.assert_allclose(found[role][layer], by_numpy(matrix.detach(), 8), rtol=1e-5)
    donor, model = donor_of("gpt_neox")
    found = singular_value_stacks(donor, [8])
    assert set(found) == {*PROJECTIONS} - {"mlp.gate"}
    for layer, block in enumerate(model.gpt_neox.layers):
        heads = block.attention.query_key_value.weight.detach().view(4, 3, 8, 32)
        for i, role in enumerate(("attn.q", "attn.k", "attn.v")):
            np.testing.assert_allclose(found[role][layer], by_numpy(heads[:, i].reshape(32, 32), 8), rtol=1e-5)
    donor, model = donor_of("phi3")
    found = singular_value_stacks(donor, [8])
    assert list(found) == list(PROJECTIONS)
    gate, up = model.model.layers[1].mlp.gate_up_proj.weight.detach().split(48)
    np.testing.assert_allclose(found["mlp.gate"][1], by_numpy(gate, 8), rtol=1e-5)
    np.testing.assert_allclose(found["mlp.up"][1], by_numpy(up, 8), rtol=1e-5)


def test_rank_is_capped_at_the_smallest_side_for_all():
    """One key head of 8 rows: no projection can be compared with it in more than 8 numbers."""
    found = singular_value_stacks(donor_of("llama")[0], [4, 16])
    assert {stack.shape for stack in found.values()} == {(3, 8)}


def test_refuses_what_has_no_statistics(tmp_path: Path):
    with pytest.raises(UserError, match="at least 3 layers, it has 2 layers"):
        singular_value_stacks(donor_of("llama", num_hidden_layers=2)[0], [8])
    with pytest.raises(UserError, match="no recognisable projections"):
        singular_value_stacks(zoo_of({"net": torch.nn.Sequential(torch.nn.Linear(4, 4))}).donor("net"), [4])
    donor, model = donor_of("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(0.5)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight' is constant"):
        singular_value_stacks(donor, [8])
    donor, model = donor_of("gpt2")
    with torch.no_grad():
        model.transformer.h[2].attn.c_attn.weight[:, 32:64] = 0
    with pytest.raises(UserError, match=r"h\.2\.attn\.c_attn\.weight' \(attn\.k\) is constant"):
        singular_value_stacks(donor, [8])
    folder = make_llama(tmp_path / "nan", num_hidden_layers=3)
    tensors = load_file(folder / "model.safetensors")
    donor = StandaloneDonor.open(folder, quiet=True)
    place = donor.entry("model.layers.0.self_attn.q_proj.weight").offset
    with (folder / "model.safetensors").open("r+b") as f:
        f.seek(place)
        f.write(np.full(1, np.nan, tensors["model.layers.0.self_attn.q_proj.weight"].dtype).tobytes())
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj\.weight' holds NaN"):
        singular_value_stacks(donor, [8])


SHAPES = {"attn.q": [(48, 64)] * 4, "attn.k": [(16, 64)] * 4, "mlp.down": [(64, 96), (64, 80), (64, 96), (64, 96)]}


@pytest.mark.parametrize("kind", ["gaussian", "spikes"])
def test_null_models_have_the_shapes_and_are_drawn_independently(kind):
    found = null_model_stacks(SHAPES, 12, kind, 0)
    assert {role: tuple(stack.shape) for role, stack in found.items()} == {role: (4, 12) for role in SHAPES}
    rows = torch.cat(list(found.values()))
    assert len(rows.unique(dim=0)) == 12
    assert (rows[:, :-1] >= rows[:, 1:]).all()
    assert all(
        torch.equal(a, b) for a, b in zip(found.values(), null_model_stacks(SHAPES, 12, kind, 0).values(), strict=True)
    )
    assert not torch.equal(found["attn.q"], null_model_stacks(SHAPES, 12, kind, 1)["attn.q"])
    # Order and company change nothing.
    assert torch.equal(found["attn.k"], null_model_stacks({"attn.k": SHAPES["attn.k"]}, 12, kind, 0)["attn.k"])
    with pytest.raises(UserError, match="kind of random matrices"):
        null_model_stacks(SHAPES, 12, "spike", 0)


def test_gaussian_null_has_the_singular_values_of_gaussian_matrices():
    """Mean and spread of every one of them, against drawn matrices, within four standard errors."""
    for rows, columns in ((30, 12), (12, 30), (12, 12)):
        ours = null_model_stacks({"attn.q": [(rows, columns)] * 600}, 12, "gaussian", 0)["attn.q"].numpy()
        drawn = np.linalg.svd(np.random.default_rng(0).normal(size=(600, rows, columns)), compute_uv=False)
        error = np.hypot(ours.std(0), drawn.std(0)) / np.sqrt(600)
        assert (np.abs(ours.mean(0) - drawn.mean(0)) < 4 * error).all()
        np.testing.assert_allclose(ours.std(0), drawn.std(0), rtol=0.2)


def test_spikes_stand_out_of_the_noise():
    found = null_model_stacks({"attn.q": [(64, 64)] * 300}, 64, "spikes", 0)["attn.q"]
    outside = (found > 1.15 * 16).sum(1).double()
    assert outside.mean() > 1
    assert outside.max() > 5  # Pareto counts: some matrices have many
    assert (null_model_stacks({"attn.q": [(64, 64)] * 300}, 64, "gaussian", 0)["attn.q"] < 1.15 * 16).all()


def test_study_of_a_real_checkpoint(shared_data):
    found = singular_value_stacks(StandaloneDonor.open(shared_data / "models" / "babyllama-tok105", quiet=True), [16])
    seen = []
    rows = compare_projections(found, 16, 40, 0, seen.append)
    assert len(rows) == len(seen) == 28
    assert len({frozenset((row["a"], row["b"])) for row in rows}) == 28
    for row in rows:
        assert row["n"] == (10 if row["a"] == row["b"] else 25)
        assert row["verdict"] in ("power law", "not a power law", "undecided")
        assert row["alpha_ci95"][0] <= row["alpha_ci95"][1]
        assert 5 <= row["worth"] <= row["n"]
        assert set(row["ratios"]) == {"lognormal", "exponential", "truncated_power_law", "normal"}
        values = np.sort(layer_distances(found[row["a"]], None if row["a"] == row["b"] else found[row["b"]])[0])
        for x, share in row["ccdf"]:
            assert share == pytest.approx((values >= x).mean())
        assert sum(count for _, _, count in row["histogram"]) == row["n"]
    assert json.loads(json.dumps(rows)) == rows
    assert compare_projections(found, 16, 40, 0)[5] == rows[5]


def test_too_few_distances_are_undecided():
    found = null_model_stacks({"attn.q": [(8, 8)] * 3, "attn.k": [(8, 8)] * 3}, 8, "gaussian", 0)
    for row in compare_projections(found, 8, 10):
        assert (row["verdict"], row["p"], row["ratios"]) == ("undecided", None, {})
        assert "3 layers" in row["why"]
    nothing = compare_projections({"attn.q": torch.ones(3, 2, dtype=torch.float64)}, 2, 10)
    assert (nothing[0]["n"], nothing[0]["verdict"]) == (0, "undecided")


def test_pooled_distances_are_those_of_all_vectors():
    generator = torch.Generator().manual_seed(0)
    stacks = {role: torch.rand(4, 6, generator=generator, dtype=torch.float64) for role in ("attn.q", "mlp.up")}
    vectors = np.concatenate([stack[:, :3].numpy() for stack in stacks.values()])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    sample = pooled_distances(stacks, 3)
    first, second = sample.pairs.T
    assert len(sample.values) == 8 * 7 / 2 and (np.diff(sample.values) >= 0).all()
    assert {*map(tuple, sample.pairs)} == {(i, j) for i in range(8) for j in range(i + 1, 8)}
    np.testing.assert_allclose(sample.values, 1 - (unit[first] * unit[second]).sum(1), rtol=1e-9)


def test_pooled_distances_of_a_planted_law_have_its_exponent():
    """Vectors at the distances p of a Pareto law from a common direction, each in a plane of its own, are p + q - p q
    apart. Many of them show the tail of p."""
    rng = np.random.default_rng(0)
    shares = np.minimum(1e-4 * (1 - rng.random(240)) ** (-1 / 0.78), 0.9)
    vectors = torch.zeros(240, 241, dtype=torch.float64)
    vectors[:, 0] = torch.from_numpy(1 - shares)
    vectors[range(240), range(1, 241)] = torch.from_numpy(np.sqrt(1 - (1 - shares) ** 2))
    found = fit_pooled_distances({"attn.q": vectors[:120], "mlp.up": vectors[120:]}, 241)
    assert found["n"] == 240 * 239 / 2 and found["tail"] > 0.2 * found["n"]
    assert found["alpha"] == pytest.approx(1.78, abs=0.15)
    assert sum(count for _, _, count in found["histogram"]) == found["n"]


def test_too_few_vectors_have_no_pooled_exponent():
    found = fit_pooled_distances({"attn.q": torch.eye(3, dtype=torch.float64)}, 3)
    assert found["n"] == 3 and found["alpha"] is found["xmin"] is found["tail"] is None
