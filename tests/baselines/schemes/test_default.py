"""The default initialisation, block by block, against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import ks_2samp
from torch import nn

from baselines.schemes.default import Default, empty_model, model_blocks
from tests.support.shaken import CONFIGS
from zoo.targets.blueprint import Blueprint, to_disk

LARGER: dict[str, dict[str, Any]] = {
    "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "initializer_range": 0.05,
}  # fmt: skip


def reference(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """`from_config` under a seed, with names as on disk."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    rest = {k: v for k, v in config.items() if k != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **rest))
    ties = model.all_tied_weights_keys
    return to_disk(model, {k: v.detach() for k, v in model.state_dict().items() if k not in ties})


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3_text", "mixtral", "opt"])
def test_the_distribution_is_that_of_from_config(name: str) -> None:
    larger = {"n_embd": 64, "vocab_size": 128, "initializer_range": 0.05} if name == "gpt2" else LARGER
    config = CONFIGS[name] | larger
    if name == "opt":
        config |= {"ffn_dim": 96, "word_embed_proj_dim": 64}
    blueprint = Blueprint.from_config(config)
    ours, theirs = dict(Default().sample(blueprint, seed=0)), reference(config)
    assert set(ours) == set(blueprint.names) == set(theirs)
    for tensor, tensor_theirs, key in ((ours[k], theirs[k], k) for k in ours):
        assert tensor.shape == tensor_theirs.shape, key
        if tensor_theirs.std() == 0:  # gains, biases
            assert torch.equal(tensor, tensor_theirs), key
        else:
            p = ks_2samp(tensor.flatten().numpy(), tensor_theirs.flatten().numpy()).pvalue
            assert p > 1e-4, f"{key}: p = {p}"


def test_gpt2_projections_onto_the_stream_are_scaled_by_depth() -> None:
    blueprint = Blueprint.from_config(CONFIGS["gpt2"] | {"n_embd": 64, "n_layer": 8})
    got = dict(Default().sample(blueprint))
    for name in ("attn.c_proj", "mlp.c_proj"):
        assert abs(got[f"transformer.h.3.{name}.weight"].std() / (0.02 / 16**0.5) - 1) < 0.05
    assert abs(got["transformer.h.3.mlp.c_fc.weight"].std() / 0.02 - 1) < 0.05


def test_padding_rows_are_zero_and_ties_are_not_on_disk() -> None:
    got = dict(Default().sample(Blueprint.from_config(CONFIGS["qwen3"])))
    assert not got["model.embed_tokens.weight"][0].any() and "lm_head.weight" not in got


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_bytes_depend_on_seed_and_name_alone(name: str) -> None:
    blueprint = Blueprint.from_config(CONFIGS[name])
    whole = dict(Default().sample(blueprint, seed=4))
    some = [n for n in blueprint.names if "layers.1" in n][::-2]
    torch.manual_seed(123)
    part = dict(Default().fill(blueprint, some, seed=4))
    assert set(part) == set(some)
    assert all(torch.equal(part[n], whole[n]) for n in some)
    other = dict(Default().sample(blueprint, seed=5))
    matrices = [n for n in blueprint.names if whole[n].ndim >= 2]
    assert not any(torch.equal(whole[n], other[n]) for n in matrices)
    assert not torch.equal(*(whole[n] for n in matrices if n.endswith("self_attn.o_proj.weight")))


def test_the_caller_keeps_its_random_state() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    list(Default().sample(Blueprint.from_config(CONFIGS["llama"])))
    assert torch.equal(torch.rand(3), expected)


def test_scale_multiplies_matrices_only() -> None:
    blueprint = Blueprint.from_config(CONFIGS["gpt2"])
    once, half = dict(Default().sample(blueprint)), dict(Default(scale=0.5).sample(blueprint))
    for name, tensor in once.items():
        assert torch.equal(half[name], tensor * (0.5 if tensor.ndim >= 2 else 1.0))


def test_blocks_cover_every_tensor_once_and_are_small() -> None:
    blueprint = Blueprint.from_config(CONFIGS["gemma3_text"])
    model = empty_model(blueprint)
    seen = [prefix + name for prefix, block, _ in model_blocks(model) for name, _ in block.named_parameters()]
    assert sorted(seen) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False))
    assert all(p.device.type == "meta" for p in model.parameters())
    assert sum(prefix.startswith("model.layers.") for prefix, _, _ in model_blocks(model)) == 2


class Plain(nn.Module):
    """Torch's own modules, and a parameter that only the constructor sets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2)])
        self.head = nn.Linear(8, 4, bias=False)


def test_a_plain_module_gets_torchs_defaults() -> None:
    module = Plain()
    blueprint = Blueprint.from_module(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(9.0)
    got = dict(Default().sample(blueprint, seed=0))
    assert set(got) == {name for name, _ in module.named_parameters()}
    bound = 1 / (3 * 9) ** 0.5
    assert 0.9 * bound < got["stem.weight"].abs().max() <= bound
    assert torch.equal(got["body.1.1.weight"], torch.ones(8))
    assert not torch.equal(got["body.0.0.weight"], got["body.1.0.weight"])
    assert all((p == 9.0).all() for p in module.parameters())  # the module itself is left alone
