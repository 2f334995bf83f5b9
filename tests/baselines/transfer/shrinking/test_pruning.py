"""Pruning of donors in which what is to go is known, of duplicates, and of a really trained one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from baselines.transfer.shrinking.pruning import Pruning
from baselines.transfer.weight_selection import WeightSelection
from tests.support.planted import DEAD, config, live_indices, planted
from tests.support.shaken import build, donor, filled, logits
from zoo.donors.memory import load_into, zoo_of
from zoo.donors.zoo import Zoo, open_standalone
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.training.corpora import encode_corpus, python_reference
from zoo.training.loop import evaluate
from zoo.vocabulary import byte_tokens

SMALL: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(python_reference()[:4000])
    return str(path)


@pytest.mark.parametrize("by_text", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2"])
def test_removing_inactive_parts_keeps_the_function(tmp_path: Path, text: str, name: str, by_text: bool) -> None:
    """Dead coordinates, neurons, a KV group in every layer and a whole layer, all at once: the gains of all norms make
    up for the coordinates that they no longer see, RMSNorms over flattened heads and Gemma's scaled embedding too."""
    layer = 2 if by_text else 1  # what influence finds, and the middle
    zoo = planted(tmp_path / "donor", config(name), "residual", "ffn", "groups", layer=layer)
    sampler = Pruning(text=text if by_text else None)
    small = filled(tmp_path / "small", sampler, zoo, config(name, **SMALL))
    left = [i for i in range(3) if i != layer]
    assert sampler.kept_parts.layers.tolist() == left
    assert sampler.kept_parts.residual.tolist() == live_indices("residual")
    assert sampler.kept_parts.ffn.tolist() == [live_indices("ffn", i) for i in left]
    assert sampler.kept_parts.groups.tolist() == [[1 - DEAD["groups"][i]] for i in left]
    expected = logits(zoo.path)
    assert expected.std() > 0.05
    torch.testing.assert_close(logits(small), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_gpt2_loses_dead_neurons_and_heads(tmp_path: Path, text: str) -> None:
    """Fused and transposed tensors with biases. Its LayerNorm has a mean, so dead coordinates are no exact matter."""
    zoo = planted(tmp_path / "donor", config("gpt2"), "ffn")
    for given in (None, text):
        small = filled(tmp_path / f"small{given is None}", Pruning(text=given), zoo, config("gpt2", n_inner=120))
        torch.testing.assert_close(logits(small), logits(zoo.path), rtol=1e-4, atol=1e-5)


def test_query_heads_within_a_group_go_by_importance(tmp_path: Path) -> None:
    model = build(config("llama"))
    with torch.no_grad():
        for layer, dead in zip(model.model.layers, ([0, 3], [1, 2], [1, 3]), strict=True):
            for head in dead:
                layer.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] = 0
    model.save_pretrained(tmp_path / "donor")
    sampler = Pruning()
    small = filled(
        tmp_path / "small", sampler, open_standalone(tmp_path / "donor"), config("llama", num_attention_heads=2)
    )
    assert sampler.kept_parts.queries.flatten(1).tolist() == [[1, 0], [0, 1], [0, 0]]
    torch.testing.assert_close(logits(small), logits(tmp_path / "donor"), rtol=1e-4, atol=1e-5)


def test_compensation_gives_the_work_of_duplicates_to_what_they_repeat(tmp_path: Path, text: str) -> None:
    """Quiet neurons and query heads that repeat others: gathered alone, what they write is lost; refitted, the donor's
    function is back."""
    model = build(config("llama"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[40:] = layer.mlp.gate_proj.weight[:8]
            layer.mlp.up_proj.weight[40:] = layer.mlp.up_proj.weight[:8] / 100
            layer.mlp.down_proj.weight[:, 40:] *= 100
            heads = layer.self_attn.q_proj.weight.view(4, 8, 32)
            heads[1], heads[3] = heads[0], heads[2]
            layer.self_attn.o_proj.weight.view(32, 4, 8)[:, 1::2] *= 0.5
    model.save_pretrained(tmp_path / "donor")
    zoo, expected = open_standalone(tmp_path / "donor"), logits(tmp_path / "donor")
    small = config("llama", intermediate_size=40, num_attention_heads=2)
    gathered = logits(filled(tmp_path / "gathered", Pruning(text=text), zoo, small))
    refitted = logits(filled(tmp_path / "refitted", Pruning(text=text, compensate=True, ridge=1e-9), zoo, small))
    assert (gathered - expected).abs().max() > 0.5
    torch.testing.assert_close(refitted, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_compensation_without_duplicates_helps_and_a_heavy_ridge_gathers(tmp_path: Path, text: str, name: str) -> None:
    zoo = donor(tmp_path / "donor", config(name))
    small = config(name, **{"n_inner": 96} if name == "gpt2" else {"intermediate_size": 36})
    ids = byte_tokens(Path(text).read_bytes())[:3200].view(-1, 32)

    @torch.no_grad()
    def on_text(folder: Path) -> torch.Tensor:
        return AutoModelForCausalLM.from_pretrained(folder)(ids).logits

    refit, heavy = Pruning(text=text, compensate=True), Pruning(text=text, compensate=True, ridge=1e9)
    refitted = on_text(filled(tmp_path / "refitted", refit, zoo, small))
    gathered = on_text(filled(tmp_path / "gathered", Pruning(text=text), zoo, small))
    torch.testing.assert_close(on_text(filled(tmp_path / "h", heavy, zoo, small)), gathered, rtol=1e-3, atol=1e-4)
    expected = on_text(zoo.path)
    assert (refitted - expected).square().mean() < 0.7 * (gathered - expected).square().mean()


def test_layers_by_every_rule(tmp_path: Path, text: str) -> None:
    zoo = planted(tmp_path / "donor", config("llama", num_hidden_layers=5), layer=3)
    blueprint = Blueprint.from_config(config("llama"))
    for rule, expected in (("middle", [0, 1, 4]), ("even", [0, 2, 4]), ("auto", None), ("influence", None)):
        kept = Pruning(layers=rule, text=text).fit(zoo, blueprint).kept_parts.layers.tolist()
        assert kept == expected if expected else (3 not in kept and len(kept) == 3)
    assert Pruning().fit(zoo, blueprint).kept_parts.layers.tolist() == [0, 1, 4]  # auto, without a text


def test_by_index_and_without_correction_it_is_weight_selection(tmp_path: Path) -> None:
    zoo = donor(tmp_path / "donor", config("llama"))
    blueprint = Blueprint.from_config(config("llama", hidden_size=16))
    got = dict(Pruning(residual="index", correct=False).fit(zoo, blueprint).sample(blueprint))
    expected = dict(WeightSelection().fit(zoo, blueprint).sample(blueprint))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    corrected = dict(Pruning(residual="index").fit(zoo, blueprint).sample(blueprint))
    changed = {name for name in expected if not torch.equal(corrected[name], expected[name])}
    assert changed == {name for name in expected if "norm" in name}


def test_gains_are_corrected_by_the_share_of_what_is_kept(tmp_path: Path, text: str) -> None:
    """The last norm's, against the stream of transformers' own model: sqrt(e t / s)."""
    zoo = donor(tmp_path / "donor", config("llama"))
    blueprint = Blueprint.from_config(config("llama", hidden_size=24))
    sampler = Pruning(text=text)
    ratio = dict(sampler.fit(zoo, blueprint).sample(blueprint))["model.norm.weight"]
    ratio = ratio / zoo.donors[0].read("model.norm.weight")[sampler.kept_parts.residual]
    model = AutoModelForCausalLM.from_pretrained(zoo.path)
    seen: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(byte_tokens(Path(text).read_bytes())[: 64 * 32].view(-1, 32))
    energy = seen[0].square()
    share = (energy[..., sampler.kept_parts.residual].sum(-1) / energy.sum(-1)).mean()
    assert 0.75 < share < 0.99
    torch.testing.assert_close(ratio, (share * 32 / 24).sqrt().expand(24), rtol=1e-4, atol=0)


def test_experts_are_pruned_together(tmp_path: Path) -> None:
    zoo = donor(tmp_path / "donor", config("mixtral"))
    blueprint = Blueprint.from_config(config("mixtral", intermediate_size=24))
    sampler = Pruning().fit(zoo, blueprint)
    got = dict(sampler.sample(blueprint))
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    for expert in (0, 3):
        expected = zoo.donors[0].read(name.format(expert))[:, sampler.kept_parts.expert_ffn[1]]
        assert torch.equal(got[name.format(expert)], expected)
    with pytest.raises(UserError, match="experts, whose outputs cannot be refitted"):
        Pruning(compensate=True, text="any").fit(zoo, blueprint)


def test_a_saved_sampler_no_longer_needs_its_text(tmp_path: Path, text: str) -> None:
    zoo = donor(tmp_path / "donor", config("llama"))
    blueprint = Blueprint.from_config(config("llama", hidden_size=24, intermediate_size=40, num_hidden_layers=2))
    moved = tmp_path / "text.txt"
    moved.write_bytes(Path(text).read_bytes())
    sampler = Pruning(text=str(moved), compensate=True).fit(zoo, blueprint)
    expected = dict(sampler.sample(blueprint))
    sampler.save(tmp_path / "saved")
    moved.unlink()
    got = dict(Pruning.load(tmp_path / "saved").sample(blueprint))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert set(got) == set(blueprint.names)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"num_hidden_layers": 4}, {}, "layers 3 are fewer than the target's 4: pruning only shrinks"),
    ({"hidden_size": 64}, {}, "width 32 is smaller than the target's 64"),
    ({}, {"layers": "influence"}, "layers=influence needs a text: give a UTF-8 file"),
    ({}, {"compensate": True}, "compensate needs a text"),
    ({}, {"text": "nowhere.txt"}, "nowhere.txt: no such corpus"),
    ({}, {"ridge": 0.0}, "pruning: ridge is 0.0; give more than 0"),
    ({}, {"windows": 0}, "pruning: windows is 0; give at least 1"),
]


@pytest.mark.parametrize(("changes", "options", "reason"), REFUSED)
def test_refusals_come_before_any_work(changes: dict[str, Any], options: dict[str, Any], reason: str) -> None:
    zoo, blueprint = zoo_of({"d": build(config("llama"))}), Blueprint.from_config(config("llama", **changes))
    for act in ("planned_donors", "fit"):
        with pytest.raises(UserError, match=reason):
            getattr(Pruning(**options), act)(zoo, blueprint)


def test_a_donor_that_is_deep_enough_is_chosen() -> None:
    zoo = zoo_of({"near": build(config("llama")), "deep": build(config("llama", num_hidden_layers=6))})
    assert Pruning().planned_donors(zoo, Blueprint.from_config(config("llama", num_hidden_layers=4))) == ("deep",)


def test_importance_beats_every_nth_neuron_of_a_trained_model(shared_data: Path) -> None:
    """Neurons of stories260K, 172 -> 128, by what they do on TinyStories; losses on stories further on."""
    text = shared_data / "corpora" / "tinystories_sample.txt"
    zoo: Zoo = open_standalone(shared_data / "models" / "stories260K")
    small = json.loads((zoo.path / "config.json").read_text()) | {"intermediate_size": 128}
    blueprint, tokens = Blueprint.from_config(small), encode_corpus(text, zoo.path, 512)[40_000:44_000]

    def loss(sampler: Any) -> float:
        model = build(small)
        load_into(model, sampler.fit(zoo, blueprint).sample(blueprint))
        return evaluate(model, tokens)

    every_nth, weights = loss(WeightSelection()), loss(Pruning())
    activations = loss(Pruning(text=str(text), windows=8))
    refitted = loss(Pruning(text=str(text), windows=8, compensate=True))
    assert refitted < activations < weights < every_nth < 4.5  # about 2.8, 3.2, 3.5 and 3.7; the donor has 1.9
