"""A transferred tensor comes from the donor's tensor of its name, whatever other tensors have the same role."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from baselines.transfer.growth.hypercloning import HyperCloning
from baselines.transfer.growth.net2wider import Net2Wider
from baselines.transfer.growth.stacking import Stacking
from baselines.transfer.matching import DonorParts
from baselines.transfer.row_column import RowColumn
from baselines.transfer.shrinking.pruning import Pruning
from baselines.transfer.shrinking.subcloning import Subcloning
from baselines.transfer.weight_selection import WeightSelection
from benchmarks.architectures.checks import coded_donor, own_shape, random_donor, same_function, same_name_values
from benchmarks.architectures.tiny_configs import DEEP, NARROW, OWN, WIDE, Shape, tiny_config
from benchmarks.architectures.walk import OWN_SHAPE
from tests.baselines.transfer.test_transfer import save_tokenizer
from zoo.donors.memory import zoo_of
from zoo.donors.zoo import open_standalone
from zoo.errors import UserError
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Part, TensorSpec
from zoo.units.decoder import require_decoder

FALCON_40B = {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 2}  # one parallel block
CAUSAL: dict[str, dict[str, Any]] = {
    "xglm": {}, "mpt": {}, "falcon": FALCON_40B, "bloom": {}, "gpt_bigcode": {}, "mamba": {}, "apertus": {},
    "gemma2": {}, "gpt_neo": {}, "qwen2_moe": {},
}  # fmt: skip
OTHERS = {"t5": AutoModelForSeq2SeqLM, "bart": AutoModelForSeq2SeqLM, "distilbert": AutoModelForMaskedLM}
UNSCALED: list[Sampler] = [WeightSelection(), Subcloning(rescale="none"), Pruning(correct=False)]


def config(name: str, shape: Shape = OWN, **changes: Any) -> Any:
    found = tiny_config(name, shape)
    for key, value in {**CAUSAL.get(name, {}), **changes}.items():
        setattr(found, key, value)
    return found


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    torch.manual_seed(0)
    auto: Any = AutoModelForMaskedLM if name == "albert" else OTHERS.get(name, AutoModelForCausalLM)
    return random_donor(folder, auto.from_config(config(name, **changes)).to(dtype).eval())


def target(donor: Path, name: str, shape: Shape, **changes: Any) -> dict[str, Any]:
    architectures = Blueprint.from_config(donor).config["architectures"]  # type: ignore[index]
    return config(name, shape, **changes).to_dict() | {"model_type": name, "architectures": architectures}


@pytest.mark.parametrize("name", [*CAUSAL, *OTHERS])
def test_a_donor_into_its_own_config_is_itself(tmp_path: Path, name: str) -> None:
    donor = save(tmp_path / "donor", name)
    outcomes = {method: own_shape(method, donor, tmp_path).text for method in OWN_SHAPE}
    assert outcomes == dict.fromkeys(OWN_SHAPE, "identity")


def test_the_copy_has_the_donors_dtype(tmp_path: Path) -> None:
    donor = save(tmp_path / "donor", "xglm", torch.bfloat16)
    assert own_shape("weight-selection", donor, tmp_path).ok
    zoo, blueprint = open_standalone(donor), Blueprint.from_config(donor)
    assert all(t.dtype == torch.bfloat16 for _, t in Pruning().fit(zoo, blueprint).sample(blueprint))


@pytest.mark.parametrize("name", ["xglm", "falcon", "mpt", "gemma2", *OTHERS])
def test_a_narrower_target_has_the_values_of_the_same_names(tmp_path: Path, name: str) -> None:
    coded, codes = coded_donor(tmp_path / "coded", save(tmp_path / "donor", name))
    for sampler in UNSCALED:
        outcome = same_name_values(sampler, coded, codes, target(coded, name, NARROW))
        assert outcome.ok and outcome.text.startswith("values of the same name"), (sampler.name, outcome.text)


@pytest.mark.parametrize("name", ["t5", "mpt"])
def test_repeated_layers_have_the_values_of_the_same_names(tmp_path: Path, name: str) -> None:
    """Stacking copies tensors of an unknown role too: the width stays, so that they mean the same."""
    coded, codes = coded_donor(tmp_path / "coded", save(tmp_path / "donor", name))
    assert same_name_values(Stacking(), coded, codes, target(coded, name, DEEP)).text == "values of the same name"


@pytest.mark.parametrize("name", ["xglm", "falcon", "mpt"])
def test_two_norms_of_a_layer_keep_their_places_in_a_deeper_model(tmp_path: Path, name: str) -> None:
    donor = save(tmp_path / "donor", name)
    assert same_function(Stacking(exact=True), donor, target(donor, name, DEEP), tmp_path).text == "same function"


@pytest.mark.parametrize("sampler", [HyperCloning(), Net2Wider()], ids=lambda s: s.name)
def test_two_norms_of_a_layer_keep_their_places_in_a_wider_model(tmp_path: Path, sampler: Sampler) -> None:
    donor = save(tmp_path / "donor", "falcon")
    wide = target(donor, "falcon", WIDE, num_kv_heads=4)
    assert same_function(sampler, donor, wide, tmp_path).text == "same function"


def test_sinusoidal_positions_do_not_widen(tmp_path: Path) -> None:
    donor = save(tmp_path / "donor", "xglm")
    for sampler in (HyperCloning(), Net2Wider()):
        with pytest.raises(UserError, match="its positions are sine waves over the width"):
            sampler.fit(open_standalone(donor), Blueprint.from_config(target(donor, "xglm", WIDE)))


@pytest.mark.parametrize("sampler", [HyperCloning(), Net2Wider()], ids=lambda s: s.name)
@pytest.mark.parametrize("name", ["apertus", "olmo"])
def test_tensors_without_axes_and_norms_without_gains_grow(tmp_path: Path, name: str, sampler: Sampler) -> None:
    """Apertus has activations with 0-dimensional parameters; the norms of OLMo 1 have no parameters at all."""
    donor = save(tmp_path / "donor", name)
    assert same_function(sampler, donor, target(donor, name, WIDE), tmp_path).text == "same function"


@pytest.mark.parametrize("sampler", [*UNSCALED, RowColumn(noise=0.0)], ids=lambda s: s.name)
def test_tensors_without_axes_are_copied_to_a_narrower_target(tmp_path: Path, sampler: Sampler) -> None:
    donor = save(tmp_path / "donor", "apertus")
    zoo, blueprint = open_standalone(donor), Blueprint.from_config(target(donor, "apertus", NARROW))
    sampled = dict(sampler.fit(zoo, blueprint).sample(blueprint))
    scalars = [name for name in blueprint.names if not blueprint[name].shape]
    layer = {name: sampler.kept_parts.layers[0] if isinstance(sampler, Pruning) else 0 for name in scalars}
    assert scalars and len(sampled) == len(blueprint.names)
    for name in scalars:
        assert torch.equal(sampled[name], zoo.donors[0].read(name.replace(".0.", f".{int(layer[name])}.")))


def test_names_that_do_not_match_are_refused() -> None:
    """Two norms on either side, of one role and no known site, whose names differ: no guess which is which."""

    def norms(*names: str) -> Blueprint:
        part = Part("norm", ("residual",), (8,))
        paths = [f"layers.0.{name}.weight" for name in names]
        return Blueprint(tuple(TensorSpec(path, (8,), torch.float32, (part,), 0) for path in paths))

    donor = norms("first_norm", "second_norm")
    parts = DonorParts(donor, norms("second_norm", "first_norm"))
    assert not parts.mismatches
    spec = donor.specs[1]
    assert parts.find(spec, spec.parts[0], 0, None) == (spec, spec.parts[0])
    (line,) = DonorParts(donor, norms("norm_a", "norm_b")).mismatches
    assert "2 tensors that serve as norm weight" in line and "their names do not match" in line
    assert DonorParts(donor, norms("first_norm")).mismatches  # which of the two would be lost?
    assert not DonorParts(norms("norm_a"), norms("norm_b")).mismatches  # one on either side: another spelling


def test_the_rows_of_another_vocabulary_are_not_copied_by_name(tmp_path: Path) -> None:
    """Same shape and another order of tokens: BERT's output bias has an unknown role and one value per token."""
    words = [f"w{i}" for i in range(96)]
    donor = save(tmp_path / "donor", "bert", is_decoder=True)
    save_tokenizer(donor, words)
    other = save_tokenizer(tmp_path / "tokenizer", words[::-1])
    zoo, blueprint = open_standalone(donor), Blueprint.from_config(donor)
    sampled = dict(WeightSelection(tokenizer=str(other)).fit(zoo, blueprint).sample(blueprint))
    embedding = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(sampled[embedding], zoo.donors[0].read(embedding).float())
    assert "cls.predictions.bias" not in sampled
    same = dict(WeightSelection(tokenizer=str(donor)).fit(zoo, blueprint).sample(blueprint))
    assert torch.equal(same["cls.predictions.bias"], zoo.donors[0].read("cls.predictions.bias"))


def test_stacks_of_different_depths_are_copied_or_refused(tmp_path: Path) -> None:
    donor = save(tmp_path / "donor", "bart", decoder_layers=3)
    assert own_shape("pruning", donor, tmp_path).text == "identity"
    smaller = Blueprint.from_config(target(donor, "bart", NARROW, decoder_layers=3))
    with pytest.raises(
        UserError, match=r"numbers of layers \(2 in .*, 3 in .*decoder.* only a donor of the target's own"
    ):
        WeightSelection().fit(open_standalone(donor), smaller)


def test_tables_of_positions_of_different_lengths(tmp_path: Path) -> None:
    """LED: the encoder and the decoder have learned positions of their own."""
    OTHERS["led"] = AutoModelForSeq2SeqLM
    lengths = {"max_encoder_position_embeddings": 40, "max_decoder_position_embeddings": 24}
    try:
        coded, codes = coded_donor(tmp_path / "coded", save(tmp_path / "donor", "led", **lengths))
    finally:
        del OTHERS["led"]
    shorter = target(coded, "led", NARROW, **lengths)
    outcome = same_name_values(WeightSelection(), coded, codes, shorter)
    assert outcome.text.startswith("values of the same name"), outcome.text


@pytest.mark.parametrize(
    ("name", "reason"), [("albert", "its layers share weights"), ("distilbert", "its norms act on")]
)
def test_layers_that_cannot_be_silent_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    donor = save(tmp_path / "donor", name)
    with pytest.raises(UserError, match=f"layers 2 -> 4: {reason}"):
        Stacking(exact=True).fit(open_standalone(donor), Blueprint.from_config(target(donor, name, DEEP)))


def test_an_encoder_decoder_has_no_residual_units() -> None:
    """Its layers have two tensors of each role, of which residual units would take the first."""
    with pytest.raises(UserError, match=r"layer 0 has 2 attn\.q \(.*\); residual units need one"):
        require_decoder(Blueprint.from_pretrained_config(config("t5")), "t5")


def test_a_donor_with_other_heads_is_not_copied() -> None:
    """The same names and shapes, and heads of another size: not the same tensors."""
    shapes = [replace(OWN, heads=heads, kv_heads=heads) for heads in (4, 2)]
    configs = [config("llama", shape, head_dim=32 // shape.heads) for shape in shapes]
    models = [AutoModelForCausalLM.from_config(one) for one in configs]
    few, many = Blueprint.from_module(models[1]), Blueprint.from_module(models[0])
    assert {s.name: s.shape for s in few.specs} == {s.name: s.shape for s in many.specs}
    with pytest.raises(UserError, match="kv_heads 2 is smaller than the target's 4"):
        WeightSelection().fit(zoo_of({"few": models[1]}), many)
