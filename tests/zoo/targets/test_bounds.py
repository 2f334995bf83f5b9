"""The bounds on configs and adapters: bombs are refused at once, and the largest open models are not."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.errors import UserError
from zoo.limits import MAX_MODULES
from zoo.targets.adapters import as_lora_config
from zoo.targets.blueprint import Blueprint
from zoo.targets.config_bounds import check_bounds, limited_modules
from zoo.targets.configs import parse_config

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4}
BERT: dict[str, Any] = {
    "model_type": "albert", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4,
}  # fmt: skip
GPT_NEO = {
    "model_type": "gpt_neo", "vocab_size": 64, "hidden_size": 64, "num_layers": 32, "num_heads": 2,
    "attention_types": [[["global", "local"], 16]], "max_position_embeddings": 2048,
}  # fmt: skip

BOMBS: dict[str, tuple[dict[str, Any], str]] = {
    "labels": (LLAMA | {"num_labels": 10**7}, "num_labels is 10000000, more than the 100000"),
    "a billion labels": (LLAMA | {"num_labels": 10**9}, "num_labels is 1000000000"),
    "named labels": (LLAMA | {"id2label": {str(i): "a" for i in range(100_001)}}, "id2label has 100001 entries"),
    "width": (LLAMA | {"hidden_size": 10**9}, "hidden_size is 1000000000, more than the 16777216"),
    "vocabulary": (LLAMA | {"vocab_size": 10**12}, "vocab_size is 1000000000000"),
    "layers": (LLAMA | {"num_hidden_layers": 10_000}, "num_hidden_layers is 10000, more than the 512"),
    "kinds of layers": (LLAMA | {"layer_types": ["full_attention"] * 10**6}, "layer_types has 1000000 entries"),
    "experts": (MIXTRAL | {"num_local_experts": 10**6}, "num_local_experts is 1000000, more than the 16384"),
    "experts of all layers": (
        MIXTRAL | {"num_local_experts": 2000, "num_hidden_layers": 100}, "have 400000 expert matrices"
    ),
    "a part that a rule does not know": (BERT | {"inner_group_num": 10**6}, "give more than 15000 modules"),
    "inside another": ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**6}}, "text_config.num_hidden"),
    "rope": (LLAMA | {"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 20_000}}, "long_factor has 20000"),
    "causal masks of 17 TB": (GPT_NEO | {"max_position_embeddings": 1 << 22}, r"give buffers of 5\.6e\+14 values"),
    "heads": (LLAMA | {"num_attention_heads": 2**40}, "num_attention_heads is 1099511627776"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_config_that_is_a_bomb_is_refused_at_once(bomb: str) -> None:
    config, problem = BOMBS[bomb]
    start = time.process_time()
    with pytest.raises(UserError, match=problem) as caught:
        Blueprint.from_config(config)
    assert time.process_time() - start < 5 and len(str(caught.value)) <= 400


LARGEST: dict[str, dict[str, Any]] = {
    "Llama 3.1 405B": LLAMA | {
        "vocab_size": 128_256, "hidden_size": 16_384, "intermediate_size": 53_248, "num_hidden_layers": 126,
        "num_attention_heads": 128, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
    },
    "the causal masks of GPT-Neo 2.7B": GPT_NEO,
    "Llama 4 Scout's context": LLAMA | {"max_position_embeddings": 10_485_760, "rope_theta": 3_580_165_449},
    "XLM-V's vocabulary": LLAMA | {"vocab_size": 901_629},
    "ImageNet-21k": LLAMA | {"num_labels": 21_843},
    "DeepSeek-V3": {
        "model_type": "deepseek_v3", "vocab_size": 129_280, "hidden_size": 7168, "intermediate_size": 18_432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "n_routed_experts": 256,
        "num_experts_per_tok": 8,
    },
    "Kimi K2": {
        "model_type": "deepseek_v3", "vocab_size": 163_840, "hidden_size": 7168, "intermediate_size": 18_432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 64, "num_key_value_heads": 64,
        "n_routed_experts": 384,
        "num_experts_per_tok": 8,
    },
    "Qwen3-Next": {
        "model_type": "qwen3_next", "vocab_size": 151_936, "hidden_size": 2048, "num_hidden_layers": 48,
        "num_experts": 512, "num_experts_per_tok": 10,
    },
    "Gemma 3": LLAMA | {"vocab_size": 262_208},
    "Doge": {"model_type": "doge"},
    "Switch Transformers": {"model_type": "switch_transformers", "num_experts": 2048},
}  # fmt: skip


@pytest.mark.parametrize("model", LARGEST)
def test_the_largest_open_models_are_within_the_bounds(model: str) -> None:
    parse_config(LARGEST[model])


def test_the_blueprint_of_126_layers_is_built() -> None:
    blueprint = Blueprint.from_config(LARGEST["Llama 3.1 405B"])
    assert blueprint.parameters == 405_853_388_800 and blueprint.metadata is not None
    assert blueprint.metadata.layers == 126


def test_modules_are_counted_while_they_are_built_and_not_afterwards() -> None:
    with pytest.raises(UserError, match="config: its numbers give more than 10 modules"), limited_modules(10, "config"):
        torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(100))
    assert len(torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(100))) == 100
    assert MAX_MODULES > 126 * 40


def test_numbers_that_build_nothing_may_be_large() -> None:
    check_bounds(
        {"bos_token_id": 2**40, "rope_theta": 10**12, "seed": 2**62, "max_length": 2**31, "on": True}, "config"
    )
    with pytest.raises(UserError, match=r"config: a\.b is -33554432, more than the 16777216"):
        check_bounds({"a": {"b": -(2**25)}}, "config")


ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 10**6}, "rank is 1000000, more than the 65536"),
    "rank of a module": ({"rank_pattern": {"q_proj": 10**5}}, "rank is 100000"),
    "alpha": ({"lora_alpha": 1e999}, "lora_alpha is inf"),
    "layers": ({"layer_replication": [[0, 600], [0, 600]]}, "layer_replication makes 1200 layers"),
    "steps": ({"init_lora_weights": "pissa_niter_10000000"}, "asks for 1e.07 steps, more than the 100"),
    "names": ({"target_modules": [f"m{i}" for i in range(501)]}, "target_modules has 501 entries, more than the 500"),
    "patterns": ({"alpha_pattern": {f"m{i}": 1 for i in range(501)}}, "alpha_pattern has 501 entries"),
    "a long pattern": ({"target_modules": "a" * 1001}, "an entry of more than 1000 characters"),
    "code": ({"megatron_config": {"x": 1}, "megatron_core": "this"}, "megatron_config, which can run code"),
    **{
        f"{key} as {value!r}": ({key: value}, f"{key} is ")
        for key in ("r", "target_modules", "rank_pattern", "modules_to_save", "base_model_name_or_path", "use_rslora")
        for value in (1.5, {"a": None}, [[]])
    },
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_config_beyond_the_bounds_is_refused_before_peft_reads_it(case: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    values, problem = ADAPTERS[case]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **values}))
    with pytest.raises(UserError, match=problem):
        as_lora_config(tmp_path)


@pytest.mark.parametrize("key", ["target_modules", "rank_pattern"])
def test_a_regular_expression_that_backtracks_ends_after_a_second(key: str) -> None:
    pytest.importorskip("peft")
    pattern = r"([\w.]+)+!"
    options = {"r": 2, "target_modules": ["q_proj"]} | {key: {pattern: 4} if key == "rank_pattern" else pattern}
    with pytest.raises(UserError, match="regular expression: takes more than the 1 seconds allowed; give names"):
        Blueprint.from_lora(LLAMA, options)


def test_usual_patterns_are_accepted() -> None:
    pytest.importorskip("peft")
    options = {"r": 2, "target_modules": r".*\.(q|v)_proj", "rank_pattern": {r"layers\.0\..*q_proj": 1}}
    blueprint = Blueprint.from_lora(LLAMA, options)
    assert blueprint.adapter is not None
    assert [(pair.module, pair.rank) for pair in blueprint.adapter.pairs] == [
        ("model.layers.0.self_attn.q_proj", 1),
        ("model.layers.0.self_attn.v_proj", 2),
        ("model.layers.1.self_attn.q_proj", 2),
        ("model.layers.1.self_attn.v_proj", 2),
    ]
