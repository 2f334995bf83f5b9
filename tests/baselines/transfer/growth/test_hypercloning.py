"""HyperCloning tiles its donor and computes its function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from baselines.transfer.growth.hypercloning import HyperCloning
from tests.support.grown import CONFIGS, grown, largest_logit_change, logit_tolerance, random_model, resized
from zoo.donors.memory import zoo_of
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint


def times(name: str, factor: int, ffn: int) -> dict[str, int]:
    keys = CONFIGS[name].get("num_key_value_heads", 4)
    more = dict(num_attention_heads=4 * factor, num_key_value_heads=keys * factor)
    return dict(hidden_size=32 * factor, intermediate_size=48 * ffn, **more)


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa-tied", "qwen2", "qwen3", "gemma2", "olmo2", "gpt2", "opt"])
@pytest.mark.parametrize(("factor", "ffn", "noise"), [(2, 3, 0.0), (3, 2, 0.3)])
def test_two_and_three_times_the_width_is_exact(name: str, factor: int, ffn: int, noise: float) -> None:
    sampler = HyperCloning(noise=noise)
    assert largest_logit_change(
        sampler, random_model(CONFIGS[name]), resized(name, **times(name, factor, ffn))
    ) < logit_tolerance(name)


def test_tiles_as_published() -> None:
    """tile(n_out, n_in) / n_in; embedding, biases and gains undivided; query and KV heads multiplied."""
    donor = random_model(CONFIGS["qwen2"])
    got = grown(HyperCloning(), donor, resized("qwen2", **times("qwen2", 2, 3))).state_dict()
    w = donor.state_dict()
    layer = "model.layers.1."
    for name, factors in {
        "self_attn.q_proj.weight": (2, 2), "self_attn.k_proj.weight": (2, 2), "self_attn.o_proj.weight": (2, 2),
        "mlp.gate_proj.weight": (3, 2), "mlp.down_proj.weight": (2, 3),
    }.items():  # fmt: skip
        torch.testing.assert_close(got[layer + name], w[layer + name].repeat(*factors) / factors[1])
    torch.testing.assert_close(got["lm_head.weight"], w["lm_head.weight"].repeat(1, 2) / 2)
    assert torch.equal(got["model.embed_tokens.weight"], w["model.embed_tokens.weight"].repeat(1, 2))
    for name in ("self_attn.q_proj.bias", "self_attn.v_proj.bias", "input_layernorm.weight"):
        assert torch.equal(got[layer + name], w[layer + name].repeat(2))


@pytest.mark.parametrize(("heads", "keys"), [(4, 2), (8, 2), (12, 6), (24, 6)])
def test_heads_have_factors_of_their_own(heads: int, keys: int) -> None:
    config = resized("llama-gqa-tied", hidden_size=96, num_attention_heads=heads, num_key_value_heads=keys)
    for noise in (0.0, 0.3):
        assert largest_logit_change(HyperCloning(noise=noise), random_model(CONFIGS["llama-gqa-tied"]), config) < 1e-9


def test_query_heads_repeat_inside_a_group_whose_keys_stay() -> None:
    donor = random_model(CONFIGS["qwen3"])
    config = resized("qwen3", hidden_size=64, num_attention_heads=8, num_key_value_heads=2)
    got, w = grown(HyperCloning(), donor, config).state_dict(), donor.state_dict()
    name = "model.layers.0.self_attn.{}_proj.weight"
    q, o = w[name.format("q")].view(2, 16, 32), w[name.format("o")].view(32, 2, 16)
    torch.testing.assert_close(got[name.format("q")], q.repeat(1, 2, 2).flatten(0, 1) / 2)
    torch.testing.assert_close(got[name.format("o")], o.repeat(2, 1, 2).flatten(1) / 2)
    torch.testing.assert_close(got[name.format("k")], w[name.format("k")].repeat(1, 2) / 2)


@pytest.mark.parametrize("factor", [2, 3])
def test_noise_comes_in_pairs(factor: int) -> None:
    """Blocks +N, -N, and an odd one without; N relative to the matrix, other for every output block."""
    donor = random_model(CONFIGS["llama-mha"])
    config = resized("llama-mha", **times("llama-mha", factor, 1))
    clean, noisy = (grown(HyperCloning(noise=noise), donor, config).state_dict() for noise in (0.0, 0.1))
    name = "model.layers.0.mlp.up_proj.weight"
    noise = (noisy[name] - clean[name]).unflatten(1, (factor, 32))
    torch.testing.assert_close(noise[:, 0], -noise[:, 1], atol=1e-12, rtol=0)
    assert factor == 2 or not noise[:, 2].any()
    assert abs(float(noise[:, 0].std() / clean[name].square().mean().sqrt()) - 0.1) < 0.01
    o = "model.layers.0.self_attn.o_proj.weight"
    rows = (noisy[o] - clean[o]).unflatten(0, (factor, 32))
    assert not torch.allclose(rows[0], rows[1])
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(noisy[name], clean[name])


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_copies_separate_in_training_only_with_noise(noise: float) -> None:
    tokens = torch.arange(28).view(2, 14) * 11 % 40
    donor = random_model(CONFIGS["llama-mha"])
    model = grown(HyperCloning(noise=noise), donor, resized("llama-mha", **times("llama-mha", 2, 2)))
    model(tokens, labels=tokens).loss.backward()
    gradient = model.get_parameter("model.layers.0.mlp.up_proj.weight").grad
    first, second = gradient.chunk(2)
    assert (float((first - second).norm() / gradient.norm()) > 1e-4) == (noise > 0)


REFUSED = [
    (
        {"hidden_size": 48},
        "width 48 is not a multiple of the donor's 32 .use 32 or 64.; net2wider takes any size",
    ),
    ({"intermediate_size": 60}, "ffn 60 is not a multiple of the donor's 48 .use 48 or 96."),
    (
        {"num_key_value_heads": 3, "num_attention_heads": 6, "hidden_size": 96},
        "kv_heads 3 is not a multiple of the donor's 2 .use 2 or 4.",
    ),
    ({"num_key_value_heads": 4, "hidden_size": 64}, "heads per KV head 1 is not a multiple of the donor's 2"),
    ({"num_hidden_layers": 3}, "layers 2 is not the target's 3: use net2wider for width and depth, stacking"),
    ({"hidden_size": 16}, "width 32 would shrink to 16"),
]


@pytest.mark.parametrize(("sizes", "reason"), REFUSED)
def test_a_fractional_factor_is_refused_with_an_alternative(sizes: dict[str, int], reason: str) -> None:
    zoo = zoo_of({"donor": random_model(CONFIGS["llama-gqa-tied"])})
    blueprint = Blueprint.from_config(resized("llama-gqa-tied", **sizes))
    for act in (HyperCloning().fit, HyperCloning().planned_donors):
        with pytest.raises(UserError, match=reason):
            act(zoo, blueprint)


def test_suitable_donors_are_named_or_chosen() -> None:
    zoo = zoo_of(
        {str(width): random_model(resized("llama-mha", hidden_size=width)) for width in (20, 24, 32)},
    )
    blueprint = Blueprint.from_config(resized("llama-mha", hidden_size=48))
    with pytest.raises(UserError, match=r"width 48 .* \(donors of this zoo that fit: 24\)"):
        HyperCloning(donor="32").fit(zoo, blueprint)
    assert HyperCloning().fit(zoo, blueprint).donors == ("24",)


@pytest.mark.parametrize(("name", "factor"), [("stories260K", 3), ("babyllama-tok105", 2)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_real_checkpoints_keep_their_logits(
    shared_data: Path, name: str, factor: int, dtype: torch.dtype, limit: float
) -> None:
    donor = AutoModelForCausalLM.from_pretrained(shared_data / "models" / name, dtype=dtype).eval()
    config = donor.config.to_dict()
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        config[key] *= factor
    assert largest_logit_change(HyperCloning(noise=0.1), donor, config) < limit
