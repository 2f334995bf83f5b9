"""The autoencoder learns and writes every family that has a canonical form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from autoencoder.behaviour import first_positions, make_skeleton
from autoencoder.donors import base_blocks, base_vocabularies, field_sizes, read_training_donors
from autoencoder.field import FieldSizes, Latents, head_components
from autoencoder.loading import load_autoencoder
from autoencoder.model import new_autoencoder
from autoencoder.objective import Skeletons, donor_logits, draw_step, encode_donor, training_shapes
from autoencoder.sampler import AutoencoderSampler
from autoencoder.texts import read_texts
from tests.support.commands import generate
from tests.support.generators import AUTOENCODER, FAMILIES, family_target, family_zoo, train_tiny_autoencoder
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.units.family import PLAIN, family_of, require_target_family

FEW_STEPS = replace(AUTOENCODER, reconstruction=3, warmup=6, steps=9, batch=8, sequence=24, noise=0.05)
MIXED = ("llama", "qwen3", "gpt2")
BYTES = tuple(map(str, range(256)))


@pytest.fixture(autouse=True, scope="module")
def uncounted() -> Iterator[None]:
    """Counting operations would take most of the time of these trainings."""
    with patch("autoencoder.report.FLOP_STEPS", 0):
        yield


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return family_zoo(tmp_path_factory.mktemp("mixed"), *MIXED)


@pytest.fixture(scope="module")
def trained(mixed: Zoo) -> Path:
    """An autoencoder of the mixed zoo."""
    out = mixed.path.parent / "autoencoder"
    return train_tiny_autoencoder(mixed.path, out, mixed.path.parent / "text.txt", FEW_STEPS)


@pytest.fixture(scope="module")
def llama_sizes(tmp_path_factory: pytest.TempPathFactory) -> FieldSizes:
    """The sizes of a field of a zoo of Llamas."""
    donors, strings = read_training_donors(family_zoo(tmp_path_factory.mktemp("llama"), "llama"), quiet=True)
    return field_sizes(donors, len(strings))


def write_and_load(config: dict[str, Any], folder: Path, **options: Any) -> dict[str, Tensor]:
    """Writes a checkpoint with the method, loads it into transformers, and returns its tensors on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    out = generate(folder, "autoencoder", folder / "out", **options)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert model(torch.arange(20)[None]).logits.isfinite().all()
    tensors = load_file(out / "model.safetensors")
    specs = Blueprint.from_config(config).specs
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {spec.name: spec.shape for spec in specs}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    return tensors


def check_training(zoo: Zoo, autoencoder: Path) -> None:
    """The donors are random; what is decoded from their latents has learned the text."""
    report = json.loads((autoencoder / "report.json").read_text())
    assert set(report["decoded"]) == {donor.name for donor in zoo.donors}
    for name, row in report["decoded"].items():
        assert row["decoded_loss"] < row["donor_loss"] - 0.15, name


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3", "olmo2", "gpt_neox"])
def test_a_zoo_of_a_family_trains_and_generates(family: str, tmp_path: Path) -> None:
    zoo = family_zoo(tmp_path, family)
    coder = train_tiny_autoencoder(zoo.path, tmp_path / "coder", tmp_path / "text.txt", FEW_STEPS)
    check_training(zoo, coder)
    model = load_autoencoder(coder)
    assert len(model.sizes.families) == 1 and model.sizes.flags == 0
    write_and_load(family_target(family), tmp_path / "target", zoo=zoo.path, model=str(coder))


def test_a_mixed_zoo_trains(mixed: Zoo, trained: Path) -> None:
    check_training(mixed, trained)
    model = load_autoencoder(trained)
    assert len(model.sizes.families) == 3 and set(model.config["architecture"].split(", ")) == set(MIXED)
    assert model.sizes.vector_roles("neuron") == ("gate", "up", "down")
    assert model.sizes.number_roles("query") == ("q.bias", "q.gain") and model.sizes.positions == 40


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("tied", [False, True])
def test_a_mixed_zoo_generates_each_family(family: str, tied: bool, mixed: Zoo, trained: Path, tmp_path: Path) -> None:
    target = family_target(family, tie_word_embeddings=tied)
    sampler = AutoencoderSampler(model=str(trained)).fit(mixed, Blueprint.from_config(target))
    assert sampler.donors == (family,)  # the donor of the target's family
    write_and_load(target, tmp_path / "target", zoo=mixed.path, model=str(trained))


def test_the_logits_of_donors_come_from_their_tables(mixed: Zoo) -> None:
    donors, _ = read_training_donors(mixed, quiet=True)
    assert {donor.name for donor in donors} == set(MIXED)
    skeletons = Skeletons(donors)
    windows = torch.arange(42).reshape(2, 21) * 5 % 256
    for donor in donors:
        own = AutoModelForCausalLM.from_pretrained(mixed.path.parent / "sources" / donor.name).eval()
        with torch.no_grad():
            expected = own(windows[:, :-1]).logits
        torch.testing.assert_close(donor_logits(donor, skeletons, windows), expected, atol=2e-4, rtol=1e-4)


def test_windows_of_learned_positions_start_anywhere(mixed: Zoo) -> None:
    gpt2 = next(d for d in read_training_donors(mixed, quiet=True)[0] if d.name == "gpt2")
    skeletons = Skeletons([gpt2])
    skeleton = skeletons.get(replace(gpt2.shape, tied=False))
    rng = torch.Generator().manual_seed(0)
    windows, starts = first_positions(skeleton, torch.randint(256, (400, 17), generator=rng))
    assert starts is not None and windows.shape == (400, 17)
    assert 0.4 < float((starts == 0).float().mean()) < 0.6 and set(starts.tolist()) == set(range(40 - 16 + 1))
    assert torch.equal(first_positions(skeleton, windows[100:120])[1], starts[100:120])  # type: ignore[arg-type]
    own = AutoModelForCausalLM.from_pretrained(mixed.path.parent / "sources" / "gpt2").eval()
    few = windows[:8]
    with torch.no_grad():
        expected = own(few[:, :-1], position_ids=starts[:8, None] + torch.arange(16)).logits
    torch.testing.assert_close(donor_logits(gpt2, skeletons, few, starts[:8]), expected, atol=2e-4, rtol=1e-4)
    long, starts = first_positions(skeleton, torch.zeros(2, 90).long())
    assert long.shape == (2, 41) and starts is not None and not starts.any()
    llama = make_skeleton(FAMILIES["llama"], require_target_family(Blueprint.from_config(FAMILIES["llama"]), "llama"))
    assert first_positions(llama, windows)[1] is None


def test_donors_of_learned_positions_write_no_more_tokens_than_they_have(mixed: Zoo) -> None:
    donors = [d for d in read_training_donors(mixed, quiet=True)[0] if d.name == "gpt2"]
    with patch("autoencoder.texts.SAMPLED", (2, 256)):
        (text,) = read_texts(donors, {}, 0)
    assert len(text.tokens) == 2 * 40


def test_random_shapes_are_those_of_their_family(mixed: Zoo) -> None:
    donors, strings = read_training_donors(mixed, quiet=True)
    sizes = field_sizes(donors, len(strings))
    assert sizes.head_dim == 16 and set(sizes.families) == {d.family for d in donors}
    shapes = training_shapes(donors, new_autoencoder(sizes, strings, "several", [], 0), 12, 0)
    skeletons = Skeletons(donors)
    for donor in donors:
        found = shapes[donor.family]
        assert len(found) == 12 and len({str(shape) for shape in found}) > 6
        assert {family_of(shape) for shape in found} == {donor.family}
        assert {shape.head_dim for shape in found} == {donor.shape.head_dim}
        for shape in found[:4]:  # what the config of the family can express
            made = skeletons.get(shape).shape
            for size in ("width", "layers", "heads", "kv_heads", "head_dim", "ffn", "tied", "positions"):
                assert getattr(made, size) == getattr(shape, size), size
    gpt2 = next(d for d in donors if d.name == "gpt2")
    assert sum(shape.tied for shape in shapes[gpt2.family]) > 6  # GPT-2 ties its head
    assert all(shape.heads * shape.head_dim == shape.width for shape in shapes[gpt2.family])


def test_latents_are_mixed_within_a_family(mixed: Zoo) -> None:
    donors, _ = read_training_donors(mixed, quiet=True)
    steps = [draw_step(replace(AUTOENCODER, mixing=1.0), donors, i) for i in range(40)]
    assert any(len(step.donors) == 2 for step in steps)
    for step in steps:
        assert len({donors[i].family for i in (*step.donors, step.other)}) == 1


def test_bases_start_with_blocks_of_every_family(mixed: Zoo) -> None:
    donors, strings = read_training_donors(mixed, quiet=True)
    sizes = field_sizes(donors, len(strings))
    blocks, vocabularies = base_blocks(donors, sizes), base_vocabularies(donors, sizes)
    assert len(blocks) == 6 and ["token" in v for v in vocabularies] == [True, True, True, False]
    ungated = [not block["neuron"][:, 0].any() for block in blocks]
    assert sum(ungated) == 2  # GPT-2's two blocks, whose gates are zero
    for block, lacks_gate in zip(blocks, ungated, strict=True):
        assert block["query"].shape[2] == 16 and ("block" in block) == lacks_gate
        assert bool(block["neuron_numbers"].any()) == lacks_gate
    gpt2 = next(d for d in donors if d.name == "gpt2")
    assert vocabularies[3]["position"] is gpt2.positions
    few = base_blocks(donors, replace(sizes, bases=3))
    assert [not block["neuron"][:, 0].any() for block in few].count(True) == 1  # one block of each family


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3", "olmo2"])
def test_what_no_donor_has_is_neutral(family: str, llama_sizes: FieldSizes) -> None:
    coder = new_autoencoder(llama_sizes, BYTES, "llama", [], 0).eval()
    latents = Latents(torch.ones(16), torch.ones(3, 16))
    shape = require_target_family(Blueprint.from_config(family_target(family)), family)
    decoder = coder.decode(shape, latents, coder.token_pairs(shape, latents))
    for layer in decoder.layers:
        assert set(layer.bias) == set(family_of(shape).biases) and set(layer.gain) == set(family_of(shape).norms)
        assert all((bias == 0).all() for bias in layer.bias.values())
        for gain in layer.gain.values():
            torch.testing.assert_close(gain, torch.ones_like(gain))


def test_a_target_that_no_donor_serves_is_refused(
    mixed: Zoo, trained: Path, llama_sizes: FieldSizes, tmp_path: Path
) -> None:
    new_autoencoder(llama_sizes, BYTES, "llama", [], 0).save_pretrained(tmp_path / "coder")
    sampler = AutoencoderSampler(model=str(tmp_path / "coder"))
    with pytest.raises(UserError, match=r"^autoencoder: the target has an MLP without gates and learned positions, wh"):
        sampler.fit(mixed, Blueprint.from_config(FAMILIES["gpt2"]))
    with pytest.raises(UserError, match="it cannot encode no donor of the zoo; use a donor of a family that it was"):
        sampler.fit(Zoo.of_donors([mixed.donor("gpt2")], mixed.path), Blueprint.from_config(FAMILIES["llama"]))
    biased = Blueprint.from_config(family_target("llama", attention_bias=True, mlp_bias=True))
    fitted = AutoencoderSampler(model=str(trained)).fit(mixed, biased)
    assert fitted.details(biased) == {"family": ["no donor has the target's gate.bias: gains are 1, biases 0"]}


def test_an_autoencoder_that_was_saved_before_families_is_a_llamas(llama_sizes: FieldSizes, tmp_path: Path) -> None:
    new_autoencoder(llama_sizes, BYTES, "llama", [], 0).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    assert values.pop("families") is None and "positions" not in values["sizes"]
    path.write_text(json.dumps(values))
    assert load_autoencoder(tmp_path).sizes.families == (PLAIN,)
    for wrong, problem in (([{"norms": ["x"]}], "its config cannot be used"), ([1], "families")):
        path.write_text(json.dumps({**values, "families": wrong}))
        with pytest.raises(UserError, match=problem):
            load_autoencoder(tmp_path)


def test_components_of_heads_of_another_size() -> None:
    assert head_components(8, 4, 1.0).tolist() == [0, 2, 4, 6]  # the nearest of four frequencies
    assert head_components(4, 8, 1.0).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert head_components(8, 4, 0.0).tolist() == [0, 1, 2, 3]  # the most important
    assert head_components(4, 6, 0.0).tolist() == [0, 1, 2, 3, 0, 1]
    assert head_components(16, 8, 0.5).tolist() == [0, 2, 4, 6, 8, 9, 10, 11]
    assert head_components(6, 6, 1 / 3).tolist() == list(range(6))


def test_an_encoder_reads_the_numbers_of_a_family(mixed: Zoo, trained: Path) -> None:
    coder = load_autoencoder(trained)
    for donor in read_training_donors(mixed, quiet=True)[0]:
        with torch.no_grad():
            found = encode_donor(coder, donor)
            moved = replace(donor, blocks={t: x + 0.1 if "numbers" in t else x for t, x in donor.blocks.items()})
            other = encode_donor(coder, moved)
        assert found.blocks.shape == (2, 16) and found.model.isfinite().all()
        assert torch.equal(found.blocks, other.blocks) == (donor.name == "llama")
