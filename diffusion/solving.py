"""From noise to latents: a solver of diffusers that follows the denoiser."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from autoencoder.field import Latents
from diffusion.denoiser import LatentDenoiser

StepEnd = Callable[[int, float, Latents], Latents | None]


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The default solver of rectified flow (2210.02747)."""
    return FlowMatchEulerDiscreteScheduler()


def latent_noise(denoiser: LatentDenoiser, layers: int, rng: torch.Generator) -> Latents:
    """Normal noise of the shape of a model's latents, drawn on the generator's device."""

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, device=rng.device)

    return Latents(draw(denoiser.config["model_latent"]), draw(layers, denoiser.config["block_latent"]))


def velocity(denoiser: LatentDenoiser, latents: Latents, sigma: Tensor, condition: Tensor, guidance: float) -> Latents:
    """The velocity of one model's latents, under classifier-free guidance (2207.12598) unless it is 1."""
    model, blocks = latents.model[None], latents.blocks[None]
    found = denoiser(model, blocks, sigma, condition)
    if guidance != 1.0:
        free = denoiser(model, blocks, sigma, denoiser.unconditional[None])
        found = tuple(f + guidance * (c - f) for c, f in zip(found, free, strict=True))
    return Latents(found[0][0], found[1][0])


def solve(
    denoiser: LatentDenoiser,
    scheduler: FlowMatchEulerDiscreteScheduler,
    noise: Latents,
    condition: Tensor,
    *,
    steps: int,
    guidance: float = 1.0,
    last_with_gradient: bool = False,
    on_step_end: StepEnd | None = None,
) -> Latents:
    """Scaled latents of one model from noise. condition [1, hidden]. last_with_gradient: whether the last step is
    differentiable. Latents are returned in the autoencoder's units."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(steps, device=noise.model.device)
    current, size = noise, noise.model.shape[0]
    for i, time in enumerate(scheduler.timesteps):
        sigma = (time / scheduler.config["num_train_timesteps"]).reshape(1).to(current.model)
        with torch.set_grad_enabled(last_with_gradient and i == steps - 1):
            v = velocity(denoiser, current, sigma, condition, guidance)
        flat = torch.cat([current.model, current.blocks.flatten()])
        flow = torch.cat([v.model, v.blocks.flatten()])
        moved = scheduler.step(flow, time, flat).prev_sample
        current = Latents(moved[:size], moved[size:].view_as(current.blocks))
        if on_step_end is not None:
            current = on_step_end(i, float(time), current) or current
    return unscaled(denoiser, current)


def scaled_latents(denoiser: LatentDenoiser, latents: Latents) -> Latents:
    """Latents in units of their deviation, which the denoiser works in."""
    (m_mean, m_scale), (b_mean, b_scale) = denoiser.get_buffer("model_scale"), denoiser.get_buffer("block_scale")
    return Latents((latents.model - m_mean) / m_scale, (latents.blocks - b_mean) / b_scale)


def unscaled(denoiser: LatentDenoiser, latents: Latents) -> Latents:
    """The inverse of `scaled_latents`."""
    (m_mean, m_scale), (b_mean, b_scale) = denoiser.get_buffer("model_scale"), denoiser.get_buffer("block_scale")
    return Latents(latents.model * m_scale + m_mean, latents.blocks * b_scale + b_mean)
