"""Growth with fused projections, ALiBi, norms without weights and experts: the donor's function stays."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from baselines.transfer.growth.alibi import alibi_slopes
from baselines.transfer.growth.base import Growth
from baselines.transfer.growth.hypercloning import HyperCloning
from baselines.transfer.growth.net2wider import Net2Wider
from baselines.transfer.growth.stacking import Stacking
from baselines.transfer.weight_selection import WeightSelection
from tests.support.architectures import EXPERTS, FUSED, UNLISTED
from zoo.donors.memory import zoo_of
from zoo.errors import UserError
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint
from zoo.targets.configs import meta_model, parse_config, quiet_transformers

WIDER: dict[str, dict[str, Any]] = {
    **{name: {"hidden_size": 64, "num_attention_heads": 8} for name in FUSED if name.startswith("falcon")},
    "falcon-40b": {"hidden_size": 64, "num_attention_heads": 8, "num_kv_heads": 4},
    "falcon-11b": {"hidden_size": 64, "num_attention_heads": 8},  # more query heads for each KV head
    "bloom": {"hidden_size": 64, "n_head": 8},
    "mpt": {"d_model": 64, "n_heads": 8},
    **{name: {"n_embd": 64, "n_head": 8, "n_inner": 96} for name in ("gpt_bigcode", "gpt_bigcode-mha", "codegen")},
    "persimmon": {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 96},
}
LLAMA_WIDER = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}
WIDER |= dict.fromkeys(("glm", "glm4", "olmo", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe"), LLAMA_WIDER)
WIDER |= {name: {"hidden_size": 64, "intermediate_size": 96} for name in ("deepseek_v2", "deepseek_v3")}
MORE_EXPERTS = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 4},
    **{name: {"num_experts": 8, "num_experts_per_tok": 4} for name in ("qwen2_moe", "qwen3_moe", "olmoe")},
    **{name: {"n_routed_experts": 8, "num_experts_per_tok": 4} for name in ("deepseek_v2", "deepseek_v3")},
}
WIDER_EXPERTS = {
    **{name: {"intermediate_size": 96} for name in ("mixtral", "olmoe")},
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    **{name: {"moe_intermediate_size": 32} for name in ("qwen3_moe", "deepseek_v2", "deepseek_v3")},
}
CONFIGS = {**UNLISTED, **EXPERTS}
# transformers computes RMSNorm, OLMo's LayerNorm and the weights of experts in float32, whatever the model's dtype.
SINGLE = ("glm", "glm4", "olmo", *EXPERTS)


def random_donor(config: dict[str, Any]) -> nn.Module:
    """A model in float64 whose parameters are all random, with outputs of about unit size."""
    parsed = parse_config(config)
    with quiet_transformers():
        model = type(meta_model(parsed))._from_config(parsed)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            draws = torch.randn(p.shape, generator=generator)
            p.copy_(p + 0.2 * draws if p.ndim < 2 else draws / p.shape[-1] ** 0.5)
    return model.double().eval()


def logits(model: nn.Module) -> Tensor:
    model.config._experts_implementation = "eager"  # the other implementations have no float64
    with torch.no_grad():
        return model(input_ids=torch.arange(28).view(2, 14) * 7 % 64, use_cache=False).logits


def grown(sampler: Growth, donor: nn.Module, config: dict[str, Any]) -> nn.Module:
    blueprint = Blueprint.from_config(config)
    tensors = dict(sampler.fit(zoo_of({"donor": donor}), blueprint).sample(blueprint, 0))
    assert set(tensors) == set(blueprint.names)
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        parse_config(config).save_pretrained(folder)
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
        cls = type(meta_model(parse_config(config)))
        model, info = cls.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def assert_same_function(name: str, change: dict[str, Any], *samplers: Growth) -> None:
    donor = random_donor(CONFIGS[name])
    before = logits(donor)
    assert before.std() > 0.1
    for sampler in samplers:
        difference = (logits(grown(sampler, donor, {**CONFIGS[name], **change})) - before).abs().max() / before.std()
        assert difference < (1e-5 if name in SINGLE else 1e-12), sampler.name


@pytest.mark.parametrize("name", WIDER)
def test_a_wider_model_computes_the_same(name: str) -> None:
    assert_same_function(name, WIDER[name], HyperCloning(), Net2Wider())


@pytest.mark.parametrize("name", EXPERTS)
def test_wider_experts_compute_the_same(name: str) -> None:
    assert_same_function(name, WIDER_EXPERTS[name], HyperCloning(noise=0.1), Net2Wider())


@pytest.mark.parametrize("name", EXPERTS)
def test_copies_of_experts_that_are_chosen_together_compute_the_same(name: str) -> None:
    assert_same_function(name, MORE_EXPERTS[name], HyperCloning(), Net2Wider())


@pytest.mark.parametrize("name", ["mixtral", "olmo", "bloom", "falcon-40b"])
def test_a_deeper_model_computes_the_same(name: str) -> None:
    depth = {"n_layer": 4} if name == "bloom" else {"num_hidden_layers": 4}
    assert_same_function(name, depth, Net2Wider(), Stacking(exact=True))


def refusal(name: str, change: dict[str, Any], sampler: Growth | None = None) -> str:
    config = {**CONFIGS[name], **change}
    with pytest.raises(UserError) as error:
        (sampler or Net2Wider()).fit(zoo_of({"donor": random_donor(CONFIGS[name])}), Blueprint.from_config(config))
    return str(error.value)


def test_experts_that_would_not_be_chosen_together_are_refused() -> None:
    text = refusal("mixtral", {"num_local_experts": 8})
    assert "experts 4 -> 8 with 2 -> 2 per token" in text and "(to 8 and 4)" in text
    assert "experts 4 -> 6" in refusal("qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 3}, HyperCloning())
    assert "not divided by their sum" in refusal(
        "deepseek_v3", {**MORE_EXPERTS["deepseek_v3"], "norm_topk_prob": False}
    )
    assert "experts 4 would shrink to 2" in refusal("mixtral", {"num_local_experts": 2})


def test_norms_on_the_stream_of_bloom_allow_no_silent_layer() -> None:
    config = {**CONFIGS["bloom"], "apply_residual_connection_post_layernorm": True}
    donor, deeper = random_donor(config), Blueprint.from_config({**config, "n_layer": 3})
    with pytest.raises(UserError, match="its norms act on the residual stream, so that no layer can be silent"):
        Net2Wider().fit(zoo_of({"donor": donor}), deeper)
    wider = logits(grown(Net2Wider(), donor, {**config, **WIDER["bloom"]}))
    assert (wider - logits(donor)).abs().max() < 1e-12 * logits(donor).std()


def test_another_number_of_experts_per_token_is_said() -> None:
    donor, config = random_donor(CONFIGS["mixtral"]), {**CONFIGS["mixtral"], "num_experts_per_tok": 1}
    blueprint = Blueprint.from_config(config)
    sampler = Net2Wider().fit(zoo_of({"donor": donor}), blueprint)
    assert "experts_per_token 2 -> 1" in sampler.function_differences(blueprint)


def test_each_copy_of_an_expert_has_its_row_of_the_router() -> None:
    donor = random_donor(CONFIGS["mixtral"])
    blueprint = Blueprint.from_config({**CONFIGS["mixtral"], **MORE_EXPERTS["mixtral"]})
    tensors = dict(Net2Wider().fit(zoo_of({"donor": donor}), blueprint).sample(blueprint))
    router = donor.state_dict()["model.layers.1.mlp.gate.weight"]
    assert torch.equal(tensors["model.layers.1.block_sparse_moe.gate.weight"], router.repeat_interleave(2, 0))


def test_latent_attention_keeps_its_heads() -> None:
    text = refusal("deepseek_v3", {"num_attention_heads": 8, "num_key_value_heads": 8})
    assert "kv_b_proj has 64 coordinates, not the target's 128, and their number stays" in text


def test_layers_with_and_without_experts_keep_their_depth() -> None:
    assert "layers of several kinds" in refusal("deepseek_v3", {"num_hidden_layers": 3})


@pytest.mark.parametrize("architecture", ["bloom", "falcon", "mpt"])
@pytest.mark.parametrize("heads", [4, 6, 8, 12])
def test_slopes_are_those_of_transformers(architecture: str, heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor as mpt

    if architecture == "mpt":
        slopes = -mpt(heads, 2)[:, 0, 0]  # the bias of the token before
    else:
        slopes = {"bloom": bloom, "falcon": falcon}[architecture](torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    rtol = 1e-2 if architecture == "falcon" else 1e-6  # Falcon rounds to bfloat16
    torch.testing.assert_close(alibi_slopes(architecture, heads).float(), slopes.float(), rtol=rtol, atol=0)


def test_any_number_of_heads_that_has_the_slopes_computes_the_same() -> None:
    """The first four slopes of five heads are those of four heads in MPT."""
    assert_same_function("mpt", {"d_model": 40, "n_heads": 5}, Net2Wider(residual="pad"))


@pytest.mark.parametrize("architecture", ["bloom", "mpt"])
def test_more_heads_have_the_slopes_of_fewer(architecture: str) -> None:
    slopes = [set(alibi_slopes(architecture, heads).tolist()) for heads in range(1, 80)]
    assert all(len(found) == heads for heads, found in enumerate(slopes, 1))
    assert all(few <= more for i, few in enumerate(slopes) for more in slopes[i:])


def test_heads_of_different_slopes_that_share_keys_are_refused() -> None:
    grouped = {**CONFIGS["falcon-40b"], "alibi": True}
    with pytest.raises(UserError, match="query heads of different ALiBi slopes share keys: keep its 4 heads"):
        wide = Blueprint.from_config({**grouped, **WIDER["falcon-40b"]})
        Net2Wider().fit(zoo_of({"donor": random_donor(grouped)}), wide)


@pytest.mark.parametrize("sampler", [WeightSelection(), HyperCloning()])
def test_slopes_that_change_are_said(caplog: pytest.LogCaptureFixture, sampler: Sampler) -> None:
    sizes = {"hidden_size": 16, "n_head": 2} if sampler.name == "weight-selection" else WIDER["bloom"]
    blueprint = Blueprint.from_config(CONFIGS["bloom"] | sizes)
    with caplog.at_level("INFO"):
        sampler.fit(zoo_of({"donor": random_donor(CONFIGS["bloom"])}), blueprint)
    said = "heads get the ALiBi slopes of the target, not those of the donor's heads" in caplog.text
    assert said == (sampler.name == "weight-selection")
