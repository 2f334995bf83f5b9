"""Fits of known laws: against the information bound, against scipy, and through draws and densities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from baselines.distributions.families import FAMILIES, Params
from baselines.distributions.stable import standard_stable
from baselines.distributions.summary import weighted_points

TRUTH: dict[str, Params] = {
    "normal": {"mean": 0.01, "std": 0.02},
    "laplace": {"loc": 0.01, "scale": 0.02},
    "student-t": {"nu": 5.0, "loc": 0.01, "scale": 0.02, "low": -math.inf, "high": math.inf},
    "generalized-normal": {"shape": 1.4, "loc": 0.01, "scale": 0.02},
    "mixture": {"weight0": 0.3, "mean0": -0.1, "std0": 0.02, "weight1": 0.7, "mean1": 0.05, "std1": 0.04},
}


def drawn(family: str, n: int, seed: int = 0) -> Tensor:
    return FAMILIES[family].sample(TRUTH[family], (n,), torch.Generator().manual_seed(seed))


def standard_errors(family: str, free: list[str], values: Tensor) -> dict[str, float]:
    """From the covariance of the scores at the truth, by central differences of the log density."""
    truth, scores = TRUTH[family], []
    for key in free:
        step = 1e-4 * abs(truth[key])
        sides = [truth | {key: truth[key] + sign * step} for sign in (1, -1)]
        if key == "weight0":
            sides = [side | {"weight1": 1 - side["weight0"]} for side in sides]
        up, down = (FAMILIES[family].log_prob(side, values) for side in sides)
        scores.append((up - down) / (2 * step))
    information = torch.stack(scores) @ torch.stack(scores).T
    return dict(zip(free, information.inverse().diag().sqrt().tolist(), strict=True))


@pytest.mark.parametrize("n", [4000, 200_000])
@pytest.mark.parametrize("family", TRUTH)
def test_parameters_come_back_within_three_standard_errors(family: str, n: int) -> None:
    free = [key for key in TRUTH[family] if key not in ("low", "high", "weight1")]
    values = drawn(family, n)
    fit = FAMILIES[family].fit(values) if family != "mixture" else mixture_of_two(values)
    for key, error in standard_errors(family, free, values).items():
        assert abs(fit[key] - TRUTH[family][key]) < 3 * error, (key, fit[key], error)


def mixture_of_two(values: Tensor) -> Params:
    from baselines.distributions.families import fit_mixture

    law = fit_mixture(values, 2)
    if law["mean0"] < law["mean1"]:
        return law
    return {f"{key}{i}": law[f"{key}{1 - i}"] for key in ("weight", "mean", "std") for i in (0, 1)}


@pytest.mark.parametrize("nu", [2.5, 6.0, 30.0])
def test_student_t_is_scipys_maximum(nu: float) -> None:
    values = torch.from_numpy(stats.t.rvs(nu, 0.3, 2.0, size=1500, random_state=1)).float()
    law = FAMILIES["student-t"].fit(values)
    other = stats.t.fit(values.double().numpy())
    ours = stats.t.logpdf(values.double().numpy(), law["nu"], law["loc"], law["scale"]).sum()
    theirs = stats.t.logpdf(values.double().numpy(), *other).sum()
    assert ours > theirs - 1e-5  # in nats of the whole
    assert np.allclose([law["nu"], law["loc"], law["scale"]], other, rtol=5e-3)


@pytest.mark.parametrize("shape", [1.3, 2.0, 4.0])
def test_generalized_normal_is_scipys_maximum(shape: float) -> None:
    values = torch.from_numpy(stats.gennorm.rvs(shape, 0.3, 2.0, size=1500, random_state=1)).float()
    law = FAMILIES["generalized-normal"].fit(values)
    other = stats.gennorm.fit(values.double().numpy())
    ours = stats.gennorm.logpdf(values.double().numpy(), law["shape"], law["loc"], law["scale"]).sum()
    assert ours > stats.gennorm.logpdf(values.double().numpy(), *other).sum() - 1e-4
    assert np.allclose([law["shape"], law["loc"], law["scale"]], other, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(("alpha", "beta"), [(1.2, -0.5), (1.5, 0.0), (1.8, 0.4), (1.97, 0.0)])
def test_stable_by_its_characteristic_function(alpha: float, beta: float) -> None:
    u, v = torch.rand((2, 100_000), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    law = FAMILIES["stable"].fit((0.01 + 0.02 * standard_stable(alpha, beta, u, 1 - v)).float())
    assert abs(law["alpha"] - alpha) < 0.02 and abs(law["beta"] - beta) < 0.1
    assert abs(law["loc"] - 0.01) < 0.02 * 0.02 and abs(law["scale"] / 0.02 - 1) < 0.01


def test_stable_draws_are_clipped_to_the_donors_range_and_have_its_spread() -> None:
    values = torch.from_numpy(stats.t.rvs(4, size=200_000, random_state=1)).float()
    law = FAMILIES["stable"].fit(values)
    got = FAMILIES["stable"].sample(law, (200_000,), torch.Generator().manual_seed(0))
    assert abs(got.std() / values.std() - 1) < 0.02 and abs(got.mean() - values.mean()) < 0.02
    assert law["low"] == pytest.approx(values.quantile(1e-4).item(), rel=0.05)
    factor = law["std"] / law["spread"]
    assert got.max().item() == pytest.approx((law["high"] - law["center"]) * factor + law["mean"], rel=1e-5)


@pytest.mark.parametrize(("alpha", "beta"), [(0.9, 0.3), (1.0, 0.5), (1.5, -0.7), (1.9, 0.0), (2.0, 0.0)])
def test_stable_density_and_draws_are_scipys(alpha: float, beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats.levy_stable, "parameterization", "S0")
    x = np.array([-9.0, -2.0, -0.6, 0.0, 0.4, 3.0, 40.0 if alpha < 1.9 else 4.0])
    law = {"alpha": alpha, "beta": beta, "loc": 0.5, "scale": 2.0}
    ours = FAMILIES["stable"].log_prob(law, torch.from_numpy(0.5 + 2 * x)).exp().numpy() * 2
    error = np.abs(ours / stats.levy_stable.pdf(x, alpha, beta) - 1)
    assert error[:-1].max() < 0.01 and error[-1] < 0.05  # the last is beyond the table for the first three
    u, v = torch.rand((2, 20_000), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = stats.levy_stable.rvs(alpha, beta, size=20_000, random_state=1)
    assert stats.ks_2samp(standard_stable(alpha, beta, u, 1 - v), theirs).pvalue > 0.01


SCIPY = {
    "normal": stats.norm(0.01, 0.02),
    "laplace": stats.laplace(0.01, 0.02),
    "student-t": stats.t(5.0, 0.01, 0.02),
    "generalized-normal": stats.gennorm(1.4, 0.01, 0.02),
}


@pytest.mark.parametrize("family", SCIPY)
def test_densities_and_draws_are_scipys(family: str) -> None:
    values = drawn(family, 20_000, seed=3)
    assert stats.ks_1samp(values, SCIPY[family].cdf).pvalue > 0.01
    expected = SCIPY[family].logpdf(values.double().numpy())
    assert np.allclose(FAMILIES[family].log_prob(TRUTH[family], values), expected, atol=1e-9)


def test_a_mixture_is_the_sum_of_its_parts() -> None:
    values = drawn("mixture", 20_000, seed=3)
    parts = [(0.3, stats.norm(-0.1, 0.02)), (0.7, stats.norm(0.05, 0.04))]
    assert stats.ks_1samp(values, lambda x: sum(w * part.cdf(x) for w, part in parts)).pvalue > 0.01
    density = sum(w * part.pdf(values.double().numpy()) for w, part in parts)
    assert np.allclose(FAMILIES["mixture"].log_prob(TRUTH["mixture"], values).exp(), density)


def test_a_mixture_sees_one_centre_with_two_spreads() -> None:
    wide = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) < 0.2
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(1)) * torch.where(wide, 3.0, 1.0)
    law = mixture_of_two(values)
    stds = sorted([law["std0"], law["std1"]])
    assert np.allclose(stds, [1.0, 3.0], rtol=0.03) and abs(law["mean0"] - law["mean1"]) < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_constants_few_values_and_spikes(family: str) -> None:
    law, generator = FAMILIES[family], torch.Generator().manual_seed(0)
    for constant in (0.0, 0.1):
        for n in (1, 5, 500):
            assert (law.sample(law.fit(torch.full((n,), constant)), (3, 4), generator) == np.float32(constant)).all()
    few = law.sample(law.fit(torch.tensor([1.0, 2.0, 3.0, 4.0])), (2000,), generator)
    assert 1 < few.mean() < 4 and 0.5 < few.std() < 2.5
    spike = torch.cat([torch.zeros(3000), torch.randn(3000, generator=generator)])  # half the rows never trained
    two = torch.tensor([0.0, 1.0]).repeat(500)
    for values in (spike, two):
        got = law.sample(law.fit(values), (20_000,), generator)
        assert got.isfinite().all() and got.std() < 3 * values.std()
        if family == "student-t":
            assert got.min() >= values.min() and got.max() <= values.max()


def test_a_summary_keeps_extremes_counts_and_averages() -> None:
    values = torch.from_numpy(stats.t.rvs(3, size=300_000, random_state=0)).float()
    points, counts = weighted_points(values)
    assert len(points) <= 4096 and counts.sum() == 300_000 and (points.diff() >= 0).all()
    assert points[-1].item() == pytest.approx(values.max().item()) and (counts[-500:] == 1).all()
    x = values.double()
    for f in (lambda x: x, torch.square, lambda x: torch.log1p(x * x / 3), torch.cos, lambda x: x.pow(4)):
        assert ((f(points) * counts).sum() / 300_000).item() == pytest.approx(f(x).mean().item(), rel=1e-4, abs=1e-9)
    assert torch.equal(weighted_points(values[:100])[0], values[:100].double().sort().values)
