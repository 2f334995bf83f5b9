"""Training a small causal language model: one loop for the embedded zoo and for the comparison of initialisations.

The batch of a step depends on (seed, step) only, so two runs with the same seed see the same text in the same order.

Letters: B windows per batch, S tokens per window, V vocabulary, N tokens of a text.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR, SequentialLR

from zoo.streams import stream


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained: AdamW, a warm-up followed by a cosine, and clipped gradients."""

    steps: int
    lr: float
    batch_size: int = 8
    sequence: int = 64  # predicted tokens per window
    seed: int = 0  # sets the order of the text
    warmup: float = 0.05  # share of the steps
    final_lr: float = 0.1  # learning rate of the last step, as a share of the peak
    weight_decay: float = 0.1  # of matrices; gains and biases have none
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest norm of the gradient

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.sequence


@dataclass(frozen=True)
class StepResult:
    """What one update measured."""

    number: int  # counted from 1
    loss: float  # of the batch, before the update
    grad_norm: float  # before clipping


def lr_schedule(optimizer: torch.optim.Optimizer, training: TrainingConfig) -> SequentialLR:
    """Linear warm-up to the peak, then a cosine that reaches `final_lr` times the peak at the last step."""
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    n_warmup = max(1, round(training.warmup * training.steps))
    n_decay = max(1, training.steps - 1 - n_warmup)
    warmup = LinearLR(optimizer, 1 / n_warmup, total_iters=max(1, n_warmup - 1))
    decay = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 0, n_decay, min_lr_rate=training.final_lr)
    return SequentialLR(optimizer, [warmup, decay], [n_warmup])


def sample_windows(tokens: Tensor, batch_size: int, sequence: int, seed: int, step: int) -> Tensor:
    """Draws random windows of a text, int64 [N] -> int64 [B, S+1]: a function of (seed, step)."""
    starts = torch.randint(len(tokens) - sequence, (batch_size,), generator=stream(seed, f"batch {step}"))
    return tokens[starts[:, None] + torch.arange(sequence + 1)]


def spread_windows(tokens: Tensor, count: int, sequence: int) -> Tensor:
    """`count` windows of a text, evenly spread, int64 [N] -> int64 [count, S+1]."""
    starts = torch.linspace(0, len(tokens) - sequence - 1, count).long()
    return tokens[starts[:, None] + torch.arange(sequence + 1)]


def next_token_loss(model: nn.Module, window: Tensor) -> Tensor:
    """Mean cross-entropy in nats of tokens 1 to S of windows int64 [B, S+1], given the earlier tokens of the window."""
    logits = model(input_ids=window[:, :-1], use_cache=False).logits  # [B, S, V]
    return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


@torch.no_grad()
def evaluate(
    model: nn.Module, tokens: Tensor, sequence: int = 64, batch_size: int = 32, limit: int | None = None
) -> float:
    """Held-out loss in nats per token on a text int64 [N], in consecutive windows of S+1 tokens.

    limit: the largest number of windows, evenly spread. The result is NaN or infinite if the model's output is."""
    was_training = model.training
    model.eval()
    windows = tokens.unfold(0, sequence + 1, sequence)  # [windows, S+1]
    if limit is not None and len(windows) > limit:
        windows = windows[torch.linspace(0, len(windows) - 1, limit).long()]
    device = next(model.parameters()).device
    losses = [float(next_token_loss(model, batch.to(device))) * len(batch) for batch in windows.split(batch_size)]
    model.train(was_training)
    return sum(losses) / len(windows)


@torch.no_grad()
def activation_rms(model: nn.Module, tokens: Tensor, sequence: int = 64, limit: int = 8) -> list[float]:
    """Root mean square of the residual stream after the embedding and after each block, [layers + 1].

    Measured on at most `limit` windows of a text int64 [N]. The last value is taken after the final norm."""
    was_training = model.training
    model.eval()
    windows = tokens.unfold(0, sequence, sequence)
    windows = windows[torch.linspace(0, len(windows) - 1, min(limit, len(windows))).long()]
    states = model(input_ids=windows.to(next(model.parameters()).device), output_hidden_states=True, use_cache=False)
    model.train(was_training)
    return [float(state.float().square().mean().sqrt()) for state in states.hidden_states]


def train_steps(model: nn.Module, tokens: Tensor, training: TrainingConfig) -> Iterator[StepResult]:
    """Trains `model` in place on a text int64 [N] and yields after every update.

    Stops after `training.steps` steps, or at the first step whose loss or gradient is not finite. That update is not
    made, but its result is yielded."""
    device = next(model.parameters()).device
    model.train()
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=training.lr, betas=training.betas, fused=True)
    schedule = lr_schedule(optimizer, training)
    for step in range(training.steps):
        window = sample_windows(tokens, training.batch_size, training.sequence, training.seed, step).to(device)
        loss = next_token_loss(model, window)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(matrices + vectors, training.clip)
        result = StepResult(step + 1, float(loss.detach()), float(norm))
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            yield result
            return
        optimizer.step()
        schedule.step()
        yield result


@contextlib.contextmanager
def reproducible(threads: int = 1) -> Iterator[None]:
    """Inside, torch uses `threads` CPU threads and deterministic kernels; afterwards, its earlier settings.

    Sums over tiny matrices depend on how they are split over threads, and more threads do not make them faster."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
