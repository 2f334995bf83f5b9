"""Mixtures of actual values and laws: the ends, the moments in between, the noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from baselines.distributions.empirical import KDE, Histogram, Permuted
from baselines.distributions.hybrid import Hybrid
from baselines.distributions.parametric import Normal, StudentT
from tests.baselines.distributions.test_empirical import HEAVY, linear
from tests.support.shaken import CONFIGS, donor
from zoo.donors.memory import zoo_of
from zoo.errors import UserError
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint


def drawn(sampler: Sampler, module: nn.Module, seed: int = 0) -> Tensor:
    blueprint = Blueprint.from_module(module)
    return dict(sampler.fit(zoo_of({"a": module}), blueprint).sample(blueprint, seed))["weight"].flatten()


@pytest.mark.parametrize("values", [Histogram, KDE, Permuted])
def test_the_ends_are_the_two_methods(values: type[Histogram | KDE | Permuted]) -> None:
    module = linear(40, 50, "student-t", HEAVY)
    assert torch.equal(drawn(Hybrid(values=values.name, mix=0.0), module, 3), drawn(values(), module, 3))
    assert torch.equal(drawn(Hybrid(values=values.name, mix=1.0), module, 3), drawn(StudentT(), module, 3))
    half = drawn(Hybrid(values=values.name, mix=0.25, law="normal"), module, 3)
    actual, law = drawn(values(), module, 3), drawn(Normal(), module, 3)
    assert ((half == actual) ^ (half == law)).all() and abs((half == law).double().mean() - 0.25) < 0.04


def test_mixing_entries_keeps_tails_where_linear_mixing_thins_them() -> None:
    module = linear(500, 1000, "student-t", HEAVY)
    values = module.weight.detach().flatten()
    entries = drawn(Hybrid(values="permuted", law="student-t", mix=0.5), module)
    linearly = drawn(Hybrid(values="permuted", law="student-t", mix=0.5, mixing="linear"), module)
    for got in (entries, linearly):
        assert abs(got.std() / values.std() - 1) < 0.01 and abs(got.mean() - values.mean()) < 0.01 * values.std()
    assert stats.ks_2samp(entries[:50_000], values[-50_000:]).pvalue > 0.01
    excess = stats.kurtosis(values)
    assert abs(stats.kurtosis(linearly) / (excess / 2) - 1) < 0.3 and stats.kurtosis(entries) > 0.75 * excess


def test_noise_is_relative_to_the_tensor() -> None:
    module = linear(300, 300, "student-t", HEAVY)
    plain = drawn(Hybrid(values="permuted", mix=0.0), module)
    noisy = drawn(Hybrid(values="permuted", mix=0.0, noise=0.1), module)
    noise = noisy - plain
    assert abs(noise.std() / plain.std() - 0.1) < 0.002 and abs(noise.mean()) < 0.001 * plain.std()
    assert abs(stats.kurtosis(noise)) < 0.1


@pytest.mark.parametrize("values", ["histogram", "permuted"])
def test_a_saved_fit_gives_the_same_bytes(tmp_path: Path, values: str) -> None:
    zoo, blueprint = donor(tmp_path / "donor", CONFIGS["gpt2"]), Blueprint.from_config(CONFIGS["gpt2"])
    sampler = Hybrid(values=values, law="laplace", mix=0.3, noise=0.05).fit(zoo, blueprint)
    sampler.save(tmp_path / "saved")
    expected = dict(sampler.sample(blueprint, seed=2))
    loaded = Hybrid.load(tmp_path / "saved")
    assert set(expected) == set(blueprint.names) and loaded.donors == ("donor",)
    assert all(torch.equal(expected[name], tensor) for name, tensor in loaded.sample(blueprint, seed=2))
    assert sampler.planned_donors(zoo, blueprint) == ("donor",)


def test_permuted_values_and_the_distribution_come_from_one_donor() -> None:
    donors = {"near": linear(30, 30, "student-t", HEAVY), "far": linear(90, 90, "normal", {"mean": 5.0, "std": 1.0})}
    blueprint = Blueprint.from_module(nn.Linear(32, 32, bias=False))
    sampler = Hybrid(values="permuted", law="normal", mix=0.5).fit(zoo_of(donors), blueprint)
    assert sampler.donors == ("near",) and dict(sampler.sample(blueprint))["weight"].abs().max() < 1


def test_options_are_checked() -> None:
    for options, message in (
        ({"mix": 1.5}, r"hybrid: mix is 1\.5; give at most 1"),
        ({"mix": -0.5}, r"hybrid: mix is -0\.5; give at least 0"),
        ({"noise": -0.1}, r"hybrid: noise is -0\.1; give at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            Hybrid(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown law of hybrid 'norml': did you mean 'normal'"):
        Hybrid(law="norml")
