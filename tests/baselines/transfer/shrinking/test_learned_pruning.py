"""Masks: their law, the model under them, and what training finds and where it stops."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from baselines.transfer.shrinking import learned_pruning
from baselines.transfer.shrinking.base import KeptParts
from baselines.transfer.shrinking.importance import score_by_weights
from baselines.transfer.shrinking.learned_pruning import LearnedPruning, select_most_open
from baselines.transfer.shrinking.masks import SUPPORTED, MaskDistribution, apply_masks
from tests.support.planted import DEAD, config, live_indices, zero_dead_parts
from tests.support.shaken import CONFIGS, GQA, build, donor, filled, logits
from zoo.donors.memory import zoo_of
from zoo.donors.zoo import Zoo, open_standalone
from zoo.errors import UserError
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.training.corpora import python_reference
from zoo.training.loop import TrainingConfig, evaluate, train_steps
from zoo.vocabulary import byte_tokens

SMALL: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 2,
}  # fmt: skip
MORE = {name: {"model_type": name, **GQA} for name in ("gemma", "mistral", "smollm3")}


class Fitted(LearnedPruning):
    """One that was restored: there is nothing to fit."""

    def fit(self, zoo: Any, blueprint: Blueprint) -> Fitted:
        return self


def sizes(config: dict[str, Any]) -> Any:
    return Blueprint.from_config(config).metadata


def random_masks(source: Any, target: Any, seed: int) -> MaskDistribution:
    """Log-odds at random, far from what any weights say."""
    masks = MaskDistribution(source, target)
    for axis, odds in masks.log_odds.items():
        odds.data = 4 * torch.rand(odds.shape, generator=stream(seed, axis)) - 2
    return masks


def binary(kept: KeptParts, source: Any) -> dict[str, torch.Tensor]:
    """What was kept, as masks of zero and one."""
    z = {
        "residual": torch.zeros(source.width),
        "groups": torch.zeros(source.layers, source.kv_heads),
        "ffn": torch.zeros(source.layers, source.ffn),
        "layers": torch.zeros(source.layers),
    }
    z["residual"][kept.residual] = 1
    z["layers"][kept.layers] = 1
    for place, layer in enumerate(kept.layers.tolist()):
        z["groups"][layer, kept.groups[place]] = 1
        z["ffn"][layer, kept.ffn[place]] = 1
    return z


@pytest.mark.parametrize("name", [n for n in [*CONFIGS, *MORE] if (CONFIGS | MORE)[n]["model_type"] in SUPPORTED])
def test_at_zero_and_one_the_masked_model_is_the_pruned_model(tmp_path: Path, name: str) -> None:
    """Every axis at once, parts at random; the norms' epsilon is large enough to be felt."""
    whole = (CONFIGS | MORE)[name] | {"num_hidden_layers": 3, "rms_norm_eps": 1e-3}
    zoo, source, target = donor(tmp_path / "donor", whole), sizes(whole), sizes(whole | SMALL)
    kept = select_most_open(random_masks(source, target, 1), score_by_weights(zoo.donors[0]), source, target)
    fitted = Fitted()
    fitted.restore({"folder": str(zoo.path), "sha256": zoo.donors[0].sha256}, kept.tensors())
    pruned = logits(filled(tmp_path / "pruned", fitted, zoo, whole | SMALL))
    model = AutoModelForCausalLM.from_pretrained(zoo.path).eval()
    with torch.no_grad(), apply_masks(model, zoo.donors[0].blueprint, binary(kept, source)):
        masked = model(torch.arange(1, 25).view(2, 12)).logits
    assert (masked - logits(zoo.path)).abs().max() > 0.05
    torch.testing.assert_close(masked, pruned, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(torch.arange(1, 25).view(2, 12)).logits, logits(zoo.path))  # the hooks are gone


def test_masks_follow_the_hard_concrete_law() -> None:
    """The expected share of what is not zero against many draws, and that against the distribution function."""
    source, target = sizes(config("llama")), sizes(config("llama", **SMALL))
    masks = MaskDistribution(source, target)
    assert masks.target == {"residual": 0.75, "groups": 0.5, "ffn": 40 / 48, "layers": 2 / 3}
    for odds in (-2.0, 0.0, 1.5):
        for values in masks.log_odds.values():
            values.data.fill_(odds)
        drawn = torch.cat([masks.draw(0, f"{i}")["ffn"].detach().flatten() for i in range(100)])
        expected = float(masks.expected_open()["ffn"].detach()[0])
        assert drawn.min() >= 0 and drawn.max() <= 1
        assert abs(float((drawn > 0).float().mean()) - expected) < 3 * (0.25 / len(drawn)) ** 0.5
        u = torch.rand(200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        s = 1 / (1 + ((1 - u) / u * torch.e**-odds) ** 1.5)  # sigmoid((logit u + odds) / (2/3))
        assert abs(float((1.2 * s - 0.1 > 0).double().mean()) - expected) < 0.005
        assert abs(float((1.2 * s - 0.1).clamp(0, 1).mean()) - float(drawn.mean())) < 0.01
    assert torch.equal(masks.draw(0, "a")["ffn"], masks.draw(0, "a")["ffn"])
    assert not torch.equal(masks.draw(0, "a")["ffn"], masks.draw(1, "a")["ffn"])


def test_the_multipliers_lead_every_axis_to_its_size() -> None:
    """The Lagrangian alone: under an equality expected shares end at the target's, else at most there."""
    source, target = sizes(config("llama")), sizes(config("llama", **SMALL))
    for equality in (True, False):
        masks = MaskDistribution(source, target)
        optimizer = torch.optim.Adam(
            [
                {"params": [*masks.log_odds.values()], "lr": 0.1},
                {"params": [*masks.linear.values(), *masks.quadratic.values()], "lr": 0.1, "maximize": True},
            ]
        )
        for step in range(250):
            optimizer.zero_grad()
            masks.penalty(step / 60, equality).backward()
            optimizer.step()
        for axis, share in masks.expected_open().items():
            assert bool((share < masks.target[axis] + 0.05).all()), axis
            assert not equality or bool((share > masks.target[axis] - 0.05).all()), axis


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return byte_tokens(python_reference()[:60_000])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokens: torch.Tensor) -> Zoo:
    """A tiny byte-level Llama, trained for a moment; what is DEAD, and layer 1, has no gradient and stays dead."""
    model = build(config("llama"))
    zero_dead_parts(model, ("residual", "ffn", "groups"), layer=1)
    for module in model.model.layers[1].modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.zero_()
    for _ in train_steps(model, tokens, TrainingConfig(steps=150, lr=1e-2, sequence=31)):
        pass
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    return open_standalone(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(python_reference()[:60_000])
    return str(path)


def loss(folder: Path, tokens: torch.Tensor) -> float:
    return evaluate(AutoModelForCausalLM.from_pretrained(folder), tokens, sequence=31, limit=64)


def test_training_finds_what_is_dead(tmp_path: Path, trained: Zoo, tokens: torch.Tensor, text: str) -> None:
    """Neurons, groups and a layer, exactly: the pruned model is the donor."""
    small = config("llama", **SMALL | {"hidden_size": 32})
    sampler = LearnedPruning(text=text, steps=120)
    folder = filled(tmp_path / "learned", sampler, trained, small)
    assert sampler.kept_parts.layers.tolist() == [0, 2]
    assert sampler.kept_parts.groups.tolist() == [[1 - DEAD["groups"][i]] for i in (0, 2)]
    assert sampler.kept_parts.ffn.tolist() == [live_indices("ffn", 0), live_indices("ffn", 2)]
    torch.testing.assert_close(logits(folder), logits(trained.path), rtol=1e-4, atol=1e-5)


def test_learned_masks_beat_masks_at_random(tmp_path: Path, trained: Zoo, tokens: torch.Tensor, text: str) -> None:
    """All axes at once. (Dead coordinates of the stream are no exact matter: a norm divides by what is kept.)"""
    small = config("llama", **SMALL)
    sampler = LearnedPruning(text=text, steps=120)
    learned = loss(filled(tmp_path / "learned", sampler, trained, small), tokens)
    source, target = sizes(config("llama")), sizes(small)
    at_random = []
    for seed in range(3):
        parts = select_most_open(
            random_masks(source, target, seed), score_by_weights(trained.donors[0]), source, target
        )
        fitted = Fitted()
        fitted.restore({"folder": str(trained.path), "sha256": trained.donors[0].sha256}, parts.tensors())
        at_random.append(loss(filled(tmp_path / f"random{seed}", fitted, trained, small), tokens))
    before = loss(trained.path, tokens)
    assert before < 2.8 and learned < before + 0.3
    assert learned < min(min(at_random) - 0.05, sum(at_random) / 3 - 0.3)


def test_a_resumed_run_gives_the_same_bytes(
    tmp_path: Path, trained: Zoo, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blueprint = Blueprint.from_config(config("llama", **SMALL))
    for weights in (False, True):
        options: dict[str, Any] = {"text": text, "steps": 8, "batch_size": 2, "train_weights": weights}
        whole = dict(LearnedPruning(**options).fit(trained, blueprint).sample(blueprint))
        work = tmp_path / f"work{weights}"
        real, steps = learned_pruning.next_token_loss, []

        def counting(model: Any, window: torch.Tensor, real: Any = real, steps: list[int] = steps) -> torch.Tensor:
            steps.append(0)
            if len(steps) == 4:
                os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step, as far as training can tell
            return real(model, window)

        with monkeypatch.context() as patch:
            patch.setattr(learned_pruning, "next_token_loss", counting)
            with pytest.raises(KeyboardInterrupt):
                LearnedPruning(**options, work=str(work)).fit(trained, blueprint)
            assert len(steps) == 4
            sampler = LearnedPruning(**options, work=str(work)).fit(trained, blueprint)
            assert len(steps) == 8  # four were left
            LearnedPruning(**options, work=str(work)).fit(trained, blueprint)
            assert len(steps) == 8  # and a finished run is not made again
        resumed = dict(sampler.sample(blueprint))
        assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
        with pytest.raises(UserError, match="is the state of a run with other settings"):
            LearnedPruning(**options | {"mask_lr": 0.5}, work=str(work)).fit(trained, blueprint)
        sampler.save(tmp_path / f"saved{weights}")
        loaded = dict(LearnedPruning.load(tmp_path / f"saved{weights}").sample(blueprint))
        assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())


def test_training_the_weights_with_the_masks_lowers_the_loss(
    tmp_path: Path, trained: Zoo, tokens: torch.Tensor, text: str
) -> None:
    small = config("llama", hidden_size=16)
    losses = []
    for weights in (False, True):
        sampler = LearnedPruning(text=text, steps=50, train_weights=weights, weights_lr=3e-3)
        losses.append(loss(filled(tmp_path / str(weights), sampler, trained, small), tokens))
        assert len(sampler.kept_parts.residual) == 16
    assert losses[1] < losses[0] - 0.1


def test_without_a_text_only_bytes_have_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    blueprint = Blueprint.from_config(config("llama", hidden_size=24))
    LearnedPruning(steps=1, windows=4).fit(zoo_of({"d": build(config("llama"))}), blueprint)
    assert "masks are trained on Python's language reference" in caplog.text
    zoo, words = zoo_of({"d": build(CONFIGS["llama"])}), Blueprint.from_config(CONFIGS["llama"])
    for act in (LearnedPruning().planned_donors, LearnedPruning().fit):
        with pytest.raises(UserError, match="learned-pruning needs a text to train masks on: give a UTF-8 file"):
            act(zoo, words)


def test_the_same_shape_is_the_donor(tmp_path: Path, trained: Zoo, text: str) -> None:
    same = filled(tmp_path / "same", LearnedPruning(text=text), trained, config("llama"))
    assert torch.equal(logits(same), logits(trained.path))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gpt2", {"n_inner": 64}, "masks are exact only for llama, .*, not for gpt2: use pruning"),
        ("gemma2", {"intermediate_size": 32}, "not for gemma2: use pruning"),
        ("olmo2", {"intermediate_size": 32}, "not for olmo2: use pruning"),
        ("llama", {"head_dim": 4}, "head_dim 8 cannot be masked to 4: use pruning"),
        ("llama", {"num_attention_heads": 2}, "2 query heads per KV head share a mask, but the target has 1"),
        ("llama", {"num_hidden_layers": 4}, "layers 3 are fewer than the target's 4"),
    ],
)
def test_refusals_come_before_any_work(name: str, changes: dict[str, Any], reason: str) -> None:
    zoo, blueprint = zoo_of({"d": build(config(name))}), Blueprint.from_config(config(name, **changes))
    for act in (LearnedPruning().planned_donors, LearnedPruning().fit):
        with pytest.raises(UserError, match=reason):
            act(zoo, blueprint)
    with pytest.raises(UserError, match="steps is 0"):
        LearnedPruning(steps=0).planned_donors(zoo, blueprint)
