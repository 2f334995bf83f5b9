"""fit_power_law against the package `powerlaw`, and against laws whose exponent is known."""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
import pytest

from zoo.errors import UserError
from zoo.statistics.power_law import ALPHA_BOUNDS, are_farther, fit_best_xmin, fit_power_law


def reference(values):
    """(alpha, xmin, D, number of values in the tail) by `powerlaw`, with its cap of alpha lifted."""
    import powerlaw

    with warnings.catch_warnings(), np.errstate(all="ignore"), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        fit = powerlaw.Fit(values, parameter_ranges={"alpha": [1.01, 20]}, verbose=0)
    return fit.alpha, fit.xmin, fit.D, int(fit.n_tail)


def pareto(n, alpha, xmin=1.0, seed=0):
    return xmin * np.random.default_rng(seed).random(n) ** (-1 / (alpha - 1))


def samples():
    rng = np.random.default_rng(7)
    weights = rng.standard_t(3, (96, 64))
    return {
        "pareto": pareto(400, 2.5),
        "tiny": 1e-9 * pareto(300, 1.7, seed=1),
        "steep": pareto(200, 6.0, seed=2),
        "tail": np.concatenate([rng.uniform(0, 3, 200), pareto(300, 2.2, 3.0, seed=3)]),
        "lognormal": rng.lognormal(0, 1, 300),
        "half-normal": np.abs(rng.normal(size=300)),
        "ties": np.round(pareto(400, 2.5, seed=4), 1),
        "zeros": np.concatenate([np.zeros(20), pareto(200, 3.0, seed=5)]),
        "eigenvalues": np.linalg.svd(weights, compute_uv=False) ** 2,
    }


@pytest.mark.parametrize("name", sorted(samples()))
def test_alpha_equals_that_of_powerlaw(name):
    values = samples()[name]
    alpha, xmin, distance, tail = reference(values)
    ours = fit_power_law(values)
    assert ours.alpha == pytest.approx(alpha, abs=1e-3)
    assert ours.xmin == pytest.approx(xmin, rel=1e-9)
    assert ours.distance == pytest.approx(distance, abs=1e-3)
    assert ours.tail == tail


@pytest.mark.parametrize("alpha", [1.5, 2.0, 2.5, 3.5, 5.0])
def test_alpha_within_three_standard_errors(alpha):
    for seed in range(5):
        fit = fit_power_law(pareto(2000, alpha, 0.01, seed))
        assert abs(fit.alpha - alpha) < 3 * (alpha - 1) / np.sqrt(fit.tail)


def test_finds_where_the_tail_begins():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.uniform(0, 5, 1000), pareto(1000, 2.5, 5.0)])
    fit = fit_power_law(values)
    assert 4 < fit.xmin < 7
    assert fit.tail == (values >= fit.xmin).sum()


def test_fewer_candidates_find_nearly_the_same():
    values = pareto(3000, 2.5)
    whole, some = fit_power_law(values), fit_power_law(values, candidates=100)
    assert some.alpha == pytest.approx(whole.alpha, abs=0.1)
    assert whole.distance <= some.distance < 1.2 * whole.distance


def test_scale_only_moves_xmin():
    values = pareto(500, 2.3)
    one, other = fit_power_law(values), fit_power_law(1e-6 * values)
    assert other.alpha == pytest.approx(one.alpha, rel=1e-9)
    assert other.xmin == pytest.approx(1e-6 * one.xmin, rel=1e-9)


def test_refuses_what_says_nothing():
    with pytest.raises(UserError, match="9 distinct positive values"):
        fit_power_law([0.0, -1.0, *range(1, 10), 9, 9, 9])
    with pytest.raises(UserError, match="NaN"):
        fit_power_law([*range(1, 20), float("nan")])


def every_distance(logs, weights, two_sided):
    """alpha and Kolmogorov-Smirnov distance [n - 2] of one sample above each of its values, from their definition."""
    alphas, distances = [], []
    for start in range(len(logs) - 2):
        x, w = logs[start:] - logs[start], weights[start:]
        alphas.append(1 + w.sum() / (w * x).sum())
        below = (w.cumsum() - w) / w.sum()
        law = 1 - np.exp(-(alphas[-1] - 1) * x)
        gaps = [np.abs(law - below), np.abs(law - below - w / w.sum())]
        distances.append(max(gap.max() for gap in gaps[: 1 + two_sided]))
    return np.array(alphas), np.array(distances)


@pytest.mark.parametrize("two_sided", [False, True])
def test_the_candidates_that_are_left_out_are_not_the_best(two_sided):
    """Many samples at once: shared or own values, equal weights or not, laws outside the bounds of alpha."""
    rng = np.random.default_rng(3)
    for n, scale in ((12, 1.0), (150, 1.0), (150, 30.0), (90, 1e-3)):
        own = np.sort(rng.exponential(scale, (8, n)), axis=1)
        for logs, weights in ((own, np.ones((8, n))), (own[:1], rng.exponential(size=(8, n)))):
            alphas, distances, starts = fit_best_xmin(logs, weights, two_sided=two_sided)
            for i in range(8):
                a, d = every_distance(logs[i % len(logs)], weights[i], two_sided)
                usable = (a > ALPHA_BOUNDS[0]) & (a < ALPHA_BOUNDS[1])
                best = np.where(usable | ~usable.any(), d, np.inf).argmin()
                assert starts[i] == best and distances[i] == pytest.approx(d[best], rel=1e-9)
                assert alphas[i] == pytest.approx(a[best], rel=1e-9)
            if two_sided:
                for limit in np.quantile(distances, [0.2, 0.5, 0.8]):
                    assert (are_farther(logs, weights, None, limit) == (distances >= limit)).all()
