"""The generator of 2509.00046 against its laws in closed form and the figures reported for it."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from baselines.lora.pareto_generator import (
    LEAST_SHARE,
    TEMPLATES,
    gaussian_counts,
    gaussian_process_template,
    kaiming_std,
    normal_template,
    pareto_counts,
    perturb,
    to_matrix,
)
from zoo.statistics.power_law import fit_power_law

D, MEMBERS, SEEDS = 1536, 300, 8


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def family(kind: str, seed: int, mode: str = "replace", strength: float = 1.0, template: str = "normal") -> Tensor:
    """[1 + MEMBERS, D]: a template and members of it."""
    generator = rng(seed)
    counts = {"pareto": pareto_counts, "gaussian": gaussian_counts}[kind](MEMBERS, D, generator)
    t = TEMPLATES[template](D, generator)
    return torch.stack([t, *(perturb(t, int(n), generator, mode, std=strength) for n in counts)])


def distances(arrays: Tensor) -> Tensor:
    """1 - cos of every two rows."""
    unit = torch.nn.functional.normalize(arrays.double(), dim=1)
    first, second = torch.triu_indices(len(unit), len(unit), 1)
    found = 1 - (unit @ unit.mT)[first, second]
    return found[found > 1e-12]


def mean_skewness(samples: list[Tensor]) -> float:
    return sum(float(stats.skew(s.numpy())) for s in samples) / len(samples)


@pytest.mark.parametrize(("mode", "strength"), [("replace", 1.0), ("add", 0.1)])
def test_pareto_counts_give_distances_between_members_a_power_law(mode: str, strength: float) -> None:
    samples = [distances(family("pareto", seed, mode, strength)[1:]) for seed in range(SEEDS)]
    alphas = [fit_power_law(s.numpy(), candidates=100).alpha for s in samples]
    assert 4.2 < mean_skewness(samples) < 4.7
    assert 1.7 < sum(alphas) / SEEDS < 2.1


def test_gaussian_counts_do_not() -> None:
    """No skewness where the distance is in proportion to p + q, and from the template, where it is p; with entries
    replaced it is p + q - p q, whose third cumulant is that of the product."""
    added = [distances(family("gaussian", seed, "add", 0.1)[1:]) for seed in range(SEEDS)]
    assert abs(mean_skewness(added)) < 0.1
    families = [family("gaussian", seed) for seed in range(SEEDS)]
    unit = [torch.nn.functional.normalize(f.double(), dim=1) for f in families]
    assert abs(mean_skewness([1 - u[1:] @ u[0] for u in unit])) < 0.1
    s = 1 / 4  # p and q have mean 1/2 and deviation 1/8: 1 - p = (1 + s z) / 2
    expected = -6 * s**4 / (2 * s**2 + s**4) ** 1.5
    assert mean_skewness([distances(f[1:]) for f in families]) == pytest.approx(expected, abs=0.1)
    alphas = [fit_power_law(s.numpy(), candidates=100).alpha for s in added]
    assert min(alphas) > 5


def test_distances_are_the_shares_that_were_replaced() -> None:
    size, p, q = 200_000, 0.3, 0.6
    t = normal_template(size, rng(0), mean=0.0, std=3.0)
    a, b = (perturb(t, int(share * size), rng(seed), std=3.0) for seed, share in ((1, p), (2, q)))
    cos = torch.nn.functional.cosine_similarity
    assert 1 - float(cos(t, a, dim=0)) == pytest.approx(p, abs=0.01)
    assert 1 - float(cos(a, b, dim=0)) == pytest.approx(p + q - p * q, abs=0.01)
    assert int((a != t).sum()) == int(p * size)
    added = perturb(t, size // 2, rng(3), mode="add", std=0.5)
    assert int((added != t).sum()) == size // 2
    assert float((added - t).norm()) == pytest.approx(0.5 * math.sqrt(size / 2), rel=0.01)
    assert torch.equal(perturb(t, 0, rng(0)), t)


def test_counts_follow_their_distributions() -> None:
    size, least, b = 10**9, 10_000.0, 0.78
    counts = pareto_counts(20_000, size, rng(0), least, b).double()
    inside = counts[counts < size]
    edge = (least / size) ** b  # the share that is clipped
    assert float((counts == size).double().mean()) == pytest.approx(edge, abs=4 * math.sqrt(edge / 20_000))
    law = stats.kstest(inside.numpy(), lambda x: (1 - (least / x) ** b) / (1 - edge))
    assert law.pvalue > 0.01
    assert fit_power_law(counts.numpy(), candidates=100).alpha == pytest.approx(1 + b, abs=0.05)

    few = pareto_counts(20_000, 1000, rng(0))
    assert few.dtype == torch.int64
    assert few.min() == math.floor(LEAST_SHARE * 1000) and few.max() == 1000
    assert pareto_counts(1000, 5, rng(0)).min() == 1
    bell = gaussian_counts(20_000, 8000, rng(0)).double()
    assert stats.kstest(bell.numpy(), stats.norm(4000, 1000).cdf).pvalue > 0.01
    tiny = gaussian_counts(20_000, 3, rng(0))
    assert tiny.min() == 0 and tiny.max() == 3


@pytest.mark.parametrize("length", [1.0, 7.5])
def test_the_gaussian_process_has_the_rbf_kernel(length: float) -> None:
    draws = torch.stack([gaussian_process_template(40, rng(seed), 2.0, 0.5, length) for seed in range(4000)]).double()
    d = torch.arange(40.0, dtype=torch.float64)
    kernel = 0.25 * torch.exp(-0.5 * ((d[:, None] - d) / length) ** 2)
    assert (draws.mean(0) - 2.0).abs().max() < 5 * 0.5 / math.sqrt(4000)
    assert (draws.mT.cov() - kernel).abs().max() < 5 * 0.25 * math.sqrt(2 / 4000)
    assert draws.std() == pytest.approx(0.5, rel=0.05)


def test_matrices_are_filled_row_by_row_to_the_deviation_asked_for() -> None:
    values = normal_template(6 * 32, rng(0), mean=5.0, std=0.1)
    matrix = to_matrix(values, 6, 32, 0.25)
    assert matrix.dtype == torch.float32 and matrix.shape == (6, 32)
    assert float(matrix.std(correction=0)) == pytest.approx(0.25, rel=1e-6)
    assert abs(float(matrix.mean())) < 1e-7
    assert torch.equal(matrix.argsort(dim=1), values.reshape(6, 32).argsort(dim=1))


def test_kaiming_std_is_that_of_pefts_own_a() -> None:
    a = torch.nn.Linear(576, 4096, bias=False)
    torch.manual_seed(0)
    torch.nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
    assert float(a.weight.detach().std()) == pytest.approx(kaiming_std(576), rel=0.002)
