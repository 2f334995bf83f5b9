"""Checkpoints with their blueprints: names that differ, tied heads, and weights that are not what the config says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zoo.add import add
from zoo.donors.folder import StandaloneDonor
from zoo.donors.model_checkpoint import ModelCheckpoint, check_against_blueprint, describe_reading
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


def rename(folder: Path, new_name: Callable[[str], str], more: dict[str, torch.Tensor] | None = None) -> Path:
    """Renames all tensors of a checkpoint of one file, and adds `more`."""
    tensors = load_file(folder / "model.safetensors")
    save_file({new_name(n): t for n, t in tensors.items()} | (more or {}), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model.", "a.b.c."])
@pytest.mark.parametrize("tied", [True, False])
def test_the_prefix_of_a_wrapper_is_left_out(tmp_path: Path, tiny_llama: Make, prefix: str, tied: bool) -> None:
    """DistributedDataParallel, torch.compile and PEFT put one before every name."""
    folder = tiny_llama(tmp_path / "a", tie_word_embeddings=tied)
    tensors = load_file(folder / "model.safetensors")
    checkpoint = ModelCheckpoint.open(rename(folder, lambda name: prefix + name))
    assert check_against_blueprint(checkpoint) == ()
    assert all(torch.equal(checkpoint.read(n), t) for n, t in tensors.items())
    assert describe_reading(checkpoint) == [f"the names of its tensors are read without the prefix {prefix!r}"]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_base_model_and_a_language_model_read_each_others_names(
    tmp_path: Path, tiny_llama: Make, prefix: str
) -> None:
    """`LlamaModel.save_pretrained` writes `layers.0…`; a config may name either class."""
    folder = tiny_llama(tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    rename(folder, lambda name: prefix + name.removeprefix("model."))
    checkpoint = ModelCheckpoint.open(folder)
    assert check_against_blueprint(checkpoint) == ()
    assert all(torch.equal(checkpoint.read(n), t) for n, t in tensors.items())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    save_file({prefix + n: t for n, t in tensors.items()}, folder / "model.safetensors")
    checkpoint = ModelCheckpoint.open(folder)
    assert check_against_blueprint(checkpoint) == ()
    assert all(torch.equal(checkpoint.read(n.removeprefix("model.")), t) for n, t in tensors.items())


def test_two_models_in_one_checkpoint_are_refused(tmp_path: Path, tiny_llama: Make) -> None:
    folder = tiny_llama(tmp_path / "a")
    other = {f"policy.{n}": t + 1 for n, t in load_file(folder / "model.safetensors").items()}
    checkpoint = ModelCheckpoint.open(rename(folder, lambda name: f"ref.{name}", other))
    with pytest.raises(UserError, match=r"prefixes 'ref\.' and 'policy\.', which are two models"):
        check_against_blueprint(checkpoint)


def test_a_tensor_of_the_same_ending_is_no_substitute(tmp_path: Path, tiny_llama: Make) -> None:
    """`lm_head.weight` and `model.norm.weight` are missing, and others end like them."""
    folder = tiny_llama(tmp_path / "a", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    head, norm = tensors.pop("lm_head.weight"), tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"describes 'model\.norm\.weight' \(and 1 more\), which is missing"):
        check_against_blueprint(ModelCheckpoint.open(folder))
    save_file(tensors | {"ema.model.norm.weight": norm, "old.lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(UserError, match="is missing"):
        check_against_blueprint(ModelCheckpoint.open(folder))


def test_an_adapter_that_is_not_merged_is_named(tmp_path: Path, tiny_llama: Make) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(tmp_path / "a", tie_word_embeddings=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    with pytest.raises(UserError, match=r"adapter is not merged; call merge_and_unload\(\)"):
        check_against_blueprint(ModelCheckpoint.open(folder))
    merged = model.merge_and_unload().state_dict()
    save_file({f"base_model.model.{n}": t for n, t in merged.items()}, folder / "model.safetensors")
    assert check_against_blueprint(ModelCheckpoint.open(folder)) == ()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_tied_config_with_another_head_on_disk_is_read_as_transformers_loads_it(
    tmp_path: Path, tiny_llama: Make, prefix: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(tmp_path / "a", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"])  # of this version of transformers
    checkpoint = ModelCheckpoint.open(rename(folder, lambda name: prefix + name))
    assert check_against_blueprint(checkpoint) == ()
    assert "lm_head.weight" in checkpoint.blueprint and checkpoint.blueprint.ties == {}
    assert checkpoint.blueprint.config == config | {"tie_word_embeddings": False}
    assert checkpoint.blueprint.metadata is not None and not checkpoint.blueprint.metadata.tied
    assert all(torch.equal(checkpoint.read(n), t) for n, t in loaded.state_dict().items())
    assert "ties 'lm_head.weight' and the files have other values" in describe_reading(checkpoint)[-1]


@pytest.mark.parametrize("change", ["equal", "minus zero", "bfloat16"])
def test_a_tied_head_with_the_values_of_the_embedding_stays_tied(tmp_path: Path, tiny_llama: Make, change: str) -> None:
    folder = tiny_llama(tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    embed = tensors["model.embed_tokens.weight"].bfloat16().float()
    embed[0] = 0.0
    head = -0.0 * embed if change == "minus zero" else embed.clone()
    head = torch.where(embed == 0, head, embed).to(torch.bfloat16 if change == "bfloat16" else torch.float32)
    save_file(tensors | {"model.embed_tokens.weight": embed, "lm_head.weight": head}, folder / "model.safetensors")
    checkpoint = ModelCheckpoint.open(folder)
    assert checkpoint.blueprint.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert check_against_blueprint(checkpoint) == () == tuple(describe_reading(checkpoint))


def test_tensors_outside_the_config_that_are_larger_than_the_model_are_refused_unread(
    tmp_path: Path, tiny_llama: Make
) -> None:
    """A sparse file of one terabyte would be hashed for minutes."""
    folder = tiny_llama(tmp_path / "a")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    begin = len(content) - end
    header["extra"] = {"dtype": "F32", "shape": [250_000, 1_000_000], "data_offsets": [begin, begin + 10**12]}
    text = json.dumps(header).encode()
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text + content[end:])
        f.truncate(8 + len(text) + begin + 10**12)
    for use in (
        lambda: check_against_blueprint(ModelCheckpoint.open(folder)),
        lambda: add([str(folder)], tmp_path / "zoo", quiet=True),
        lambda: StandaloneDonor.open(folder),
    ):
        with pytest.raises(
            UserError, match=r"'extra' of shape \[250000, 1000000\] does not belong to the architecture"
        ):
            use()
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"vocab_size": 96', '"vocab_size": 97')
    )
    with pytest.raises(UserError, match=r"has shape \[96, 32\], the config describes \[97, 32\]"):
        ModelCheckpoint.open(folder).read("model.embed_tokens.weight")


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
