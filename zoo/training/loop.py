"""Training a small causal language model: one loop, shared by the nursery and by the comparison of initialisations.

Everything is a function of its arguments: the batch of a step is drawn from (seed, step) alone, so that two runs
with one seed see the same text in the same order whatever they train. B is the batch, S the sequence.
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

from zoo.streams import stream


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained: AdamW under a warm-up and a cosine, gradients clipped to norm 1."""

    steps: int
    lr: float
    batch_size: int = 8
    sequence: int = 64  # predicted tokens per window
    seed: int = 0  # of the order of the text
    warmup: float = 0.05  # of the steps
    final_lr: float = 0.1  # of the peak, at the last step
    weight_decay: float = 0.1  # on matrices; gains and biases have none
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.sequence


@dataclass(frozen=True)
class StepResult:
    """One update that was made: its number (from 1), the loss of its batch before it, the norm before clipping."""

    number: int
    loss: float
    grad_norm: float


def learning_rate(training: TrainingConfig, step: int) -> float:
    """The rate of update `step`, counted from 0: linear warm-up, then a cosine down to `final_lr` of the peak."""
    warm = max(1, round(training.warmup * training.steps))
    if step < warm:
        return training.lr * (step + 1) / warm
    phase = (step - warm) / max(1, training.steps - 1 - warm)
    return training.lr * (training.final_lr + (1 - training.final_lr) * 0.5 * (1 + math.cos(math.pi * phase)))


def sample_windows(tokens: Tensor, batch_size: int, sequence: int, seed: int, step: int) -> Tensor:
    """tokens int64 [N] -> int64 [B, S+1]: random windows, a function of (seed, step)."""
    starts = torch.randint(len(tokens) - sequence, (batch_size,), generator=stream(seed, f"batch {step}"))
    return tokens[starts[:, None] + torch.arange(sequence + 1)]


def next_token_loss(model: nn.Module, window: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the tokens 1..S of int64 [B, S+1], each given those before it in its window."""
    logits = model(input_ids=window[:, :-1], use_cache=False).logits  # [B, S, V]
    return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


@torch.no_grad()
def evaluate(
    model: nn.Module, tokens: Tensor, sequence: int = 64, batch_size: int = 32, limit: int | None = None
) -> float:
    """Nats per token on int64 [N] cut into consecutive windows of S+1 (at most `limit` of them, evenly spread).
    NaN or infinite where the model is."""
    training = model.training
    model.eval()
    cut = tokens.unfold(0, sequence + 1, sequence)  # [windows, S+1]
    if limit is not None and len(cut) > limit:
        cut = cut[torch.linspace(0, len(cut) - 1, limit).long()]
    device = next(model.parameters()).device
    losses = [float(next_token_loss(model, batch.to(device))) * len(batch) for batch in cut.split(batch_size)]
    model.train(training)
    return sum(losses) / len(cut)


@torch.no_grad()
def activation_rms(model: nn.Module, tokens: Tensor, sequence: int = 64, limit: int = 8) -> list[float]:
    """Root mean square of the residual stream after the embedding and after each block, [layers + 1], over at most
    `limit` windows of int64 [N]. transformers gives the last one behind the final norm."""
    training = model.training
    model.eval()
    cut = tokens.unfold(0, sequence, sequence)
    cut = cut[torch.linspace(0, len(cut) - 1, min(limit, len(cut))).long()]
    states = model(input_ids=cut.to(next(model.parameters()).device), output_hidden_states=True, use_cache=False)
    model.train(training)
    return [float(state.float().square().mean().sqrt()) for state in states.hidden_states]


def train_steps(model: nn.Module, tokens: Tensor, training: TrainingConfig) -> Iterator[StepResult]:
    """Trains `model` in place on int64 [N] and yields after every update. Stops by itself after `training.steps`, or
    after the first step whose loss or gradient is not finite (that update is not made; the Step says so)."""
    device = next(model.parameters()).device
    model.train()
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=training.lr, betas=training.betas, fused=True)
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step)
        window = sample_windows(tokens, training.batch_size, training.sequence, training.seed, step).to(device)
        loss = next_token_loss(model, window)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(matrices + vectors, training.clip)
        done = StepResult(step + 1, float(loss.detach()), float(norm))
        if not (math.isfinite(done.loss) and math.isfinite(done.grad_norm)):
            yield done
            return
        optimizer.step()
        yield done


@contextlib.contextmanager
def reproducible(threads: int = 1) -> Iterator[None]:
    """Inside: `threads` CPU threads and deterministic kernels. Sums over tiny matrices depend on how they are split
    over threads, and tiny models do not get faster by more of them. What was set before is restored."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
