"""Tests of single matrices for noise: laws under the null, for any law of the entries, and power."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from zoo.statistics.noise import edge_excess, kurtosis, normal_scores, unevenness_p_value

LAWS = {
    "normal": scipy.stats.norm(),
    "uniform": scipy.stats.uniform(-1, 2),
    "heavy": scipy.stats.t(2.5),
    "lopsided": scipy.stats.expon(),
}


@pytest.mark.parametrize("law", sorted(LAWS))
def test_noise_of_any_distribution_is_even(law: str) -> None:
    rng = np.random.default_rng(0)
    drawn = [torch.tensor(LAWS[law].rvs((40, 24), random_state=rng)) for _ in range(150)]
    p = [unevenness_p_value(matrix) for matrix in drawn] + [unevenness_p_value(matrix.mT) for matrix in drawn]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
    # Tracy-Widom's law for real matrices has mean -1.21; one matrix in a thousand has more than 3.3.
    beyond = np.array([edge_excess(normal_scores(matrix)) for matrix in drawn])
    assert abs(beyond.mean() + 1.21) < 0.5 and beyond.max() < 4


def test_ties_do_not_make_noise_look_structured() -> None:
    """Half of the entries zero, the others of two values: ranks that depend on the place would be structure."""
    draws = torch.rand(96, 96, generator=torch.Generator().manual_seed(0))
    matrix = torch.where(draws < 0.5, 0.0, torch.where(draws < 0.8, 1.0, -2.0)).double()
    scores = normal_scores(matrix)
    assert all(len(scores[matrix == v].unique()) == 1 for v in (0.0, 1.0, -2.0))
    assert edge_excess(scores) < 4 and min(unevenness_p_value(matrix), unevenness_p_value(matrix.mT)) > 1e-3


def test_normal_scores_are_quantiles_of_ranks() -> None:
    values = torch.tensor([[3.0, -1.0, 100.0], [0.5, 0.5, -7.0]])
    ranks = scipy.stats.rankdata(values.numpy().ravel())
    wanted = scipy.stats.norm.ppf(ranks / 7)
    assert normal_scores(values).flatten().numpy() == pytest.approx(wanted / wanted.std())


def test_structure_is_seen_through_heavy_tails() -> None:
    noise = torch.tensor(scipy.stats.t(2.5).rvs((64, 64), random_state=1))
    louder = noise * torch.linspace(0.5, 2, 64)[:, None].double()
    assert unevenness_p_value(louder) < 1e-8 < unevenness_p_value(louder.mT)
    direction = torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (
        edge_excess(normal_scores(noise + 0.5 * direction @ direction.flip(0).mT))
        > 8
        > edge_excess(normal_scores(noise))
    )


def test_kurtosis_is_scipys() -> None:
    values = torch.randn(50, 7, dtype=torch.float64) ** 3 + 2
    assert kurtosis(values) == pytest.approx(scipy.stats.kurtosis(values.numpy().ravel(), fisher=False))
