"""fit_power_law against the package `powerlaw`, and against laws whose exponent is known."""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
import pytest

from zoo.errors import UserError
from zoo.statistics.power_law import fit_power_law


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
