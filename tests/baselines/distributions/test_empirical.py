"""Samplers that draw from donors' values: same law, same tails, same values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from baselines.distributions.empirical import KDE, Histogram, Permuted
from baselines.distributions.families import FAMILIES
from tests.support.shaken import CONFIGS, build, donor
from zoo.donors.memory import zoo_of
from zoo.donors.zoo import open_standalone
from zoo.errors import UserError
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint

HEAVY = {"nu": 5.5, "loc": 0.001, "scale": 0.02, "low": -1.0, "high": 1.0}
BIMODAL = {"weight0": 0.4, "mean0": -0.1, "std0": 0.01, "weight1": 0.6, "mean1": 0.1, "std1": 0.03}


def linear(rows: int, columns: int, family: str, law: dict[str, float], seed: int = 0) -> nn.Linear:
    module = nn.Linear(columns, rows, bias=False)
    values = FAMILIES[family].sample(law, (rows, columns), torch.Generator().manual_seed(seed))
    module.load_state_dict({"weight": values})
    return module


def drawn(sampler: Sampler, donor: nn.Module, target: nn.Module | None = None, seed: int = 0) -> Tensor:
    blueprint = Blueprint.from_module(target or donor)
    return dict(sampler.fit(zoo_of({"a": donor}), blueprint).sample(blueprint, seed))["weight"].flatten()


@pytest.mark.parametrize(
    ("sampler", "family", "law"),
    [
        (Histogram(), "student-t", HEAVY),
        (Histogram(), "mixture", BIMODAL),
        (KDE(), "student-t", HEAVY),
        (KDE(bandwidth=0.1), "mixture", BIMODAL),  # Silverman's width is made for one mode
    ],
)
def test_draws_pass_a_two_sample_test(sampler: Sampler, family: str, law: dict[str, float]) -> None:
    module = linear(250, 200, family, law)
    got = drawn(sampler, module)
    values = module.weight.detach().flatten()
    assert stats.ks_2samp(got, values).pvalue > 0.05
    assert abs(got.mean() - values.mean()) < 0.02 * values.std() and abs(got.std() / values.std() - 1) < 0.02


@pytest.mark.parametrize("sampler", [Histogram, KDE])
def test_kurtosis_survives(sampler: Any) -> None:
    module = linear(1000, 1000, "student-t", HEAVY)
    (values,) = module.parameters()
    kurtosis = stats.kurtosis(values.detach().flatten(), fisher=False)
    assert kurtosis > 5.5
    draws = torch.stack([drawn(sampler(), module, seed=seed) for seed in range(3)])
    assert abs(stats.kurtosis(draws.flatten(), fisher=False) / kurtosis - 1) < 0.1


def test_a_narrower_target_gets_a_larger_spread() -> None:
    module = linear(300, 400, "student-t", HEAVY)
    for sampler in (Histogram(), KDE(), Permuted()):
        got = drawn(sampler, module, nn.Linear(100, 300, bias=False))
        assert abs(got.std() / (2 * module.weight.std()) - 1) < 0.05


def test_kde_smooths_by_its_bandwidth_and_keeps_the_variance() -> None:
    module = nn.Linear(200, 200, bias=False)
    module.load_state_dict({"weight": torch.randint(0, 2, (200, 200)) * 2.0 - 1})
    plain, smooth = drawn(KDE(bandwidth=0), module), drawn(KDE(bandwidth=3), module)
    assert ((plain.abs() - 1).abs() < 1e-6).double().mean() > 0.999
    width = 3 * 0.9 * 40_000**-0.2  # of data whose std is 1
    assert abs(smooth.std() - 1) < 0.01
    assert abs((smooth.abs() - 1 / (1 + width**2) ** 0.5).std() - width / (1 + width**2) ** 0.5) < 0.01


@pytest.mark.parametrize("sampler", [Histogram, KDE])
def test_constants_and_few_values(sampler: Any) -> None:
    module = nn.Linear(3, 1)
    nn.init.zeros_(module.bias)
    blueprint = Blueprint.from_module(module)
    got = dict(sampler().fit(zoo_of({"a": module}), blueprint).sample(blueprint))
    assert (got["bias"] == 0).all() and got["weight"].isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_permuted_has_the_donors_values_and_no_order(tmp_path: Path, name: str) -> None:
    zoo, blueprint = donor(tmp_path / "donor", CONFIGS[name]), Blueprint.from_config(CONFIGS[name])
    sampler = Permuted().fit(zoo, blueprint)
    got = dict(sampler.sample(blueprint))
    assert set(blueprint.names) - set(got) == set(blueprint.unknown)
    for key, tensor in got.items():
        own = zoo.donors[0].read(key, torch.float32)
        assert torch.equal(tensor.flatten().sort().values, own.flatten().sort().values), key
        assert not torch.equal(tensor, own) or own.numel() < 3, key
    sampler.save(tmp_path / "saved")
    again = dict(Permuted.load(tmp_path / "saved").sample(blueprint))
    assert all(torch.equal(again[key], tensor) for key, tensor in got.items())
    other = dict(sampler.sample(blueprint, seed=1))
    assert any(not torch.equal(other[key], tensor) for key, tensor in got.items())


def test_permuted_to_another_shape_uses_every_value_equally_often(tmp_path: Path) -> None:
    zoo = donor(tmp_path / "donor", CONFIGS["llama"])
    deep = CONFIGS["llama"] | {"num_hidden_layers": 3, "intermediate_size": 100}
    blueprint = Blueprint.from_config(deep)
    got = dict(Permuted(rescale="none").fit(zoo, blueprint).sample(blueprint))
    name = "model.layers.{}.mlp.up_proj.weight"
    for layer, source in ((0, 0), (2, 1)):  # 100 rows of 48: every value twice, and some a third time
        values = zoo.donors[0].read(name.format(source)).flatten()
        counts = torch.stack([(got[name.format(layer)] == value).sum() for value in values[:200]])
        assert set(counts.tolist()) == {2, 3}
        assert torch.isin(got[name.format(layer)], values).all()
    small = Blueprint.from_config(CONFIGS["llama"] | {"intermediate_size": 24})
    drawn = dict(Permuted().fit(zoo, small).sample(small))[name.format(0)]
    assert drawn.unique().numel() > 0.99 * drawn.numel()


def test_permuted_takes_the_donor_nearest_in_size_and_says_what_it_needs() -> None:
    big, small = nn.Linear(90, 90), nn.Linear(30, 30)
    blueprint = Blueprint.from_module(nn.Linear(32, 32))
    assert Permuted().planned_donors(zoo_of({"big": big, "small": small}), blueprint) == ("small",)
    assert Permuted(donor="big").planned_donors(zoo_of({"big": big, "small": small}), blueprint) == ("big",)
    with pytest.raises(UserError, match="permuted needs donors"):
        Permuted().planned_donors(None, blueprint)
    with pytest.raises(UserError, match="histogram: points is 3; give at least 16"):
        Histogram(points=3)


@pytest.mark.parametrize("sampler", [Histogram, KDE])
def test_a_saved_fit_needs_no_donor(tmp_path: Path, sampler: Any) -> None:
    build(CONFIGS["gpt2"]).save_pretrained(tmp_path / "donor")
    blueprint = Blueprint.from_config(CONFIGS["gpt2"] | {"n_embd": 16})
    fitted = sampler().fit(open_standalone(tmp_path / "donor"), blueprint)
    fitted.save(tmp_path / "saved")
    (tmp_path / "donor" / "model.safetensors").unlink()
    loaded = sampler.load(tmp_path / "saved")
    expected = dict(fitted.sample(blueprint, seed=4))
    assert set(expected) == set(blueprint.names) and loaded.donors == ("donor",)
    assert all(torch.equal(expected[key], tensor) for key, tensor in loaded.sample(blueprint, seed=4))
