"""Hyperparameters of the diffusion's training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DiffusionTrainConfig:
    """How the denoiser is trained. `batch` units per step are shared among the kinds (`BATCH_SHARES` in batches.py)."""

    steps: int = 4000
    batch: int = 256
    lr: float = 2e-3
    warmup: int = 100  # steps
    hidden: int = 192
    blocks: int = 3
    bandwidth: float | None = 0.1  # standard deviation around a unit of the bank, in RMS of a token; None: no bank
    context: int = 32  # size of the context vector
    jitter: float = 0.1  # noise on the context, in its RMS, so that nearby contexts have the same meaning
    drop: float = 0.1  # how often the condition is dropped, for classifier-free guidance
    ema: float = 0.999  # decay of the average of the weights
    pool: int = 32  # views in memory
    refresh: int = 4  # steps between two new views
    seed: int = 0
