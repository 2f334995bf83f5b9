"""What the text of a generator's condition is worth: on the texts that its zoo knows, and on mixtures of two."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks.generator.inputs import Inputs, noise_and_mean, training_and_held_out
from diffusion.sampler import SAMPLE_BYTES
from zoo.tensors import Metadata


def text_losses(inputs: Inputs, shape: Metadata, texts: Mapping[str, bytes]) -> dict[str, Any]:
    """The loss at step 0 of a shape on each known text, and on half-and-half texts, by what the sampler is told.

    {own: {text: {told: loss}}, untold: {text: {"no text" | "noise" | "mean latents": loss}}, halves: {"a and b": {told:
    loss}}}. `noise` is in the place of latents, and `mean latents` are those of the zoo. On a half-and-half text the
    sampler is told one of the two; `both`, a sample that has half of each; or `interpolated` is the mean of the latents
    of the two."""
    held_out = {name: training_and_held_out(text)[1] for name, text in texts.items()}
    samples = {name: text[:SAMPLE_BYTES] for name, text in texts.items()}
    latents = {name: inputs.sample(shape, text=sample) for name, sample in samples.items()}
    noise, mean = noise_and_mean(inputs.pipeline.denoiser, shape.layers)
    untold = {"no text": inputs.sample(shape, text=None), "noise": noise, "mean latents": mean}
    found: dict[str, Any] = {"own": {}, "untold": {}, "halves": {}}
    for name, windows in held_out.items():
        judged = replace(inputs, windows=windows)
        found["own"][name] = {told: judged.loss(z, shape) for told, z in latents.items()}
        found["untold"][name] = {what: judged.loss(z, shape) for what, z in untold.items()}
    for a, b in itertools.combinations(texts, 2):
        judged = replace(inputs, windows=torch.cat([held_out[a][::2], held_out[b][::2]]))
        half = SAMPLE_BYTES // 2
        both = inputs.sample(shape, text=samples[a][:half] + samples[b][:half])
        mixed = {"both": both, "interpolated": latents[a].mixed(latents[b], 0.5), a: latents[a], b: latents[b]}
        found["halves"][f"{a} and {b}"] = {told: judged.loss(z, shape) for told, z in mixed.items()}
    return found


def costs_of_others(losses: Mapping[str, float], text: str) -> list[float]:
    """By how much the loss of each of the other texts is above that of the right one; [] without others.

    losses: on `text`, by what the sampler is told, as `text_losses` has them."""
    return [loss - losses[text] for told, loss in losses.items() if told != text]


def mixture_is_better(losses: Mapping[str, float]) -> bool:
    """Whether, on half of one text and half of another, sampled or interpolated latents are below both pure ones.

    losses: by what the sampler is told, as `text_losses` has them."""
    both, interpolated, *pure = losses.values()
    return min(both, interpolated) < min(pure)
