"""A trained generator, and the text on which what it writes is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoencoder.behaviour import Skeleton, field_decoder, make_skeleton, text_loss
from autoencoder.field import Latents
from diffusion.denoiser import LatentDenoiser
from diffusion.pipeline import WeightDiffusionPipeline, load_pipeline
from diffusion.sampler import SAMPLE_BYTES
from diffusion.solving import latent_noise, unscaled
from zoo.donors.zoo import Zoo
from zoo.streams import stream
from zoo.tensors import Metadata
from zoo.training.corpora import HELD_OUT
from zoo.training.loop import spread_windows
from zoo.vocabulary import byte_tokens

WINDOWS, SEQUENCE = 128, 64


@dataclass(frozen=True)
class Inputs:
    """A generator and the text on which what it writes is judged."""

    pipeline: WeightDiffusionPipeline
    config: Mapping[str, Any]  # of a donor
    windows: torch.Tensor  # int64 [WINDOWS, SEQUENCE + 1], held out
    text: bytes  # the sample that is its condition

    def skeleton(self, shape: Metadata) -> Skeleton:
        return make_skeleton(self.config, shape)

    @torch.no_grad()
    def loss(self, latents: Latents, shape: Metadata) -> float:
        decoder = field_decoder(self.pipeline.autoencoder.field, shape, latents)
        return float(text_loss(self.skeleton(shape), decoder, self.windows))

    def sample(self, shape: Metadata, seed: int = 0, **other: Any) -> Latents:
        """Latents for a shape, the text and the best quality, or what `other` asks for."""
        options = {"text": self.text, "excess": 0.0} | other
        asked = self.pipeline.wanted(shape, None, options["text"], options["excess"])
        return self.pipeline.sample_latents(asked, stream(seed, "latents"))


def make_inputs(model: Path, donors: Zoo, text: bytes) -> Inputs:
    """A pipeline, with the held-out part of a text as windows and the start of the rest as condition."""
    windows = training_and_held_out(text)[1]
    return Inputs(load_pipeline(str(model)), donors.donors[0].config, windows, text[:SAMPLE_BYTES])


def noise_and_mean(denoiser: LatentDenoiser, layers: int) -> tuple[Latents, Latents]:
    """Noise in the place of latents, which a denoiser of zeros would leave, and the mean latents of the zoo."""
    noise = latent_noise(denoiser, layers, stream(0, "latents"))
    mean = Latents(torch.zeros_like(noise.model), torch.zeros_like(noise.blocks))
    return unscaled(denoiser, noise), unscaled(denoiser, mean)


def training_and_held_out(text: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """The training part of a text as bytes, int64 [N], and held-out windows, int64 [WINDOWS, SEQUENCE + 1]."""
    tokens = byte_tokens(text)
    count = len(tokens) - int(len(tokens) * HELD_OUT)
    return tokens[:count], spread_windows(tokens[count:], WINDOWS, SEQUENCE)
