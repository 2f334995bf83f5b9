"""The normal fit on donors of known laws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from baselines.parametric import Normal
from tests.baselines.shaken import CONFIGS, build, donor
from zoo.blueprint import Blueprint
from zoo.errors import UserError
from zoo.single import Single, single

WIDE = CONFIGS["llama"] | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 512}


def known(folder: Path, config: dict[str, Any]) -> Single:
    """A donor whose matrices have std 0.01 (layer + 1), mean 0.002, embedding 0.5, gains around 1.5."""
    model = build(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            layer = int(name.split(".")[2]) if ".layers." in name else 0
            if parameter.ndim == 1:
                parameter.normal_(1.5, 0.2)
            elif "embed" in name:
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0.002, 0.01 * (layer + 1))
    model.save_pretrained(folder)
    return single(folder)


def test_spread_mean_and_gain_are_the_donors(tmp_path: Path) -> None:
    blueprint = Blueprint.from_config(WIDE)
    got = dict(Normal().fit(known(tmp_path / "donor", WIDE), blueprint).sample(blueprint))
    assert set(got) == set(blueprint.names)
    for name, tensor in got.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        if tensor.ndim == 1:
            assert tensor.unique().numel() == 1 and abs(tensor.mean() - 1.5) < 0.1, name
        else:
            std = 0.5 if "embed" in name else 0.01 * (layer + 1)
            assert abs(tensor.std() / std - 1) < 0.05, name
            assert "embed" in name or abs(tensor.mean() - 0.002) < 0.05 * std, name


def test_spread_follows_fan_in_and_relative_depth(tmp_path: Path) -> None:
    zoo = known(tmp_path / "donor", WIDE)
    target = WIDE | {"hidden_size": 32, "num_hidden_layers": 7}
    blueprint = Blueprint.from_config(target)
    name = "model.layers.{}.mlp.{}_proj.weight"
    got = dict(Normal().fit(zoo, blueprint).sample(blueprint))
    assert abs(got[name.format(6, "up")].std() / (0.04 * math.sqrt(128 / 32)) - 1) < 0.05  # reads the narrower stream
    assert abs(got[name.format(6, "down")].std() / 0.04 - 1) < 0.05  # reads the FFN, which is as wide
    assert abs(got[name.format(0, "down")].std() / 0.01 - 1) < 0.05
    assert abs(got["model.embed_tokens.weight"].std() / 0.5 - 1) < 0.05
    plain = dict(Normal(rescale="none").fit(zoo, blueprint).sample(blueprint))
    assert abs(plain[name.format(6, "up")].std() / 0.04 - 1) < 0.05


def test_granularity_pools_layers_and_roles(tmp_path: Path) -> None:
    zoo, blueprint = known(tmp_path / "donor", WIDE), Blueprint.from_config(WIDE)
    pooled = math.sqrt(sum((0.01 * (layer + 1)) ** 2 for layer in range(4)) / 4)
    by_role = dict(Normal(granularity="role").fit(zoo, blueprint).sample(blueprint))
    for layer in range(4):
        assert abs(by_role[f"model.layers.{layer}.mlp.up_proj.weight"].std() / pooled - 1) < 0.05
    as_one = dict(Normal(granularity="global", rescale="none").fit(zoo, blueprint).sample(blueprint))
    spreads = {n: t.std().item() for n, t in as_one.items() if t.ndim == 2 and "embed" not in n}
    assert max(spreads.values()) / min(spreads.values()) < 1.1


def test_fused_transposed_tensors_keep_a_law_per_part(tmp_path: Path) -> None:
    config = CONFIGS["gpt2"] | {"n_embd": 64}
    model = build(config)
    with torch.no_grad():
        fused = model.get_parameter("transformer.h.0.attn.c_attn.weight")
        for i, std in enumerate((0.1, 0.2, 0.3)):
            fused[:, 64 * i : 64 * (i + 1)].normal_(0, std)
    model.save_pretrained(tmp_path / "donor")
    blueprint = Blueprint.from_config(config)
    got = dict(Normal().fit(single(tmp_path / "donor"), blueprint).sample(blueprint))
    parts = got["transformer.h.0.attn.c_attn.weight"].split(64, dim=1)
    assert all(abs(part.std() / std - 1) < 0.05 for part, std in zip(parts, (0.1, 0.2, 0.3), strict=True))


def test_gains_cross_families_as_what_they_multiply_by(tmp_path: Path) -> None:
    zoo = known(tmp_path / "donor", CONFIGS["llama"])
    blueprint = Blueprint.from_config(CONFIGS["llama"] | {"model_type": "gemma", "tie_word_embeddings": True})
    got = dict(Normal().fit(zoo, blueprint).sample(blueprint))
    assert abs(got["model.norm.weight"].mean() - 0.5) < 0.1  # Gemma multiplies by 1 + what is stored


def test_a_saved_fit_needs_no_donor(tmp_path: Path) -> None:
    zoo, blueprint = known(tmp_path / "donor", CONFIGS["llama"]), Blueprint.from_config(CONFIGS["llama"])
    sampler = Normal().fit(zoo, blueprint)
    sampler.save(tmp_path / "saved")
    for file in zoo.path.iterdir():
        file.unlink()
    loaded = Normal.load(tmp_path / "saved")
    expected = dict(sampler.sample(blueprint, seed=2))
    assert loaded.donors == sampler.donors == ("donor",)
    assert all(torch.equal(expected[name], tensor) for name, tensor in loaded.sample(blueprint, seed=2))
    assert not torch.equal(expected["lm_head.weight"], dict(loaded.sample(blueprint, seed=3))["lm_head.weight"])


def test_what_no_donor_has_is_left_out_or_refused(tmp_path: Path) -> None:
    zoo = donor(tmp_path / "donor", CONFIGS["llama"])
    blueprint = Blueprint.from_config(CONFIGS["qwen3"])
    got = dict(Normal().fit(zoo, blueprint).sample(blueprint))
    assert set(blueprint.names) - set(got) == {n for n in blueprint.names if "q_norm" in n or "k_norm" in n}
    with pytest.raises(UserError, match="needs donors"):
        Normal().fit(None, blueprint)
    with pytest.raises(UserError, match="unknown granularity of normal 'layers': did you mean 'layer'"):
        Normal(granularity="layers")
