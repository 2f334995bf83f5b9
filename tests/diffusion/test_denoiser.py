"""The denoiser against integrals and loops."""

from __future__ import annotations

import torch

from diffusion.conditions import FEATURES
from diffusion.denoiser import CONTEXT, Candidates, UnitDenoiser, mask_to_group, mixture_velocity
from diffusion.pipeline import make_scheduler

CENTRES = torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64)
PRIOR = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
WIDTH = 0.3


def test_the_mixtures_velocity_is_the_posterior_mean() -> None:
    """E[noise - token | x] by numerical integration over the token, for a mixture on a line."""
    grid = torch.linspace(-6, 8, 200_001, dtype=torch.float64)
    density = (PRIOR * torch.exp(-0.5 * ((grid[:, None] - CENTRES[:, 0]) / WIDTH) ** 2)).sum(1)
    for sigma in (0.05, 0.4, 0.9):
        for x in (-1.0, 0.2, 1.1):
            noise = (x - (1 - sigma) * grid) / sigma
            weight = density * torch.exp(-0.5 * noise**2)
            expected = ((noise - grid) * weight).sum() / weight.sum()
            given = torch.tensor([[x]], dtype=torch.float64), torch.tensor([sigma], dtype=torch.float64)
            found = mixture_velocity(*given, CENTRES, PRIOR.log()[None], WIDTH)
            assert torch.allclose(found.squeeze(), expected, atol=1e-6)
            per_unit = mixture_velocity(*given, CENTRES[None], PRIOR.log()[None], WIDTH)
            assert torch.allclose(per_unit, found)


def test_the_solver_draws_from_the_mixture() -> None:
    """Weights, centres and deviation of what comes out, where first-order solvers would shrink it."""
    solver = make_scheduler()
    solver.set_timesteps(20)
    x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in solver.timesteps:
        sigma = torch.full((len(x),), float(t) / 1000, dtype=torch.float64)
        x = solver.step(mixture_velocity(x, sigma, CENTRES, PRIOR.log().expand(len(x), -1), WIDTH), t, x).prev_sample
    mean = (PRIOR * CENTRES[:, 0]).sum()
    deviation = ((PRIOR * (CENTRES[:, 0] ** 2 + WIDTH**2)).sum() - mean**2).sqrt()
    assert abs(float(x.mean() - mean)) < 0.05
    assert abs(float(x.std() / deviation) - 1) < 0.03
    near = (x - CENTRES[:, 0]).abs().argmin(1)
    assert torch.allclose(torch.bincount(near).double() / len(x), PRIOR, atol=0.03)


def test_tokens_are_masked_to_those_with_the_same_string() -> None:
    log_prior, strings = torch.randn(4, 6), torch.tensor([0, 1, 2, 1, 0, 3])
    found = mask_to_group(log_prior, torch.tensor([1, -1, 3, 0]), strings)
    assert torch.equal(
        found.isfinite(), torch.tensor([[0, 1, 0, 1, 0, 0], [1] * 6, [0] * 5 + [1], [1, 0, 0, 0, 1, 0]]).bool()
    )
    assert torch.equal(found[found.isfinite()], log_prior[found.isfinite()])


def tiny(bandwidth: float | None) -> UnitDenoiser:
    torch.manual_seed(0)
    return UnitDenoiser({"neuron": 6, "vocab": 5, "qk": 4, "vo": 3, CONTEXT: 2}, ["llama"], 16, 1, bandwidth=bandwidth)


def test_the_network_starts_at_zero_and_units_are_independent() -> None:
    features, family = torch.randn(5, FEATURES), torch.ones(5, dtype=torch.int64)
    x, sigma, context = torch.randn(5, 6), torch.rand(5), torch.randn(5, 2)
    plain = tiny(None)
    condition = plain.condition_embedding("neuron", features, family, context, None)
    assert not plain("neuron", x, sigma, condition).any()
    mixed = tiny(0.2)
    tokens, log_prior = torch.randn(7, 6), torch.randn(5, 7)
    whole = mixed("neuron", x, sigma, condition, Candidates(tokens, log_prior))
    assert torch.allclose(whole, mixture_velocity(x, sigma, tokens, log_prior, 0.2))
    with torch.no_grad():
        for p in mixed.parameters():
            p.add_(0.1 * torch.randn_like(p))
    whole = mixed("neuron", x, sigma, condition, Candidates(tokens, log_prior))
    rows = [slice(i, i + 1) for i in range(5)]
    alone = [mixed("neuron", x[r], sigma[r], condition[r], Candidates(tokens, log_prior[r])) for r in rows]
    assert torch.allclose(whole, torch.cat(alone), atol=1e-5)


def test_a_dropped_condition_has_no_influence() -> None:
    model = tiny(None)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x, sigma = torch.randn(4, 6), torch.rand(4)
    one, other = torch.randn(4, 16), torch.randn(4, 16)
    none, all_ = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    assert torch.equal(
        model("neuron", x, sigma, one, conditional=none), model("neuron", x, sigma, other, conditional=none)
    )
    assert not torch.equal(
        model("neuron", x, sigma, one, conditional=all_), model("neuron", x, sigma, other, conditional=all_)
    )


def test_a_zero_partner_equals_no_partner() -> None:
    model, features, family = tiny(None), torch.randn(3, FEATURES), torch.ones(3, dtype=torch.int64)
    without = model.condition_embedding("qk", features, family, torch.zeros(3, 2), None)
    assert torch.equal(model.condition_embedding("qk", features, family, torch.zeros(3, 2), torch.zeros(3, 4)), without)
    assert not torch.equal(
        model.condition_embedding("qk", features, family, torch.zeros(3, 2), torch.ones(3, 4)), without
    )
