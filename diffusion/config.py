"""Hyperparameters of the diffusion's training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class DiffusionTrainConfig:
    """Two stages: flow matching on the latents of the donors, then the loss of the models that come out of the
    sampler, through its last step (2309.17400)."""

    steps: int = 2000  # of flow matching
    tuning: int = 300  # steps through the sampler
    batch: int = 64  # models per step of flow matching
    lr: float = 1e-3
    tuning_lr: float = 1e-4
    tuning_windows: int = 16
    sequence: int = 64
    solver_steps: int = 4  # of the sampler while tuning
    diversity: float = 0.3  # least relative distance of what two noises write for one condition
    diversity_weight: float = 0.05
    hidden: int = 64
    layers: int = 2
    drop: float = 0.1  # how often the condition is dropped, for classifier-free guidance
    jitter: float = 0.1  # noise on the latents, which have unit RMS
    mixing: float = 0.3  # how often two models of two texts are mixed
    sample_bytes: int = 100_000  # of a text whose features are a condition, at most
    shapes: int = 128
    seed: int = 0
    corpora: Mapping[str, str] = field(default_factory=dict)  # {donor, text of donors, or `all`: file}

    @property
    def all_steps(self) -> int:
        return self.steps + self.tuning
