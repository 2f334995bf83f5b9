"""The choice of a law by held-out likelihood."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from baselines.distributions.auto_fit import AutoFit, held_out_log_probs, simplest_family
from baselines.distributions.families import FAMILIES
from tests.baselines.distributions.test_parametric import filled
from zoo.donors.memory import zoo_of
from zoo.donors.zoo import open_standalone
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint

TRUTH = {
    "normal": {"mean": 0.0, "std": 0.02},
    "laplace": {"loc": 0.0, "scale": 0.02},
    "student-t": {"nu": 4.0, "loc": 0.0, "scale": 0.02, "low": -1.0, "high": 1.0},
    "generalized-normal": {"shape": 5.0, "loc": 0.0, "scale": 0.02},
    "mixture": {"weight0": 0.5, "mean0": -0.1, "std0": 0.02, "weight1": 0.5, "mean1": 0.1, "std1": 0.05},
}


def test_each_tensor_gets_the_distribution_that_it_was_drawn_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = nn.ModuleDict({name: nn.Linear(200, 200, bias=False) for name in TRUTH})
    filled(module, {f"{name}.weight": (name, law) for name, law in TRUTH.items()})
    blueprint = Blueprint.from_module(module)
    with caplog.at_level(logging.INFO):
        sampler = AutoFit().fit(zoo_of({"a": module}), blueprint)
    fits = sampler.state()[0]["fits"]
    assert {group.split("/")[1]: fit["family"] for group, fit in fits.items()} == {name: name for name in TRUTH}
    assert all(set(fit["scores"]) == set(FAMILIES) for fit in fits.values())
    assert "auto-fit: normal 1, laplace 1, student-t 1, generalized-normal 1, mixture 1" in caplog.text
    sampler.save(tmp_path)
    expected = dict(sampler.sample(blueprint, seed=1))
    assert all(torch.equal(expected[name], tensor) for name, tensor in AutoFit.load(tmp_path).sample(blueprint, seed=1))


def test_only_the_families_that_are_asked_for() -> None:
    donor = filled(nn.Linear(100, 100, bias=False), {"weight": ("student-t", TRUTH["student-t"])})
    blueprint = Blueprint.from_module(donor)
    sampler = AutoFit(families="normal, laplace").fit(zoo_of({"a": donor}), blueprint)
    assert sampler.state()[0]["fits"]["name/weight/weight/2"]["family"] == "laplace"
    with pytest.raises(UserError, match="unknown family of auto-fit 'studnt-t': did you mean 'student-t'"):
        AutoFit(families="normal,studnt-t")
    with pytest.raises(UserError, match="is empty"):
        AutoFit(families="")


def test_what_shows_no_shape_gets_the_first_family() -> None:
    donor = nn.Linear(8, 8)
    nn.init.zeros_(donor.weight)
    blueprint = Blueprint.from_module(donor)
    sampler = AutoFit().fit(zoo_of({"a": donor}), blueprint)
    assert {fit["family"] for fit in sampler.state()[0]["fits"].values()} == {"normal"}
    assert (dict(sampler.sample(blueprint))["weight"] == 0).all()


def test_the_split_is_fixed_and_sees_every_column() -> None:
    values = torch.arange(64.0 * 50)
    first = held_out_log_probs(values, ["normal"])["normal"]
    assert torch.equal(first, held_out_log_probs(values, ["normal"])["normal"]) and 700 < len(first) < 900
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert simplest_family({"normal": torch.zeros(1000), "mixture": noise - noise.mean() + 0.03}) == "normal"
    assert simplest_family({"normal": torch.zeros(1000), "mixture": noise - noise.mean() + 0.1}) == "mixture"


def test_on_a_real_checkpoint_it_beats_the_normal_distribution(shared_data: Path) -> None:
    zoo = open_standalone(shared_data / "models" / "stories260K", quiet=True)
    blueprint = zoo.donors[0].blueprint
    sampler = AutoFit(families="normal,student-t,generalized-normal").fit(zoo, blueprint)
    fits = [fit for fit in sampler.state()[0]["fits"].values() if "family" in fit]
    gains = [fit["scores"][fit["family"]] - fit["scores"]["normal"] for fit in fits]
    assert min(gains) >= 0 and sum(gain > 0.01 for gain in gains) > len(gains) / 3
    assert any(fit["family"] != "normal" for fit in fits)
    assert {name for name, _ in sampler.sample(blueprint)} == set(blueprint.names)
