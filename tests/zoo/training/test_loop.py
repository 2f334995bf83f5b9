"""The training loop that the embedded zoo and the comparison share."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from zoo.training.loop import (
    TrainingConfig,
    activation_rms,
    evaluate,
    lr_schedule,
    next_token_loss,
    reproducible,
    sample_windows,
    train_steps,
)


class Bigram(nn.Module):
    """The smallest model with the interface of a causal language model."""

    def __init__(self, vocab: int = 8) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(vocab, vocab))
        self.gain = nn.Parameter(torch.ones(vocab))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> object:
        return type("Output", (), {"logits": self.table[input_ids] * self.gain})


CYCLE = torch.arange(8).repeat(100)  # the next token is certain


def test_batches_are_a_function_of_seed_and_step() -> None:
    tokens = torch.arange(1000)
    first = sample_windows(tokens, 4, 16, seed=3, step=7)
    torch.manual_seed(99)  # the global stream plays no part
    assert torch.equal(first, sample_windows(tokens, 4, 16, seed=3, step=7))
    assert first.shape == (4, 17) and torch.equal(first[:, 1:], first[:, :-1] + 1), "windows of the text"
    assert not torch.equal(first, sample_windows(tokens, 4, 16, seed=3, step=8))
    assert not torch.equal(first, sample_windows(tokens, 4, 16, seed=4, step=7))
    # both ends of the text are reached
    short = torch.cat([sample_windows(torch.arange(20), 64, 16, 0, step) for step in range(20)])
    assert short.min() == 0 and short.max() == 19


def learning_rates(training: TrainingConfig) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=training.lr)
    schedule, rates = lr_schedule(optimizer, training), []
    for _ in range(training.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("steps", [2, 3, 8, 50, 150, 1000])
def test_the_learning_rate_is_the_closed_form(steps: int) -> None:
    n_warmup = max(1, round(0.05 * steps))
    for step, rate in enumerate(learning_rates(TrainingConfig(steps, lr=4e-3))):
        phase = (step - n_warmup) / max(1, steps - 1 - n_warmup)
        decay = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * phase))
        assert rate == pytest.approx(4e-3 * (min(1, (step + 1) / n_warmup) if step < n_warmup else decay), rel=1e-12)


def test_learning_rate_warms_up_and_decays() -> None:
    training = TrainingConfig(steps=100, lr=1.0, warmup=0.1, final_lr=0.1)
    rates = learning_rates(training)
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert learning_rates(TrainingConfig(steps=1, lr=1.0)) == [1.0]


def test_losses_are_nats() -> None:
    model = Bigram()
    assert next_token_loss(model, CYCLE[:9][None]).item() == pytest.approx(math.log(8))
    assert evaluate(model, CYCLE, sequence=10) == pytest.approx(math.log(8))
    with torch.no_grad():
        model.table[torch.arange(8), (torch.arange(8) + 1) % 8] = 50.0
    assert evaluate(model, CYCLE, sequence=10) == pytest.approx(0.0, abs=1e-6)


def test_activations_are_those_of_the_residual_stream() -> None:
    from transformers import LlamaForCausalLM

    from tests.support.tiny import config

    torch.manual_seed(0)
    model = LlamaForCausalLM(config(layers=3))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.full_like(model.model.embed_tokens.weight, 0.25))
        for layer in model.model.layers[1:]:  # silent blocks leave the stream as it is
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    found = activation_rms(model, torch.randint(48, (500,)), sequence=32, limit=4)
    assert len(found) == 4 and found[0] == pytest.approx(0.25)
    assert found[1] == pytest.approx(found[2], rel=1e-6), "the second block is silent"
    assert found[3] == pytest.approx(1.0, abs=1e-3), "the last one is behind the final norm"
    assert model.training


def test_evaluation_counts_every_token_once() -> None:
    """On windows that do not divide the batch, the mean is over tokens, and windows overlap by their first token."""
    torch.manual_seed(0)
    model = Bigram()
    nn.init.normal_(model.table)
    tokens = torch.randint(8, (61,))
    logits = model(tokens[:-1]).logits
    direct = nn.functional.cross_entropy(logits, tokens[1:])
    assert evaluate(model, tokens, sequence=6, batch_size=4) == pytest.approx(direct.item(), abs=1e-6)
    assert model.training


def test_training_learns_and_reports() -> None:
    model = Bigram()
    steps = list(train_steps(model, CYCLE, TrainingConfig(steps=60, lr=0.3, sequence=8)))
    assert [s.number for s in steps] == list(range(1, 61))
    assert steps[0].loss == pytest.approx(math.log(8)) and steps[-1].loss < 0.1
    assert steps[0].grad_norm > 0


def test_an_update_with_no_finite_gradient_is_not_made() -> None:
    model = Bigram()
    with torch.no_grad():
        model.table[0, 0] = math.inf
    before = model.gain.clone()
    steps = list(train_steps(model, CYCLE, TrainingConfig(steps=5, lr=0.1, sequence=8)))
    assert len(steps) == 1 and not math.isfinite(steps[0].loss)
    assert torch.equal(model.gain, before)


def test_reproducible_leaves_no_trace() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    with reproducible(1):
        assert torch.get_num_threads() == 1 and torch.are_deterministic_algorithms_enabled()
        torch.manual_seed(1)
        torch.rand(3)
    assert torch.equal(torch.rand(1), expected), "the global stream goes on where it was"
    assert torch.get_num_threads() == threads and not torch.are_deterministic_algorithms_enabled()
