"""A training state from outside: only one of the same run, model and optimizer is taken."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo.errors import UserError
from zoo.training.resumable import load_state, restore_training, save_state, training_tensors


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small module after one step of AdamW, whose optimizer lists the parameters in another order."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    optimizer = torch.optim.AdamW([{"params": [*model[1].parameters()]}, {"params": [*model[0].parameters()]}])
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_state_restores_the_same_values(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    save_state(tmp_path / "state.safetensors", training_tensors(model, optimizer), 7, "run")
    other, other_optimizer = trained(1)
    state, step = load_state(tmp_path / "state.safetensors", "run", 10)
    restore_training(state, other, other_optimizer)
    expected, found = training_tensors(model, optimizer), training_tensors(other, other_optimizer)
    assert step == 7 and expected.keys() == found.keys() and len(expected) == 4 + 4 * 3
    assert all(torch.equal(expected[name], found[name]) for name in expected)


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "a missing weight": (lambda t: t.pop("model.0.weight"), "lacks the tensor 'model.0.weight'"),
    "a weight that broadcasts": (
        lambda t: t.update({"model.0.bias": torch.ones(1)}),
        r"'model.0.bias' is .*\[1\], not",
    ),
    "a weight of another dtype": (lambda t: t.update({"model.0.bias": torch.ones(2).double()}), "torch.float64"),
    "a moment of another shape": (lambda t: t.update({"moment.0.exp_avg": torch.ones(4)}), r"\[4\], not .*\[4, 2\]"),
    "a moment of no parameter": (lambda t: t.update({"moment.9.exp_avg": torch.ones(4)}), "index out of range"),
    "a moment without a number": (lambda t: t.update({"moment.x.exp_avg": torch.ones(4)}), "invalid literal"),
    "a moment that is missing": (lambda t: t.pop("moment.0.exp_avg_sq"), "lacks moments of the optimizer"),
    "a step below zero": (lambda t: t.update({"moment.0.step": torch.tensor(-1e38)}), "an impossible number of steps"),
    "a step that is no number": (
        lambda t: t.update({"moment.0.step": torch.tensor(float("nan"))}),
        "impossible number",
    ),
    "a step that is a vector": (lambda t: t.update({"moment.0.step": torch.ones(2)}), "'moment.0.step' is"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_of_another_model_is_refused(change: str) -> None:
    model, optimizer = trained(0)
    tensors = training_tensors(model, optimizer)
    damage, problem = CHANGES[change]
    damage(tensors)
    with pytest.raises((ValueError, IndexError), match=problem):  # train_in_folder makes it a UserError
        restore_training(tensors, *trained(1))


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"recipe": "another", "step": "1"}, "is the state of a run with other settings"),
        ({"recipe": "run", "step": "11"}, "its step 11 is not one of 10"),
        ({"recipe": "run", "step": "-1"}, "its step -1 is not one of 10"),
        ({"recipe": "run", "step": "x"}, "cannot be resumed from it: invalid literal"),
        ({"recipe": "run", "step": "9" * 5000}, "cannot be resumed from it"),
        ({"recipe": "run"}, "cannot be resumed from it: 'step'"),
    ],
)
def test_a_state_of_another_run_is_refused(metadata: dict[str, str], problem: str, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.ones(2)}, 1, "run")
    save_file(load_file(path), path, metadata)
    with pytest.raises(UserError, match=problem):
        load_state(path, "run", 10)


def test_a_state_that_is_no_file_or_is_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.ones(2)}, 1, "run")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="the file is damaged"):
        load_state(path, "run", 10)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a pipe"):
        load_state(path, "run", 10)
