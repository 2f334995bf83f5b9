"""Checkpoints with their blueprints: names that differ, tied heads, and weights that are not what the config says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zoo.donors.model_checkpoint import ModelCheckpoint, check_against_blueprint
from zoo.errors import UserError

Make = Callable[..., Path]


def test_shards_and_a_single_file_have_the_tensors_of_their_blueprint(tmp_path: Path, tiny_llama: Make) -> None:
    whole = ModelCheckpoint.open(tiny_llama(tmp_path / "whole"))
    parts = ModelCheckpoint.open(tiny_llama(tmp_path / "parts", max_shard_size="40KB"))
    assert whole.parameters == parts.parameters == whole.blueprint.parameters
    assert check_against_blueprint(whole) == check_against_blueprint(parts) == ()


def test_config_and_weights_that_disagree_are_named(tmp_path: Path, tiny_llama: Make) -> None:
    folder = tiny_llama(tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(UserError, match=r"mlp.*\[(64, 32|32, 64)\].*\[(80, 32|32, 80)\]"):
        check_against_blueprint(ModelCheckpoint.open(folder))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"model\.layers\.2\..*\(and 8 more\)"):
        check_against_blueprint(ModelCheckpoint.open(folder))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert len(check_against_blueprint(ModelCheckpoint.open(folder))) == 9


def test_a_tied_head_may_be_stored_or_not_or_instead(tmp_path: Path, tiny_llama: Make) -> None:
    folder = tiny_llama(tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert check_against_blueprint(ModelCheckpoint.open(folder)) == ()
    embed = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embed.clone()}, folder / "model.safetensors")
    assert check_against_blueprint(ModelCheckpoint.open(folder)) == ()
    del tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embed.clone()}, folder / "model.safetensors")
    checkpoint = ModelCheckpoint.open(folder)
    assert check_against_blueprint(checkpoint) == ()
    assert torch.equal(checkpoint.read("model.embed_tokens.weight"), embed)


def test_names_without_the_models_prefix_are_understood(tmp_path: Path) -> None:
    """As openai-community/gpt2 has them: `h.0.…` under a config whose model has `transformer.h.0.…`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {n.removeprefix("transformer."): t for n, t in tensors.items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 16, 16)}, tmp_path / "model.safetensors")
    checkpoint = ModelCheckpoint.open(tmp_path)
    assert check_against_blueprint(checkpoint) == ("h.0.attn.bias",)
    assert all(torch.equal(checkpoint.read(n), t) for n, t in tensors.items())
    with pytest.raises(UserError, match="unknown tensor"):
        checkpoint.read("transformer.h.9.ln_1.weight")


def test_the_real_checkpoints(shared_data: Path) -> None:
    folders = sorted(p.parent for p in (shared_data / "models").glob("**/config.json"))
    assert len(folders) > 25
    for folder in folders:
        checkpoint = ModelCheckpoint.open(folder)
        assert check_against_blueprint(checkpoint) == ()
        reference = load_file(folder / "model.safetensors")
        assert set(reference) == set(checkpoint.names)
        assert all(torch.equal(checkpoint.read(n), t) for n, t in reference.items())
        vocabulary = checkpoint.vocabulary()
        assert vocabulary is not None and max(vocabulary.values()) < checkpoint.config["vocab_size"]
