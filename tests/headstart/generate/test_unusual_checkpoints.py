"""Configs, shards and dtypes as older tools and the hub have them: exact growth stays exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.commands import generate
from tests.support.shaken import CONFIGS, build, logits
from zoo.add import add
from zoo.errors import UserError

WIDER = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3], "rope_type": "longrope",
    "rope_theta": 1e4, "original_max_position_embeddings": 16,
}  # fmt: skip
# name: (architecture, its options, keys that the file lacks, keys that the file has besides)
OLDER: dict[str, tuple[str, dict[str, Any], tuple[str, ...], dict[str, Any]]] = {
    "transformers 4": (
        "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, ("rope_parameters", "dtype"),
        {"rope_theta": 5e5, "rope_scaling": None, "head_dim": None, "transformers_version": "4.40.0",
         "torch_dtype": "float32"},
    ),
    "llama 3 scaling": (
        "llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3}}, ("rope_parameters",),
        {"rope_theta": 1e4, "rope_scaling": {"type": "llama3", "rope_type": "llama3", **LLAMA3}},
    ),
    "type for rope_type": (
        "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, ("rope_parameters",),
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "longrope": (
        "phi3", {"original_max_position_embeddings": 16, "rope_parameters": LONG}, ("rope_parameters",),
        {"rope_theta": 1e4, "rope_scaling": {**LONG, "type": "longrope"}},
    ),
    "nulls": ("llama", {"model_type": "mistral"}, (), {"head_dim": None, "sliding_window": None}),
    "remote code": ("phi3", {}, (), {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}}),
    "no architectures": ("qwen2", {}, ("architectures",), {}),
    "unknown keys": ("qwen2", {}, (), {"use_mrope": False, "my_training": {"lr": 1}, "use_sliding_window": False}),
}  # fmt: skip


def saved(folder: Path, config: dict[str, Any], **options: Any) -> Path:
    build(config).save_pretrained(folder, **options)  # type: ignore[operator]
    return folder


def change(folder: Path, without: tuple[str, ...] = (), **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    content = {key: value for key, value in content.items() if key not in without} | changes
    (folder / "config.json").write_text(json.dumps(content))


def target_of(source: Path, folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(source / "config.json", folder)
    change(folder, **WIDER | changes)
    return folder


def grown(source: Path, target: Path, out: Path, **more: Any) -> Path:
    return generate(target, "hypercloning", out, donor=str(source), settings=["noise=0"], **more)


def assert_same(first: Path, second: Path, tolerance: float = 2e-5) -> None:
    before, after = logits(first), logits(second)
    assert (after - before).abs().max() < tolerance * before.std()


@pytest.mark.parametrize("name", OLDER)
def test_an_older_config_means_what_it_meant(tmp_path: Path, name: str) -> None:
    architecture, options, without, changes = OLDER[name]
    source = saved(tmp_path / "donor", CONFIGS[architecture] | options)
    expected = logits(source)
    change(source, without, **changes)
    assert torch.equal(logits(source), expected)
    out = grown(source, target_of(source, tmp_path / "target"), tmp_path / "out")
    assert_same(source, out)


def test_an_older_target_of_a_newer_donor(tmp_path: Path) -> None:
    options = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    source = saved(tmp_path / "donor", CONFIGS["llama"] | options)
    target = target_of(source, tmp_path / "target")
    change(target, ("rope_parameters",), rope_theta=5e5)
    assert_same(source, grown(source, target, tmp_path / "out"))


def test_shards_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", CONFIGS["llama"], max_shard_size="20KB")
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    target = target_of(whole, tmp_path / "target")
    add([str(whole)], tmp_path / "zoo", quiet=True)
    out = generate(target, "hypercloning", tmp_path / "out", zoo=tmp_path / "zoo", settings=["noise=0"])
    assert_same(whole, out)
    lost = tmp_path / "lost"
    shutil.copytree(whole, lost)
    (lost / shards[1]).unlink()
    with pytest.raises(UserError, match=rf"{shards[1]}"):
        add([str(lost)], tmp_path / "zoo", quiet=True)
    stale = tmp_path / "stale"
    shutil.copytree(whole, stale)
    other = next(file for file in shards if file != index["weight_map"]["lm_head.weight"])
    changed = index | {"weight_map": index["weight_map"] | {"lm_head.weight": other}}
    (stale / "model.safetensors.index.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=rf"{other} lacks 'lm_head.weight'"):
        add([str(stale)], tmp_path / "zoo", quiet=True)
    build(CONFIGS["llama"], seed=9).save_pretrained(tmp_path / "single")  # type: ignore[operator]
    shutil.copy(tmp_path / "single" / "model.safetensors", whole)  # beside the shards: transformers takes this one
    assert torch.equal(logits(whole), logits(tmp_path / "single"))
    assert_same(whole, grown(whole, target, tmp_path / "stray"))


@pytest.mark.parametrize(("changes", "without", "asked", "written"), [
    ({"dtype": "bfloat16"}, (), None, torch.bfloat16), ({"torch_dtype": "bfloat16"}, ("dtype",), None, torch.bfloat16),
    ({}, ("dtype",), None, torch.float32), ({"dtype": None}, (), None, torch.float32),
    ({"dtype": "bfloat16"}, (), "float16", torch.float16),
])  # fmt: skip
def test_a_half_precision_donor_is_grown_in_the_targets_dtype(
    tmp_path: Path, changes: dict, without: tuple[str, ...], asked: str | None, written: torch.dtype
) -> None:
    source = tmp_path / "donor"
    build(CONFIGS["llama"]).bfloat16().save_pretrained(source)  # type: ignore[operator]
    target = target_of(source, tmp_path / "target")
    change(target, without, **changes)
    out = grown(source, target, tmp_path / "out", dtype=asked)
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {written}
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == str(written).removeprefix("torch.") and "torch_dtype" not in config
    assert_same(source, out, 0.05)
