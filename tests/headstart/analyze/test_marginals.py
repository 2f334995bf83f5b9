"""Marginal summaries of known distributions: family, moments, tail index."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from baselines.distributions.families import FAMILIES
from headstart.analyze import marginals
from headstart.analyze.marginals import marginal_summary
from zoo.checkpoints.checkpoint import Checkpoint

N = 60_000


def draw(law: stats.rv_continuous, n: int = N, seed: int = 0) -> Tensor:
    return torch.from_numpy(law.rvs(n, random_state=seed)).float()


FAMILY_NAMES = {
    "normal": stats.norm(0.01, 0.02),
    "laplace": stats.laplace(0, 0.02),
    "student-t": stats.t(4, 0, 0.02),
    "generalized-normal": stats.gennorm(5, 0, 0.02),
    "stable": stats.cauchy(0, 0.02),
}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_family_and_its_likelihood_are_recovered(family: str) -> None:
    law = FAMILY_NAMES[family]
    found = marginal_summary(draw(law))
    if family != "stable":  # a Cauchy distribution is also a Student's t: the first of equals is chosen
        assert found["family"] == family
    assert found["family"] in (family, "student-t")
    assert set(found["scores"]) == set(FAMILIES)
    assert found["scores"][family] == pytest.approx(-law.entropy(), abs=0.03)
    assert max(found["scores"].values()) < -law.entropy() + 0.03
    json.dumps(found)


def test_two_peaks_give_a_mixture() -> None:
    values = torch.cat([draw(stats.norm(-1, 0.1)), draw(stats.norm(1, 0.2), seed=1)])
    found = marginal_summary(values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))])
    assert found["family"] == "mixture"
    assert found["law"].keys() >= {"weight0", "mean1", "std2"}


def test_the_parameters_of_the_family_are_recovered() -> None:
    law = marginal_summary(draw(stats.t(4, 0.01, 0.02)))["law"]
    assert law["nu"] == pytest.approx(4, rel=0.06)
    assert law["loc"] == pytest.approx(0.01, abs=5e-4)
    assert law["scale"] == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("piece", [1 << 22, 1000])
def test_moments_agree_with_scipy(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(marginals, "CHUNK", piece)
    values = draw(stats.gamma(3, loc=100), 2500)
    wide = values.double().numpy()
    found = marginal_summary(values.view(50, 50))
    assert found["count"] == 2500
    assert found["mean"] == pytest.approx(wide.mean(), rel=1e-12)
    assert found["std"] == pytest.approx(wide.std(), rel=1e-9)
    assert found["skewness"] == pytest.approx(stats.skew(wide), rel=1e-9)
    assert found["kurtosis"] == pytest.approx(stats.kurtosis(wide, fisher=False), rel=1e-9)
    assert (found["min"], found["max"]) == (wide.min(), wide.max())


@pytest.mark.parametrize("index", [1.5, 2.5, 4])
def test_the_index_of_a_pareto_tail(index: float) -> None:
    """A fifth of the values lies in tails of both signs beyond 0.01, the rest is uniform between them."""
    body, tail = draw(stats.uniform(-1, 2), 80_000), draw(stats.pareto(index), 20_000, seed=1)
    tail[::2] *= -1
    found = marginal_summary(0.01 * torch.cat([body, tail]))
    assert found["tail_index"] == pytest.approx(index, rel=0.05)
    assert found["tail_fraction"] < 0.21


@pytest.mark.parametrize("nu", [1.0, 2.0, 3.0])
def test_the_index_of_a_student_tail_is_its_degrees_of_freedom(nu: float) -> None:
    found = marginal_summary(draw(stats.t(nu, loc=5), 100_000))
    assert found["tail_index"] == pytest.approx(nu, rel=0.12)
    assert 0 < found["tail_fraction"] <= marginals.MAX_TAIL


@pytest.mark.parametrize("name, index", [("norm", 6.0), ("laplace", 3.5), ("uniform", 10.0)])
def test_light_tails_have_a_large_index(name: str, index: float) -> None:
    for seed in range(2):
        assert marginal_summary(draw(getattr(stats, name)(), 60_000, seed))["tail_index"] > index


def test_constants_and_few_values_give_none() -> None:
    constant = marginal_summary(torch.full((500,), 1.1))
    assert constant["mean"] == pytest.approx(1.1) and constant["std"] == 0
    assert constant["family"] is constant["kurtosis"] is constant["tail_index"] is None
    few = marginal_summary(draw(stats.norm(), 63))
    assert few["std"] > 0 and few["family"] is None and few["scores"] == {} and few["law"] == {}
    assert few["tail_index"] is None and marginal_summary(torch.ones(1))["count"] == 1
    json.dumps([constant, few])


def test_rounding_to_bfloat16_keeps_the_tail_index() -> None:
    values = draw(stats.t(3), 100_000)
    fine, coarse = marginal_summary(values), marginal_summary(values.bfloat16())
    assert coarse["tail_index"] == pytest.approx(fine["tail_index"], rel=0.1)
    assert coarse["kurtosis"] == pytest.approx(fine["kurtosis"], rel=0.05)


def test_large_tensors_are_fitted_on_a_sample() -> None:
    values = draw(stats.t(3), 100_000)
    small = marginal_summary(values, max_fitted=20_000)
    assert small["count"] == 100_000 and small["kurtosis"] == marginal_summary(values)["kurtosis"]
    assert small["family"] == "student-t"
    assert small["law"]["nu"] == pytest.approx(3, rel=0.15)


def test_trained_matrices_have_heavier_tails_than_their_initial_ones(shared_data: Path) -> None:
    checkpoint = Checkpoint.open(shared_data / "models" / "stories260K")
    name = "model.layers.3.self_attn.q_proj.weight"
    trained = marginal_summary(checkpoint.read(name))
    fresh = marginal_summary(torch.randn(checkpoint.read(name).shape, generator=torch.Generator().manual_seed(0)))
    assert fresh["family"] == "normal" and trained["family"] != "normal"
    assert trained["kurtosis"] > 3.5 > fresh["kurtosis"]
    assert trained["scores"][trained["family"]] > trained["scores"]["normal"] + 0.05
    assert trained["tail_index"] < 5 < fresh["tail_index"]
    values = checkpoint.read(name).double().numpy().ravel()
    assert trained["kurtosis"] == pytest.approx(np.mean((values - values.mean()) ** 4) / np.var(values) ** 2)
