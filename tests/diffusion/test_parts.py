"""The parts of the diffusion: text features, conditions, the denoiser, the solver."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from autoencoder.field import Latents
from diffusion.conditions import (
    GROUPS,
    REACH,
    SHAPE_NAMES,
    SIZE,
    Wanted,
    condition_values,
    fit_scales,
    scaled,
    vocabulary_features,
)
from diffusion.denoiser import LatentDenoiser
from diffusion.solving import latent_noise, make_scheduler, scaled_latents, solve, unscaled, velocity
from tests.support.tiny import config
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.training.corpora import library_source, python_reference
from zoo.training.text_features import SIZE as TEXT_SIZE
from zoo.training.text_features import text_features


def shape_of(**changes: Any) -> Metadata:
    found = Blueprint.from_pretrained_config(config(28, 2, layers=3)).metadata
    assert found is not None
    return replace(found, **changes)


def test_pieces_of_one_text_are_nearer_than_pieces_of_another() -> None:
    texts = (python_reference(), library_source())
    size = 100_000
    places = (0.0, 0.5, 1.0)
    starts = [[round(place * (len(text) - size)) for place in places] for text in texts]
    features = [[text_features(t[at : at + size]) for at in found] for t, found in zip(texts, starts, strict=True)]
    same = [float((a - b).norm()) for group in features for i, a in enumerate(group) for b in group[:i]]
    other = [float((a - b).norm()) for a in features[0] for b in features[1]]
    assert sum(same) / len(same) < 0.7 * sum(other) / len(other)


def test_features_of_a_text() -> None:
    short, long = b"ab" * 10, b"some words, " * 50_000
    for text in (b"", b"a", b"ab", short, long):
        found = text_features(text)
        assert found.shape == (TEXT_SIZE,) and found.dtype == torch.float32 and found.isfinite().all()
        assert bool(found.any()) == (len(text) >= 2)
        assert torch.equal(found, text_features(text))
    assert torch.equal(text_features(long), text_features(long[:200_000]))  # as much as is read
    assert (text_features(long) - text_features(long[:20_000])).norm() < 0.02  # the length does not matter
    assert vocabulary_features(["a", "b"]).equal(vocabulary_features(["b", "a"]))


def test_a_condition_has_the_sizes_then_quality_then_text_then_vocabulary() -> None:
    values = condition_values(Wanted(shape_of(width=64, layers=8, rope_theta=1e4, tied=True), excess=0.5))
    assert values.shape == (SIZE,) and sum(GROUPS.values()) == SIZE
    named = dict(zip(SHAPE_NAMES, values[: len(SHAPE_NAMES)].tolist(), strict=True))
    assert (named["width"], named["layers"], named["tied"], named["rope_theta"]) == (6.0, 3.0, 1.0, 4.0)
    assert float(values[len(SHAPE_NAMES)]) == 0.5 and values[len(SHAPE_NAMES) + 1 :].isnan().all()
    text = torch.arange(TEXT_SIZE).float()
    filled = condition_values(Wanted(shape_of(), text=text, vocabulary=-text))
    assert torch.equal(filled[-2 * TEXT_SIZE : -TEXT_SIZE], text) and torch.equal(filled[-TEXT_SIZE:], -text)


def test_scales_ignore_what_is_unknown_and_what_is_constant() -> None:
    nan = float("nan")
    values = torch.full((3, SIZE), nan)
    values[:, :4] = torch.tensor([[1.0, 7.0, nan, 2.0], [3.0, 7.0, 4.0, nan], [5.0, 7.0, 8.0, nan]])
    mean, inverse = (found[:4] for found in fit_scales(values, ["a", "a", "b"]))
    assert mean.tolist() == [3.0, 7.0, 6.0, 2.0]
    assert inverse.tolist() == pytest.approx([(3 / 8) ** 0.5, 0.0, 0.5, 0.0])
    found = scaled(torch.tensor([5.0, 99.0, nan, 99.0]), mean, inverse)
    assert found.tolist() == pytest.approx([2 * (3 / 8) ** 0.5, 0, 0, 0])
    assert scaled(torch.tensor([1e6, 0.0, -1e6, 0.0]), mean, inverse).tolist() == [REACH, 0, -REACH, 0]


def test_texts_are_scaled_by_how_far_different_ones_lie_apart() -> None:
    rng = torch.Generator().manual_seed(0)
    excerpts = torch.randn(6, TEXT_SIZE, generator=rng)
    values = torch.stack([condition_values(Wanted(shape_of(), text=x)) for x in excerpts])
    columns = slice(SIZE - 2 * TEXT_SIZE, SIZE - TEXT_SIZE)
    _, one = fit_scales(values, ["a"] * 6)
    assert not one[columns].any()  # excerpts of one text differ too, which means nothing
    _, two = fit_scales(values, ["a", "a", "a", "b", "b", "b"])
    apart = torch.stack([excerpts[:3].mean(0), excerpts[3:].mean(0)]).std(0, correction=0).square().mean().sqrt()
    assert torch.allclose(two[columns], (1 / apart).expand(TEXT_SIZE)) and not two[-TEXT_SIZE:].any()


def shaken_denoiser() -> LatentDenoiser:
    """A denoiser whose outputs are not zero, as after training."""
    torch.manual_seed(0)
    model = LatentDenoiser(4, 6, hidden=32, layers=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_a_number_that_is_constant_in_the_zoo_has_no_effect() -> None:
    model = shaken_denoiser()
    values = torch.stack([condition_values(Wanted(shape_of(width=w), excess=x)) for w, x in ((16, 0.0), (64, 0.2))])
    for name, found in zip(("mean", "inverse"), fit_scales(values, ["", ""]), strict=True):
        model.get_buffer(name).copy_(found)
    wanted = Wanted(shape_of(width=32), excess=0.1)
    with torch.no_grad():
        own = model.embed(condition_values(wanted)[None])
        for other in (
            replace(wanted, shape=shape_of(width=32, layers=9, tied=True)),
            replace(wanted, text=text_features(b"a text that no donor of this zoo has")),
            replace(wanted, vocabulary=vocabulary_features(["a"])),
        ):
            assert torch.equal(model.embed(condition_values(other)[None]), own)
        for other in (replace(wanted, shape=shape_of(width=40)), replace(wanted, excess=0.2)):
            assert (model.embed(condition_values(other)[None]) - own).norm() > 1e-3


def test_the_denoiser_starts_at_zero_and_models_are_independent() -> None:
    rng = torch.Generator().manual_seed(0)
    model, blocks = torch.randn(3, 4, generator=rng), torch.randn(3, 5, 6, generator=rng)
    sigma, condition = torch.rand(3, generator=rng), torch.randn(3, 32, generator=rng)
    fresh = LatentDenoiser(4, 6, hidden=32, layers=2)
    assert not any(found.any() for found in fresh(model, blocks, sigma, condition))
    shaken = shaken_denoiser()
    with torch.no_grad():
        whole = shaken(model, blocks, sigma, condition)
        for i in range(3):
            alone = shaken(model[i : i + 1], blocks[i : i + 1], sigma[i : i + 1], condition[i : i + 1])
            for one, all_ in zip(alone, whole, strict=True):
                torch.testing.assert_close(one[0], all_[i], atol=1e-5, rtol=1e-5)
        moved = shaken(model, blocks.roll(1, dims=1), sigma, condition)
        assert (moved[0] - whole[0]).abs().max() > 1e-4  # blocks have places
        changed = blocks.clone()
        changed[:, 4] += 1
        assert (shaken(model, changed, sigma, condition)[1][:, 0] - whole[1][:, 0]).abs().max() > 1e-5  # they agree


class _Exact:
    """A denoiser that knows the latents: the velocity towards them from any place."""

    def __init__(self, goal: Latents) -> None:
        self.config = {"model_latent": 4, "block_latent": 6}
        self.goal, self.sigmas = goal, []  # type: ignore[var-annotated]
        scales = {
            "model_scale": torch.tensor([[1.0] * 4, [2.0] * 4]),
            "block_scale": torch.tensor([[0.0] * 6, [0.5] * 6]),
        }
        self.get_buffer = scales.__getitem__

    def __call__(self, model: Tensor, blocks: Tensor, sigma: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        self.sigmas.append(float(sigma))
        return (model - self.goal.model) / sigma, (blocks - self.goal.blocks) / sigma


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_the_solver_follows_the_velocity_to_the_latents(steps: int) -> None:
    goal = Latents(torch.randn(4), torch.randn(3, 6))
    exact: Any = _Exact(goal)
    noise = latent_noise(exact, 3, torch.Generator().manual_seed(0))
    found = solve(exact, make_scheduler(), noise, torch.zeros(1, 32), steps=steps)
    torch.testing.assert_close(found.model, 1 + 2 * goal.model, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.blocks, 0.5 * goal.blocks, atol=1e-4, rtol=1e-4)
    assert exact.sigmas[0] == 1 and len(exact.sigmas) == steps and exact.sigmas == sorted(exact.sigmas, reverse=True)
    again = scaled_latents(exact, unscaled(exact, goal))
    torch.testing.assert_close(again.model, goal.model)
    torch.testing.assert_close(again.blocks, goal.blocks)


def test_guidance_extrapolates_from_the_unconditional_velocity() -> None:
    model = shaken_denoiser()
    latents, sigma = Latents(torch.randn(4), torch.randn(3, 6)), torch.tensor([0.4])
    condition = torch.randn(1, 32)
    with torch.no_grad():
        one = velocity(model, latents, sigma, condition, 1.0)
        free = velocity(model, latents, sigma, model.unconditional[None], 1.0)
        none = velocity(model, latents, sigma, condition, 0.0)
        strong = velocity(model, latents, sigma, condition, 3.0)
    torch.testing.assert_close(none.blocks, free.blocks)
    torch.testing.assert_close(strong.blocks, free.blocks + 3 * (one.blocks - free.blocks), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(strong.model, free.model + 3 * (one.model - free.model), atol=1e-5, rtol=1e-4)


def test_only_the_last_step_of_the_solver_has_a_gradient() -> None:
    model = shaken_denoiser().requires_grad_(True)
    noise = latent_noise(model, 3, torch.Generator().manual_seed(0))
    condition = torch.zeros(1, 32)
    found = solve(model, make_scheduler(), noise, condition, steps=3, last_with_gradient=True)
    assert found.blocks.requires_grad
    found.blocks.sum().backward()
    assert model.write["block"].weight.grad is not None
    plain = solve(model, make_scheduler(), noise, condition, steps=3)
    assert not plain.blocks.requires_grad and torch.equal(plain.blocks, found.blocks)
