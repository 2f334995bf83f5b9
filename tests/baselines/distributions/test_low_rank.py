"""Low rank plus diagonal against dense matrices, known covariances and the full fit."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from baselines.distributions import matrix_normal
from baselines.distributions.kronecker import Covariance, FitRules, color_noise, covariance_factor, flip_flop
from baselines.distributions.low_rank import FactorAnalysis, LowRank
from baselines.distributions.matrix_normal import MatrixNormal
from tests.support.tiny import config, make_zoo
from zoo.donors.memory import zoo_of
from zoo.targets.blueprint import Blueprint


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(size: int, rank: int, seed: int = 0) -> LowRank:
    """A covariance whose factors carry half of the variance, with variances that differ tenfold."""
    diagonal = noise(size, seed=seed).mul(0.7).exp()
    return LowRank.of(diagonal, noise(size, rank, seed=seed + 1) * (diagonal / rank).sqrt()[:, None])


def dense(covariance: Covariance) -> Tensor:
    if not isinstance(covariance, LowRank):
        return covariance
    root = covariance.times(torch.eye(len(covariance), dtype=torch.float64))
    return root @ root.mT


def samples(row: Covariance, column: Covariance, n: int, seed: int = 9) -> list[Tensor]:
    a, b = covariance_factor(row), covariance_factor(column)
    return [color_noise(a, b, noise(len(a), len(b), seed=seed + i)) for i in range(n)]


def relative(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


def test_the_factor_is_that_of_the_dense_matrix() -> None:
    diagonal, loadings = noise(30).exp(), noise(30, 4, seed=1)
    expected = torch.diag(diagonal) + loadings @ loadings.mT
    found, x = LowRank.of(diagonal, loadings), noise(30, 5, seed=2)
    torch.testing.assert_close(dense(found), expected)
    torch.testing.assert_close(found.variances(), expected.diagonal())
    torch.testing.assert_close(found.log_determinant(), torch.linalg.slogdet(expected).logabsdet)
    torch.testing.assert_close(found.divide(found.times(x)), x)
    white = found.divide(x)
    torch.testing.assert_close((white * white).sum(0), (x * torch.linalg.solve(expected, x)).sum(0))
    torch.testing.assert_close(dense(found.scaled(3.0)), 3 * expected)
    other = factors(30, 2)
    assert found.relative_change(other) == pytest.approx(relative(dense(other), expected), rel=1e-6)


def test_low_rank_plus_diagonal_is_recovered_exactly() -> None:
    true = dense(factors(60, 4))
    fit = FactorAnalysis(60, 4)
    for _ in range(30):
        fit.step(lambda b: (true.diagonal(), true @ b), torch.sqrt)
    assert relative(torch.diag(fit.diagonal) + fit.loadings @ fit.loadings.mT, true) < 1e-6
    unit = true / true.diagonal().sqrt() / true.diagonal().sqrt()[:, None]
    assert fit.square == pytest.approx(float(unit.square().sum()), rel=0.2)


def test_a_covariance_that_is_low_rank_plus_diagonal_is_found() -> None:
    row, column = factors(80, 3), factors(30, 2, seed=5)
    row = row.scaled(80 / row.variances().sum())
    drawn = samples(row, column, 40)
    rules = FitRules(amount=0.0, max_full_side=50, rank=3, steps=60)
    found, other = flip_flop(lambda: drawn, torch.full((80,), 40.0), 30, rules)
    full, _ = flip_flop(lambda: drawn, torch.full((80,), 40.0), 30, FitRules(amount=0.0))
    assert isinstance(found, LowRank) and isinstance(other, Tensor)
    error = relative(dense(found), dense(row))
    assert error < 0.08
    assert error < relative(dense(full), dense(row)), "fewer parameters than all entries, from the same samples"
    assert relative(other, dense(column)) < 0.08


@pytest.mark.parametrize("amount", [None, 0.1])
@pytest.mark.parametrize("toward", ["diagonal", "identity"])
def test_full_rank_agrees_with_the_full_fit(amount: float | None, toward: str) -> None:
    row, column = factors(24, 3), factors(16, 2, seed=5)
    drawn = samples(row, column, 12)
    counts = torch.full((24,), 12.0)
    rules = FitRules(toward, amount, steps=60, tolerance=1e-9)
    expected = flip_flop(lambda: drawn, counts, 16, rules)
    low = FitRules(toward, amount, 60, 1e-9, max_full_side=4, rank=24)
    found = flip_flop(lambda: drawn, counts, 16, low)
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, LowRank) and relative(dense(one), dense(other)) < 1e-4


def test_draws_have_the_covariance() -> None:
    row, column = factors(12, 3), factors(5, 2, seed=5)
    drawn = torch.stack(samples(row, column, 4000))
    n, v = 4000 * 5, dense(column)
    found = torch.einsum("nij,jk,nlk->il", drawn, torch.linalg.inv(v), drawn) / n
    expected = dense(row)
    error = ((expected**2 + expected.diagonal()[:, None] * expected.diagonal()) / n).sqrt()
    assert ((found - expected).abs() < 4.5 * error).all()


@pytest.mark.parametrize("amount", [None, 0.0, 0.4, 1.0])
def test_few_samples_give_a_positive_definite_covariance(amount: float | None) -> None:
    """One sample of 60 x 5, of which three rows are equal and one is zero."""
    x = samples(factors(60, 3), factors(5, 1, seed=5), 1)[0]
    x[1:3] = x[0]
    x[7] = 0
    rules = FitRules(amount=amount, max_full_side=20, rank=8)
    found, _ = flip_flop(lambda: [x], torch.ones(60), 5, rules)
    values = torch.linalg.eigvalsh(dense(found))
    assert values.min() > 0 and (found.gains >= 1).all() and dense(found).isfinite().all()
    if amount == 1.0:
        torch.testing.assert_close(dense(found), torch.diag(found.variances()))


def log_likelihood(xs: list[Tensor], row: Covariance, column: Covariance) -> float:
    u, v = dense(row), dense(column)
    p, q = len(u), len(v)
    squares = sum(float((torch.linalg.solve(u, x) * torch.linalg.solve(v, x.mT).mT).sum()) for x in xs)
    return -float(len(xs) * (q * torch.logdet(u) + p * torch.logdet(v)) + squares) / 2


@pytest.mark.parametrize("full_side", [10, 25])
def test_no_step_lowers_the_likelihood(full_side: int) -> None:
    """With both sides of low rank, and with one."""
    xs = samples(factors(40, 6), factors(20, 4, seed=5), 6)
    found = []
    for steps in range(1, 9):
        rules = FitRules(amount=0.0, steps=steps, tolerance=0.0, max_full_side=full_side, rank=4)
        found.append(log_likelihood(xs, *flip_flop(lambda: xs, torch.full((40,), 6.0), 20, rules)))
    assert all(after >= before - 1e-6 * abs(before) for before, after in pairwise(found)), found
    assert found[-1] > found[0]


def test_variances_are_exactly_those_of_the_samples() -> None:
    x = noise(200, 30) @ torch.linalg.cholesky(dense(factors(30, 3))).mT
    gram = x.mT @ x / 200
    fit = FactorAnalysis(30, 3)
    for _ in range(3):
        fit.step(lambda b: (gram.diagonal(), gram @ b), torch.sqrt)
    found = fit.shrunk(gram.diagonal().sqrt(), 0.0)
    torch.testing.assert_close(found.variances(), gram.diagonal(), rtol=1e-6, atol=0)


def test_a_long_side_is_not_diagonal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neurons of two kinds in a module whose sides are all longer than the limit: draws keep the correlation of their
    rows, and a saved sampler draws the same."""
    monkeypatch.setattr(matrix_normal, "FitRules", partial(FitRules, max_full_side=16, rank=4))
    layers = {str(seed): nn.Linear(40, 30, bias=False) for seed in range(12)}
    for seed, layer in layers.items():
        shared = noise(1, 40, seed=int(seed)).float() * torch.tensor([1.0, -1.0]).repeat(15)[:, None]
        layer.weight.data = shared + 0.3 * noise(30, 40, seed=100 + int(seed)).float()
    blueprint = Blueprint.from_module(nn.Linear(40, 30, bias=False))
    sampler = MatrixNormal(mean="zero").fit(zoo_of(layers), blueprint)
    assert {tuple(t.shape) for t in sampler.state()[1].values()} == {(30,), (40,), (30, 4), (40, 4), (4,)}
    drawn = dict(sampler.sample(blueprint, 1))["weight"]
    correlation = torch.corrcoef(drawn)
    assert (correlation[0, 2::2] > 0.7).all() and (correlation[0, 1::2] < -0.7).all()
    sampler.save(tmp_path / "fitted")
    again = dict(MatrixNormal.load(tmp_path / "fitted").sample(blueprint, 1))["weight"]
    assert torch.equal(drawn, again)


def test_a_decoder_with_long_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_normal, "FitRules", partial(FitRules, max_full_side=16, rank=4))
    monkeypatch.setattr(matrix_normal, "LARGE_BLOCK", 1)  # products in float32
    zoo = make_zoo(tmp_path)
    blueprint = Blueprint.from_pretrained_config(config(hidden_size=32, kv=4))
    sampler = MatrixNormal(mean="zero").fit(zoo, blueprint)
    kinds = {name.split("/")[1] for name in sampler.state()[1] if name.endswith("/axes")}
    assert kinds >= {"neuron", "qk", "vo"}
    drawn = dict(sampler.sample(blueprint, 0))
    assert set(drawn) == set(blueprint.names)
    donor = zoo.donors[0]
    for name, tensor in drawn.items():
        if tensor.ndim == 2 and name in donor.blueprint and donor.blueprint[name].shape == tensor.shape:
            assert 0.3 < tensor.std() / donor.read(name).float().std() < 3, name
