"""Subcloning of donors in which what is to go is known, its rule of scaling, and a really trained donor."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from baselines.transfer.shrinking.subcloning import Subcloning
from baselines.transfer.weight_selection import WeightSelection
from tests.support.planted import DEAD, config, live_indices, planted
from tests.support.shaken import build, donor, filled, logits
from zoo.donors.memory import load_into, zoo_of
from zoo.donors.zoo import open_standalone
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.training.corpora import encode_corpus, python_reference
from zoo.training.loop import evaluate


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(python_reference()[:4000])
    return str(path)


@pytest.mark.parametrize("by_text", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "phi3"])
def test_inactive_parts_and_the_middle_layer_go(tmp_path: Path, text: str, name: str, by_text: bool) -> None:
    given = text if by_text else None
    zoo = planted(tmp_path / "donor", config(name), "ffn", "groups", layer=1)
    sampler = Subcloning(text=given, rescale="none")
    small = config(name, intermediate_size=40, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2)
    got = logits(filled(tmp_path / "small", sampler, zoo, small))
    assert sampler.kept_parts.layers.tolist() == [0, 2]
    assert sampler.kept_parts.ffn.tolist() == [live_indices("ffn", 0), live_indices("ffn", 2)]
    assert sampler.kept_parts.groups.tolist() == [[1 - DEAD["groups"][i]] for i in (0, 2)]
    torch.testing.assert_close(got, logits(zoo.path), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_text", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_rescaled_readers_compensate_the_norm_of_a_narrower_stream(
    tmp_path: Path, text: str, name: str, by_text: bool
) -> None:
    """Without dead coordinates a RMSNorm gives sqrt(s / t) of what it gave: the rule of scaling undoes just that."""
    zoo = planted(tmp_path / "donor", config(name), "residual")
    sampler = Subcloning(text=text if by_text else None)
    small = filled(tmp_path / "small", sampler, zoo, config(name, hidden_size=24))
    assert sampler.kept_parts.residual.tolist() == live_indices("residual")
    torch.testing.assert_close(logits(small), logits(zoo.path), rtol=1e-4, atol=1e-5)


def test_the_spread_of_outputs_is_kept() -> None:
    """Of matrices without structure: outputs of the narrower FFN and attention spread like the donor's."""
    zoo = zoo_of({"d": build(config("llama", hidden_size=256, intermediate_size=512))})
    blueprint = Blueprint.from_config(config("llama", hidden_size=64, intermediate_size=128))
    x = torch.randn(200, 256, generator=torch.Generator().manual_seed(0))
    for rescale, kept in (("sqrt", 1.0), ("none", 0.5)):
        got = dict(Subcloning(rescale=rescale).fit(zoo, blueprint).sample(blueprint))
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
            before, after = zoo.donors[0].read(name), got[name]
            assert abs(float((x[:, :64] @ after.T).std() / (x @ before.T).std()) - kept) < 0.1
    down = "model.layers.2.mlp.down_proj.weight"
    exact = dict(Subcloning(rescale="none").fit(zoo, blueprint).sample(blueprint))[down]
    torch.testing.assert_close(dict(Subcloning().fit(zoo, blueprint).sample(blueprint))[down], exact * math.sqrt(4))


def test_a_fitted_sampler_is_saved_and_loaded(tmp_path: Path, text: str) -> None:
    zoo = donor(tmp_path / "donor", config("llama"))
    blueprint = Blueprint.from_config(config("llama", hidden_size=16, num_hidden_layers=2))
    sampler = Subcloning(text=text).fit(zoo, blueprint)
    sampler.save(tmp_path / "saved")
    expected = dict(sampler.sample(blueprint, seed=5))
    loaded = Subcloning.load(tmp_path / "saved")
    assert all(torch.equal(expected[name], tensor) for name, tensor in loaded.sample(blueprint, seed=5))


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({"num_hidden_layers": 4}, {}, "layers 3 are fewer than the target's 4: subcloning only shrinks"),
        ({"intermediate_size": 64}, {}, "ffn 48 is smaller than the target's 64"),
        ({}, {"text": "nowhere.txt"}, "nowhere.txt: no such corpus"),
    ],
)
def test_refusals_come_before_any_work(changes: dict[str, Any], options: dict[str, Any], reason: str) -> None:
    zoo, blueprint = zoo_of({"d": build(config("llama"))}), Blueprint.from_config(config("llama", **changes))
    for act in (Subcloning(**options).planned_donors, Subcloning(**options).fit):
        with pytest.raises(UserError, match=reason):
            act(zoo, blueprint)


def test_active_neurons_and_heads_of_a_trained_model_are_worth_more(shared_data: Path) -> None:
    """stories260K: 172 -> 128 neurons and 4 -> 2 KV groups by what they do on TinyStories, losses further on."""
    text = shared_data / "corpora" / "tinystories_sample.txt"
    zoo = open_standalone(shared_data / "models" / "stories260K")
    tokens = encode_corpus(text, zoo.path, 512)[40_000:44_000]
    for changes in ({"intermediate_size": 128}, {"num_attention_heads": 4, "num_key_value_heads": 2}):
        small = json.loads((zoo.path / "config.json").read_text()) | changes
        blueprint, losses = Blueprint.from_config(small), []
        for sampler in (Subcloning(text=str(text), windows=8), WeightSelection()):
            model = build(small)
            load_into(model, sampler.fit(zoo, blueprint).sample(blueprint))
            losses.append(evaluate(model, tokens))
        assert losses[0] < losses[1] - 0.2  # about 3.3 against 3.7, and 2.8 against 3.1
