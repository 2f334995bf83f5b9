"""Parametric fits on donors of known laws, language models and plain modules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from baselines.distributions.families import FAMILIES
from baselines.distributions.parametric import GeneralizedNormal, Laplace, Mixture, Normal, Parametric, Stable, StudentT
from tests.support.shaken import CONFIGS, build, donor
from zoo.donors.memory import load_into, zoo_of
from zoo.donors.zoo import Zoo, open_standalone
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint

WIDE = CONFIGS["llama"] | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 512}


def known(folder: Path, config: dict[str, Any]) -> Zoo:
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
    return open_standalone(folder)


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


def test_fused_transposed_tensors_have_a_distribution_per_part(tmp_path: Path) -> None:
    config = CONFIGS["gpt2"] | {"n_embd": 64}
    model = build(config)
    with torch.no_grad():
        fused = model.get_parameter("transformer.h.0.attn.c_attn.weight")
        for i, std in enumerate((0.1, 0.2, 0.3)):
            fused[:, 64 * i : 64 * (i + 1)].normal_(0, std)
    model.save_pretrained(tmp_path / "donor")
    blueprint = Blueprint.from_config(config)
    got = dict(Normal().fit(open_standalone(tmp_path / "donor"), blueprint).sample(blueprint))
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


METHODS = [Normal, Laplace, StudentT, GeneralizedNormal, Stable, Mixture]


def filled(module: nn.Module, laws: dict[str, tuple[str, dict[str, float]]], seed: int = 0) -> nn.Module:
    """The module with parameters drawn from laws: name -> (family, parameters)."""
    generator = torch.Generator().manual_seed(seed)
    draws = {
        n: FAMILIES[laws[n][0]].sample(laws[n][1], tuple(p.shape), generator) for n, p in module.named_parameters()
    }
    load_into(module, draws.items())
    return module


def sampled(sampler: Parametric, donors: dict[str, nn.Module], target: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    blueprint = Blueprint.from_module(target)
    return dict(sampler.fit(zoo_of(donors), blueprint).sample(blueprint, seed))


@pytest.mark.parametrize("family", METHODS)
def test_every_family_keeps_spread_and_heavy_tails_where_it_has_them(family: type[Parametric]) -> None:
    heavy = {"nu": 4.0, "loc": 0.0, "scale": 0.02, "low": -1.0, "high": 1.0}
    donor = filled(nn.Linear(300, 300, bias=False), {"weight": ("student-t", heavy)})
    got = sampled(family(), {"a": donor}, nn.Linear(300, 300, bias=False))["weight"]
    (weight,) = donor.parameters()
    assert got.shape == weight.shape and got.dtype == torch.float32
    assert abs(got.std() / weight.std() - 1) < 0.08 and abs(got.median() - weight.median()) < 0.001
    far = (got.abs() > 0.2).double().mean() / (weight.abs() > 0.2).double().mean()
    if family is Normal:
        assert far == 0
    elif family is StudentT:
        assert 0.6 < far < 1.6
    elif family is Mixture:
        assert 0.3 < far < 3


def test_options_of_the_families_are_checked() -> None:
    with pytest.raises(UserError, match="mixture: components is 0; give at least 1"):
        Mixture(components=0)
    for clip in (0.25, 0.5):
        with pytest.raises(UserError, match=f"stable: clip is {clip}; give less than 0.25"):
            Stable(clip=clip)
    with pytest.raises(UserError, match=r"stable: clip is -0\.1; give at least 0"):
        Stable(clip=-0.1)


def cnn(channels: int = 8, width: int = 40) -> nn.Sequential:
    head = [nn.Flatten(), nn.Linear(channels * 36, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(nn.Conv2d(1, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), *head)


CNN_STD = {"0.weight": 0.3, "0.bias": 0.1, "1.weight": 0.05, "1.bias": 0.2, "4.weight": 0.02, "6.weight": 0.4}


def trained(seed: int, **sizes: int) -> nn.Module:
    """A CNN of known spreads; the gains of the normalisation lie around 1.5."""
    means = {"1.weight": 1.5}
    laws = {n: ("normal", {"mean": means.get(n, 0.0), "std": CNN_STD.get(n, 0.01)}) for n in names(cnn())}
    return filled(cnn(**sizes), laws, seed)


def names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def test_a_module_is_fitted_to_donors_with_the_same_tensor_names() -> None:
    donors = {f"cnn{i}": trained(i, channels=64) for i in range(3)}
    got = sampled(Normal(), donors, cnn(channels=16))
    assert set(got) == set(names(cnn()))
    assert abs(got["0.weight"].std() / 0.3 - 1) < 0.2 and abs(got["6.weight"].std() / 0.4 - 1) < 0.1
    assert abs(got["4.weight"].std() / (0.02 * math.sqrt(64 / 16)) - 1) < 0.05  # reads a quarter of the inputs
    assert abs(got["1.weight"].mean() - 1.5) < 0.1 and got["1.weight"].std() < 0.1
    module = cnn(channels=16)
    assert load_into(module, got.items()) == names(module)


def test_the_fan_in_of_a_convolution_counts_its_window() -> None:
    donor = filled(nn.Conv2d(4, 64, 5, bias=False), {"weight": ("normal", {"mean": 0.0, "std": 0.1})})
    got = sampled(Normal(), {"a": donor}, nn.Conv2d(8, 64, 3, bias=False))["weight"]
    assert abs(got.std() / (0.1 * math.sqrt(4 * 25 / (8 * 9))) - 1) < 0.05


def test_without_matching_names_tensors_with_equal_rank_are_used() -> None:
    target = nn.Sequential(nn.Flatten(), nn.Linear(36, 50), nn.Tanh(), nn.Linear(50, 10))
    donor = nn.Sequential()
    for i, (size, std) in enumerate({100: 0.3, 99: 0.5}.items()):
        layer = nn.Linear(size, 100)
        nn.init.normal_(layer.weight, 0, std / math.sqrt(size))
        nn.init.normal_(layer.bias, 0, 0.7)
        donor.add_module(f"layer{i}", layer)
    got = sampled(Normal(), {"mlp": donor}, target)
    pooled = math.sqrt((0.3**2 + 0.5**2) / 2)
    assert set(got) == {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert abs(got["1.weight"].std() / (pooled / 6) - 1) < 0.1
    assert abs(got["3.weight"].std() / (pooled / math.sqrt(50)) - 1) < 0.15
    assert 0.5 < got["1.bias"].std() < 0.9


def test_a_zoo_of_language_models_serves_a_module(tmp_path: Path) -> None:
    zoo, target = known(tmp_path / "donor", WIDE), cnn()
    blueprint = Blueprint.from_module(target)
    sampler = Normal().fit(zoo, blueprint)
    got = dict(sampler.sample(blueprint))
    # No donor has a convolution or a bias; the embedding, 25 times as wide, is no matrix that anything sums over.
    assert set(got) == {"1.weight", "4.weight", "6.weight"} and sampler.donors == ("donor",)
    assert abs(got["1.weight"].mean() - 1.5) < 0.2
    matrices = [
        zoo.donors[0].read(s.name) for s in zoo.donors[0].blueprint.specs if len(s.shape) == 2 and s.role != "embed"
    ]
    pooled = torch.cat([matrix.flatten() * math.sqrt(matrix.shape[1]) for matrix in matrices])
    assert abs(got["4.weight"].std() * math.sqrt(8 * 36) / pooled.std() - 1) < 0.03
    convolutions = Blueprint.from_module(nn.Conv2d(3, 4, 3, bias=False))
    with pytest.raises(UserError, match="no donor has a tensor with a name of the target or with as many axes"):
        Normal().planned_donors(zoo, convolutions)


def test_donors_with_more_of_a_modules_names_are_preferred() -> None:
    zoo = zoo_of({"cnn": trained(0), "mlp": nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))})
    assert Normal().planned_donors(zoo, Blueprint.from_module(cnn(16))) == ("cnn",)
    assert Normal(donor="mlp").planned_donors(zoo, Blueprint.from_module(cnn(16))) == ("mlp",)


def test_layers_of_modules_follow_relative_depth() -> None:
    def stack(depth: int) -> nn.Module:
        return nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(64, 64) for _ in range(depth)])})

    donor = stack(3)
    for i, block in enumerate(donor["blocks"]):  # type: ignore[index,arg-type]
        nn.init.normal_(block.weight, 0, 0.1 * (i + 1))
    got = sampled(Normal(), {"a": donor}, stack(5))
    stds = [got[f"blocks.{i}.weight"].std().item() for i in range(5)]
    assert [round(std, 1) for std in stds] == [0.1, 0.1, 0.2, 0.3, 0.3]  # halves go to the even layer
    by_role = sampled(Normal(granularity="role"), {"a": donor}, stack(5))
    assert all(abs(by_role[f"blocks.{i}.weight"].std() - 0.216) < 0.02 for i in range(5))
    as_one = sampled(Normal(granularity="global"), {"a": donor}, nn.Linear(16, 64))
    assert abs(as_one["weight"].std() / (0.216 * math.sqrt(64 / 16)) - 1) < 0.1


def test_bytes_do_not_depend_on_the_order_of_tensors(tmp_path: Path) -> None:
    zoo, blueprint = known(tmp_path / "donor", CONFIGS["gpt2"]), Blueprint.from_config(CONFIGS["gpt2"])
    sampler = StudentT().fit(zoo, blueprint)
    whole = dict(sampler.sample(blueprint, seed=5))
    backwards = dict(sampler.sample(Blueprint(blueprint.specs[::-1], blueprint.metadata, blueprint.config), seed=5))
    assert all(torch.equal(whole[name], backwards[name]) for name in whole)
    again = dict(StudentT().fit(zoo, blueprint).sample(blueprint, seed=5))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
