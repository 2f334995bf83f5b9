"""The protocol for power laws: its level with and without shared layers, its power, and its parts."""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from zoo.statistics.goodness import (
    DistanceSample,
    assess_power_law,
    effective_sample_size,
    likelihood_ratios,
    variance_over_layers,
    verdict,
)
from zoo.statistics.power_law import fit_power_law
from zoo.statistics.similarity import layer_distances
from zoo.statistics.tails import ALTERNATIVES

SQUARE = {L: np.array([(i, j) for i in range(L) for j in range(L)]) for L in (12, 16, 30, 50)}


def independent(values, layers):
    return DistanceSample.from_unsorted(values, SQUARE[layers])


def shared(layers, seed, jitter=0.05):
    """Distances of two stacks of vectors in the plane, those of the second all but the same: a true power law (alpha
    1.8), whose n = layers² values are only `layers` different ones."""
    rng = np.random.default_rng(seed)
    distance = 1e-6 * rng.random(layers) ** -1.25
    angle, near = np.arccos(1 - distance), jitter * np.sqrt(2e-6) * rng.normal(size=layers)
    a, b = (torch.tensor(np.stack([np.cos(t), np.sin(t)], 1)) for t in (angle, near))
    return DistanceSample.from_unsorted(*layer_distances(a, b))


def test_level_holds_where_distances_share_vectors_and_pairs_as_independent_do_not():
    found = [assess_power_law(shared(16, seed), 60, np.random.default_rng(seed)) for seed in range(30)]
    assert np.mean([f["p"] <= 0.1 for f in found]) <= 0.15
    assert np.mean([f["p_pairs"] <= 0.1 for f in found]) >= 0.8
    better = {k: [f["ratios"][k]["R"] < 0 and f["ratios"][k]["p"] < 0.05 for f in found] for k in ALTERNATIVES}
    assert max(map(np.mean, better.values())) <= 0.15


def test_level_holds_where_nothing_is_shared():
    found = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        found.append(assess_power_law(independent(1e-3 * rng.random(144) ** -1.25, 12), 60, rng))
    for p in ("p", "p_pairs"):
        values = np.array([f[p] for f in found])
        assert (values <= 0.1).mean() <= 0.2
        assert 0.4 < values.mean() < 0.75
    inside = [f["alpha_ci95"][0] <= 1.8 <= f["alpha_ci95"][1] for f in found]
    assert np.mean(inside) >= 0.85


@pytest.mark.parametrize("law", ["lognormal", "exponential", "half-normal", "normal"])
def test_other_distributions_are_not_power_laws(law):
    """Rejected, beaten by a likelihood ratio, or at least not called a power law."""
    verdicts = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        draw = {
            "lognormal": lambda: rng.lognormal(0, 1, 2500),  # noqa: B023
            "exponential": lambda: rng.exponential(1, 2500),  # noqa: B023
            "half-normal": lambda: np.abs(rng.normal(size=2500)),  # noqa: B023
            "normal": lambda: rng.normal(5, 1, 2500),  # noqa: B023
        }
        verdicts.append(assess_power_law(independent(draw[law](), 50), 40, rng)["verdict"])
    assert "power law" not in verdicts
    assert verdicts.count("not a power law") >= 2


def test_a_true_power_law_is_recognised():
    rng = np.random.default_rng(3)
    found = assess_power_law(independent(1e-3 * rng.random(900) ** -1.25, 30), 40, rng)
    assert found["verdict"] == "power law"
    assert found["alpha"] == pytest.approx(1.8, abs=0.15)


def test_variance_over_layers_is_that_of_the_means_of_one_side_where_it_alone_decides():
    pairs = SQUARE[12]
    heights = np.random.default_rng(0).normal(size=12)
    terms = (heights - heights.mean())[pairs[:, :1]]
    of_a_mean = heights.var(ddof=1) / 12
    assert variance_over_layers(terms, pairs) / 144**2 == pytest.approx(of_a_mean - (terms**2).mean() / 144)


def test_worth_tells_layers_from_pairs():
    rng = np.random.default_rng(0)
    assert effective_sample_size(independent(rng.random(900), 30).pairs) > 700
    assert 25 < effective_sample_size(shared(30, 0, jitter=0.001).pairs) < 40


def test_likelihood_ratios_are_those_of_powerlaw():
    import powerlaw

    values = 1 + np.random.default_rng(1).exponential(1, 400)
    law = fit_power_law(values)
    ours = likelihood_ratios(DistanceSample.from_unsorted(values, np.arange(800).reshape(400, 2)), law.alpha, law.xmin)
    with warnings.catch_warnings(), np.errstate(all="ignore"), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        theirs = powerlaw.Fit(values / law.xmin, xmin=1.0, parameter_ranges={"alpha": [1.01, 20]}, verbose=0)
        for name in ("lognormal", "exponential"):
            ratio, p = theirs.distribution_compare("power_law", name)
            assert ours[name]["R"] == pytest.approx(ratio, abs=0.02)
            assert ours[name]["p_pairs"] == pytest.approx(p, abs=0.02)
            # 400 pairs of 800 layers share nothing: the layers' p is that of the pairs.
            assert ours[name]["p"] == pytest.approx(p, abs=0.05)


def tails():
    rng = np.random.default_rng(2)
    return {
        "power law": rng.random(300) ** -0.8,
        "exponential": 1 + rng.exponential(1, 300),
        "normal": 1 + np.abs(0.3 * rng.normal(size=300)),
        "hump": stats.truncnorm.rvs(-2, np.inf, 5, 2, size=300, random_state=3),
    }


@pytest.mark.parametrize("name", sorted(tails()))
def test_alternatives_are_densities_of_greatest_likelihood(name):
    x = tails()[name]
    total = {law: f(x).sum() for law, f in ALTERNATIVES.items()}
    for law in ("lognormal", "truncated_power_law"):
        assert total[law] >= (np.log(1 / np.log(x).mean()) - (1 + 1 / np.log(x).mean()) * np.log(x)).sum() - 1e-2, law
    for law in ("normal", "truncated_power_law"):
        assert total[law] >= total["exponential"] - 1e-2, law
    mean, deviation = x.mean(), x.std()
    for shift in (-2.0, -0.5, 0.0, 0.5):
        mu = mean + shift * deviation
        other = stats.norm.logpdf(x, mu, deviation) - stats.norm.logsf(1, mu, deviation)
        assert total["normal"] >= other.sum() - 1e-2


@pytest.mark.parametrize("law", sorted(ALTERNATIVES))
def test_alternatives_integrate_to_one(law):
    """By the trapezoidal rule over the points themselves, which are the quantiles of an exponential."""
    x = 1 - np.log1p(-(np.arange(200000) + 0.5) / 200000)
    density = np.exp(ALTERNATIVES[law](x))
    assert integrate.trapezoid(density, x) == pytest.approx(1, abs=2e-3)


def test_verdict_says_why():
    fits = {name: {"R": 1.0, "p": 0.5, "p_pairs": 0.5} for name in ALTERNATIVES}
    found = {"p": 0.5, "ratios": fits, "tail": 400}
    assert verdict(found, 900)[0] == "power law"
    assert verdict(found | {"p": 0.1}, 900)[0] == "not a power law"
    assert verdict(found | {"tail": 40}, 100)[0] == "undecided"
    assert verdict(found | {"tail": 100}, 900)[0] == "undecided"
    lognormal = {"ratios": fits | {"lognormal": {"R": -9.0, "p": 0.01, "p_pairs": 0.0}}}
    assert verdict(found | lognormal, 900) == ("not a power law", "a lognormal law fits better (R = -9.0, p = 0.04)")
    exponential = {"ratios": fits | {"exponential": {"R": -9.0, "p": 0.01, "p_pairs": 0.0}}}
    assert verdict(found | exponential, 900)[1].startswith("an exponential law fits better")
    weak = {"ratios": fits | {"lognormal": {"R": -9.0, "p": 0.02, "p_pairs": 0.0}}}  # four laws were compared
    assert verdict(found | weak, 900)[0] == "power law"
