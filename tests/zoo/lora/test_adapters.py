"""Blueprints of adapters: the names that PEFT saves, what is adapted, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    Gemma3ForConditionalGeneration,
)

from tests.support.architectures import LISTED
from zoo.errors import UserError
from zoo.lora.adapters import change_norm, compensated_weight, lora_pairs, refuse_tied_weights
from zoo.targets.adapters import Pair, as_lora_config
from zoo.targets.blueprint import Adapter, Blueprint

peft = pytest.importorskip("peft")
LLAMA = LISTED["llama-gqa-tied"]


def adapter(blueprint: Blueprint) -> Adapter:
    assert blueprint.adapter is not None
    return blueprint.adapter


def options(**more: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **more}


@pytest.mark.parametrize(
    "name",
    ["llama-gqa-tied", "llama-bare", "qwen2", "gemma3", "phi3", "gpt2", "gpt2-bare", "gpt_neox", "opt-350m", "bert"],
)
def test_names_and_shapes_are_those_that_peft_saves(name: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(**LISTED[name])
    auto: Any = AutoModel if "bare" in name else AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    make: Any = Gemma3ForConditionalGeneration if name == "gemma3" else auto.from_config
    model: Any = make(config)
    made = peft.get_peft_model(model, peft.LoraConfig(**options()))
    made.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    blueprint = Blueprint.from_lora(LISTED[name], options())
    assert {s.name: s.shape for s in blueprint.specs} == {k: tuple(t.shape) for k, t in saved.items()}
    config_saved = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = adapter(blueprint).config
    different = {k for k in config_saved if config_saved[k] != ours[k]} - {
        "target_modules",
        "task_type",
        "auto_mapping",
    }
    assert not different and set(ours["target_modules"]) == set(config_saved["target_modules"])
    assert json.loads(json.dumps(ours)) == ours
    assert blueprint == Blueprint.from_lora(LISTED[name], ours)  # what is written describes the same again


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2", "gpt_neox", "phi3", "qwen2", "olmo2"])
def test_pairs_agree_with_what_they_adapt(name: str) -> None:
    blueprint = Blueprint.from_lora(LISTED[name], options())
    base = adapter(blueprint).base
    assert blueprint.config is None and blueprint.metadata == base.metadata
    for pair in lora_pairs(blueprint, "this"):
        spec, a, b = base[pair.weight], blueprint[pair.a], blueprint[pair.b]
        assert (pair.rows, pair.columns) == (spec.shape[::-1] if pair.transposed else spec.shape)
        assert pair.transposed == spec.transposed == (name == "gpt2")
        assert (pair.role, pair.layer, pair.scaling, pair.rank) == (spec.role, spec.layer, 2.0, 4)
        assert (a.role, b.role, a.layer, b.layer) == ("lora.a", "lora.b", spec.layer, spec.layer)
        assert a.parts[0].axes == ("rank", spec.parts[0].axes[-1]) and a.shape == (4, pair.columns)
        fused = len({p.axes[0] for p in spec.parts}) > 1
        assert b.parts[0].axes == ("other" if fused else spec.parts[0].axes[0], "rank") and b.shape == (pair.rows, 4)
    assert {s.dtype for s in blueprint.specs} == {torch.float32} and blueprint.nbytes == 4 * blueprint.parameters


def test_ranks_scalings_and_targets_may_differ_by_module() -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 9}, use_rslora=True
    )
    given = config.to_dict()
    blueprint = Blueprint.from_lora(LLAMA, config)
    found = {(p.module.split(".")[-1], p.rank, round(p.scaling, 6)) for p in lora_pairs(blueprint, "this")}
    assert found == {("q_proj", 9, round(8 / 3, 6)), ("down_proj", 4, 4.0)}
    assert config.to_dict() == given  # the caller's config stays as it was
    pissa = Blueprint.from_lora(LLAMA, {**options(), "init_lora_weights": "pissa"})
    assert adapter(pissa).config["init_lora_weights"] is True


def test_nothing_is_drawn_and_no_weight_is_made() -> None:
    state = torch.random.get_rng_state()
    large = {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 40, "vocab_size": 128256}
    large |= {"num_attention_heads": 64, "num_key_value_heads": 8}
    assert Blueprint.from_lora(large, options()).parameters > 40 * 4 * 8192
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_config_is_read_from_a_folder_a_file_a_dict_or_an_object(tmp_path: Path) -> None:
    peft.LoraConfig(r=3, target_modules=["q_proj"]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    wanted = Blueprint.from_lora(LLAMA, {"r": 3, "target_modules": ["q_proj"]})
    for given in (
        tmp_path,
        str(tmp_path),
        tmp_path / "adapter_config.json",
        peft.LoraConfig(r=3, target_modules=["q_proj"]),
    ):
        assert Blueprint.from_lora(LLAMA, given).specs == wanted.specs
    assert adapter(wanted).config["base_model_name_or_path"] is None
    named = Blueprint.from_lora(tmp_path, {"r": 3, "target_modules": ["q_proj"]})
    assert adapter(named).config["base_model_name_or_path"] == str(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        as_lora_config(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match="only LoRA"):
        as_lora_config({"peft_type": "LOHA", "r": 4})
    with pytest.raises(UserError, match="is a int"):
        as_lora_config(4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"r": 17}, r"rank 17 is above the smaller side of model\.layers\.0\.self_attn\.k_proj \(16 x 32\).*most 16"),
        ({"r": 0}, "rank is 0; give a whole number of at least 1"),
        ({"r": 2.5}, r"rank is 2\.5"),
        ({"rank_pattern": {"q_proj": -1}}, "rank is -1"),
        ({"target_modules": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"target_modules": ["self_attn"]}, "is a LlamaAttention, not a linear layer; choose from down_proj"),
        ({"target_modules": ["embed_tokens"]}, "is a Embedding"),
        ({"target_modules": "no such module"}, "PEFT cannot adapt it: Target modules no such module not found"),
        ({"use_dora": True}, "Dora cannot be filled"),
        ({"lora_bias": True}, "a bias cannot be filled"),
        ({"modules_to_save": ["lm_head"]}, r"trains base_model\.model\.lm_head\.weight besides"),
        ({"trainable_token_indices": [1]}, "besides its pairs"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "not a tensor of the base on disk"),
        ({"colour": "red"}, "unexpected keyword argument 'colour'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        Blueprint.from_lora(LLAMA, options(**given))
    assert "\n" not in str(caught.value)


def test_quantised_bases_experts_and_models_are_refused() -> None:
    with pytest.raises(UserError, match="is quantised"):
        Blueprint.from_lora({**LLAMA, "quantization_config": {"quant_method": "awq"}}, options())
    with pytest.raises(UserError, match="experts; adapt other modules"):
        Blueprint.from_lora(LISTED["mixtral"], options())
    assert len(Blueprint.from_lora(LISTED["mixtral"], options(target_modules=["q_proj"])).specs) == 4
    with pytest.raises(UserError, match="headstart lora"):
        lora_pairs(Blueprint.from_config(LLAMA), "pissa")
    with pytest.raises(UserError, match="remove it from the targets"):
        refuse_tied_weights(adapter(Blueprint.from_lora(LLAMA, options(target_modules=["q_proj", "lm_head"]))))
    refuse_tied_weights(adapter(Blueprint.from_lora(LISTED["llama"], options(target_modules=["lm_head"]))))


@pytest.mark.parametrize("transposed", [False, True])
def test_compensation_and_its_size(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((7, 5), (3, 5), (7, 3)))
    pair = Pair("m", "m.weight", "other", None, 7, 5, 3, 1.5, transposed, "a", "b")
    stored = weight.mT.contiguous() if transposed else weight
    changed = compensated_weight(stored, pair, a, b)
    assert changed.shape == stored.shape
    logical = changed.mT if transposed else changed
    torch.testing.assert_close(logical + 1.5 * b @ a, weight)
    assert change_norm(pair, a, b) == pytest.approx((1.5 * b @ a).norm().item())
    half = compensated_weight(stored.bfloat16(), pair, a.bfloat16(), b.bfloat16())
    assert half.dtype == torch.float32 and (half - changed).abs().max() < 0.1
