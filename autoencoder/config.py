"""Hyperparameters of the autoencoder's training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

ONE_TEXT_STEPS, FURTHER_TEXT_STEPS = 4000, 1000  # of the third stage


@dataclass(frozen=True)
class AutoencoderTrainConfig:
    """Three stages: reconstruction of the donors; behaviour of the small network alone, so that the latents of every
    donor make a working model; behaviour of everything.

    Without the second stage, the gradients of donors that the bases cannot express destroy the bases: on the
    benchmark's zoo the loss then stayed at 2.6 for 200 steps, where the bigram loss is."""

    steps: int | None = None  # of the third stage; None: `with_steps`
    reconstruction: int = 300
    warmup: int = 150  # of the second stage
    batch: int = 16  # windows per step
    sequence: int = 64  # predicted tokens per window
    lr: float = 2e-3  # of the small network in the third stage
    bases_lr: float = 1.2e-2  # bases have an RMS of one, so they need more than maps
    maps_lr: float = 1e-3
    reconstruction_lr: float = 3e-3  # of the small network in the first two stages; the others' is a sixth
    text_weight: float = 1.0  # in the first stage, of what latents get wrong about their text
    noise: float = 0.15  # standard deviation on the latents, which have unit RMS
    mixing: float = 0.3  # how often the latents of two donors, and their texts, are mixed
    diversity: float = 0.3  # least relative distance of what two donors' latents write at one shape
    diversity_weight: float = 0.2
    diversity_from: float = 0.6  # share of the third stage before the distance counts
    early: float = 0.3  # how often early checkpoints of a run are trained, once they are
    early_from: float = 0.6  # share of the third stage before they are
    distill: bool = False  # minimise the distance to the donor's predictions instead of the loss on text
    shapes: int = 128  # random shapes that are drawn before training
    seed: int = 0
    corpora: Mapping[str, str] = field(default_factory=dict)  # {donor, text of donors, or `all`: file}

    @property
    def all_steps(self) -> int:
        return self.reconstruction + self.warmup + self.last_stage

    @property
    def last_stage(self) -> int:
        """The steps of the third stage, for a zoo of one text where nothing is said."""
        return ONE_TEXT_STEPS if self.steps is None else self.steps

    def with_steps(self, texts: int) -> AutoencoderTrainConfig:
        """The same with steps for a zoo whose donors learned from so many texts, unless they are given."""
        if self.steps is not None:
            return self
        return replace(self, steps=ONE_TEXT_STEPS + FURTHER_TEXT_STEPS * (texts - 1))

    def is_late(self, step: int, share: float) -> bool:
        """Whether a step comes after this share of the third stage."""
        return step >= self.reconstruction + self.warmup + share * self.last_stage
