from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.architectures import LISTED, UNLISTED
from tests.zoo.targets.test_blueprint import real_model
from zoo.targets.architectures import ARCHITECTURES
from zoo.targets.blueprint import Blueprint
from zoo.targets.configs import to_disk
from zoo.targets.roles import axis_sizes, parse_name
from zoo.tensors import AXES, NORM_SITES, ROLES, join_parts, split_parts

EVERY = {**LISTED, **UNLISTED}
BLOCK = {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"}
# What a listed architecture leaves to default initialisation, by the end of the module's path.
LEFT_ALONE = (
    "block_sparse_moe.gate",
    "token_type_embeddings",
    "cls.predictions",
    "pooler.dense",
    "vision_tower",
    "multi_modal",
)


@pytest.mark.parametrize("name", LISTED)
def test_every_tensor_of_a_listed_architecture_has_its_role(name: str) -> None:
    blueprint = Blueprint.from_config(LISTED[name])
    if name != "opt-350m":  # whose embedding is narrower than its stream
        assert [n for n in blueprint.unknown if not any(part in n for part in LEFT_ALONE)] == []
    meta = blueprint.metadata
    assert meta is not None and meta.architecture in ARCHITECTURES
    for layer in range(meta.layers):
        roles = {p.role for s in blueprint.specs if s.layer == layer for p in s.parts}
        assert roles >= BLOCK, layer
        experts = range(meta.experts) if meta.experts else [None]
        for role in BLOCK:
            found = blueprint.find(role, layer=layer)
            assert len(found) == (len(experts) if role.startswith("mlp") else 1), role
    gated = bool(blueprint.find("mlp.gate"))
    assert gated == (meta.architecture not in ("gpt2", "gpt_neox", "opt", "bert"))
    if "bare" not in name and name != "opt-350m":
        tables = [p.axes for _, p in blueprint.find("embed")]
        assert tables.count(("vocab", "residual")) == 1
        assert len(blueprint.find("head")) == (0 if meta.tied else 1)


@pytest.mark.parametrize("name", EVERY)
def test_axes_are_as_long_as_the_config_says(name: str) -> None:
    blueprint = Blueprint.from_config(EVERY[name])
    for spec in blueprint.specs:
        length = axis_sizes(blueprint.metadata, spec.expert, spec.layer)
        for part in spec.parts:
            assert part.role in ROLES and set(part.axes) <= set(AXES)
            assert len(part.axes) == len(part.shape)
            assert all(length.get(a, n) == n for a, n in zip(part.axes, part.shape, strict=True)), spec
        assert spec.numel == sum(int(torch.Size(p.shape).numel()) for p in spec.parts)
        assert spec.site is None or spec.site in NORM_SITES
        assert spec.role  # of a fused tensor too


def with_disk(model: nn.Module) -> dict[str, Tensor]:
    ties = model.all_tied_weights_keys
    return to_disk(model, {k: v for k, v in model.state_dict().items() if k not in ties})


def randomised(config: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    model = real_model({**config, "dtype": "float32"}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # biases are zero at the start and would hide mistakes
    return model


def logical(model: nn.Module, role: str, x: Tensor, layer: int = 1) -> Tensor:
    """x [n, in] through the matrix (and bias) of a role, as split out of the tensor on disk."""
    blueprint, tensors = Blueprint.from_module(model), with_disk(model)
    ((spec, _),) = blueprint.find(role, layer=layer)
    out = x @ split_parts(spec, tensors[spec.name])[role].mT
    for bias, _ in blueprint.find(role, layer=layer, kind="bias"):
        out = out + split_parts(bias, tensors[bias.name])[role]
    return out


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "llama-mqa-biased", "opt", "qwen3", "bert"])
def test_queries_keys_and_values_are_those_of_the_module(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v split out of the tensors on disk give what the architecture hands to its attention function, for
    sequences of one token: at position 0 rotary embedding is the identity."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        seen.append((q, k, v))  # [n, heads, 1, head_dim]
        return torch.zeros_like(q).transpose(1, 2), None

    model = randomised(LISTED[name])
    model.config._attn_implementation = "seen"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "seen", attention)
    blueprint = Blueprint.from_module(model)
    meta = blueprint.metadata
    assert meta is not None
    reader = blueprint.find("attn.q", layer=1)[0][0].name.removesuffix(".weight")
    inputs: list[Tensor] = []
    model.get_submodule(reader).register_forward_hook(lambda m, given, out: inputs.append(given[0]))
    with torch.no_grad():
        model(torch.randint(3, 60, (5, 1)))
    for role, heads, actual in zip(
        ("attn.q", "attn.k", "attn.v"), (meta.heads, meta.kv_heads, meta.kv_heads), seen[1], strict=True
    ):
        ours = logical(model, role, inputs[0][:, 0]).unflatten(-1, (heads, -1))
        if name == "qwen3" and role != "attn.v":  # a gain per coordinate of the head, after dividing by the norm
            gain = with_disk(model)[f"model.layers.1.self_attn.{role[-1]}_norm.weight"]
            ours = torch.nn.functional.rms_norm(ours, ours.shape[-1:], gain, 1e-6)
        if name == "opt" and role == "attn.q":
            ours = ours * meta.head_dim**-0.5  # scaled before they are handed on
        torch.testing.assert_close(ours, actual[:, :, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "gemma2", "opt"])
def test_mlps_computed_from_their_parts_are_those_of_the_module(name: str) -> None:
    from transformers.activations import ACT2FN

    model = randomised(LISTED[name])
    blueprint = Blueprint.from_module(model)
    assert blueprint.metadata is not None
    x = torch.randn(3, 32)
    act = ACT2FN[str(blueprint.metadata.extra["activation"])]
    up = logical(model, "mlp.up", x)
    hidden = act(logical(model, "mlp.gate", x)) * up if blueprint.find("mlp.gate") else act(up)
    ours = logical(model, "mlp.down", hidden)
    block = model.get_submodule(blueprint.find("mlp.down", layer=1)[0][0].name.split(".1.")[0])[1]
    theirs = block.fc2(act(block.fc1(x))) if name == "opt" else block.mlp(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_expert_computed_from_its_parts_is_that_of_the_module() -> None:
    """Mixtral's experts are one fused tensor in memory and three per expert on disk: which is gate, up and down shows
    when a router that always takes expert 2 is put before them."""
    model = randomised({**LISTED["mixtral"], "num_experts_per_tok": 1})
    moe = model.model.layers[1].mlp
    x = torch.randn(1, 3, 32).abs()
    with torch.no_grad():
        moe.gate.weight.copy_(torch.tensor([-1.0, -1.0, 1.0])[:, None].expand(3, 32))
    blueprint, tensors = Blueprint.from_module(model), with_disk(model)
    m = {
        role: tensors[blueprint.find(role, layer=1, expert=2)[0][0].name] for role in ("mlp.gate", "mlp.up", "mlp.down")
    }
    ours = (torch.nn.functional.silu(x @ m["mlp.gate"].mT) * (x @ m["mlp.up"].mT)) @ m["mlp.down"].mT
    with torch.no_grad():
        theirs = moe(x)
    torch.testing.assert_close(ours, theirs[0] if isinstance(theirs, tuple) else theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_join_undoes_split(name: str) -> None:
    for spec in Blueprint.from_config(EVERY[name]).specs:
        tensor = torch.randn(spec.shape)
        parts = split_parts(spec, tensor)
        assert {r: tuple(m.shape) for r, m in parts.items()} == {p.role: p.shape for p in spec.parts}
        assert torch.equal(join_parts(spec, parts), tensor)


def roles_of(name: str, **changes: Any) -> dict[str, str]:
    return {s.name: s.role for s in Blueprint.from_config({**EVERY[name], **changes}).specs}


@pytest.mark.parametrize("name", ["stablelm", "granite", "starcoder2", "cohere", "qwen3_moe", "roberta"])
def test_an_unlisted_transformer_is_inferred_whole(name: str) -> None:
    blueprint = Blueprint.from_config(UNLISTED[name])
    assert blueprint.metadata is not None and blueprint.metadata.architecture not in ARCHITECTURES
    for layer in (0, 1):
        assert {p.role for s in blueprint.specs if s.layer == layer for p in s.parts} >= BLOCK
    expected = {"qwen3_moe": ("mlp.gate",), "roberta": ("token_type", "lm_head")}.get(name, ())
    assert [n for n in blueprint.unknown if not any(part in n for part in expected)] == []


def test_an_unlisted_llama_like_model_has_the_roles_of_llama() -> None:
    """granite and llama share names and shapes; the first is inferred, the second listed."""
    listed = {s.name: s for s in Blueprint.from_config({**LISTED["llama"], "num_key_value_heads": 2}).specs}
    inferred = {s.name: s for s in Blueprint.from_config(UNLISTED["granite"]).specs}
    assert inferred == {name: listed[name] for name in inferred}


def test_a_fused_projection_has_the_role_of_all_its_parts() -> None:
    roles = roles_of("falcon")
    assert roles["transformer.h.0.self_attention.query_key_value.weight"] == "attn.qkv"
    assert roles["transformer.h.0.self_attention.dense.weight"] == "attn.o"
    assert roles["transformer.h.1.mlp.dense_4h_to_h.weight"] == "mlp.down"


def test_a_state_space_model_is_mostly_unknown() -> None:
    roles = roles_of("mamba")
    assert roles["backbone.layers.0.mixer.conv1d.weight"] == "conv"
    assert roles["backbone.embeddings.weight"] == "embed" and roles["backbone.norm_f.weight"] == "norm"
    assert {r for n, r in roles.items() if "mixer" in n} == {"conv", "other"}


def test_cross_attention_has_the_role_other() -> None:
    roles = roles_of("t5")
    assert roles["decoder.block.0.layer.1.EncDecAttention.q.weight"] == "other"
    assert roles["decoder.block.0.layer.0.SelfAttention.q.weight"] == "attn.q"


def test_a_name_with_the_wrong_shape_gets_no_role() -> None:
    """OPT-350m's embedding is narrower than its stream, and its norms come after the blocks."""
    blueprint = Blueprint.from_config(LISTED["opt-350m"])
    assert blueprint["model.decoder.embed_tokens.weight"].role == "other"
    assert "model.decoder.project_in.weight" in blueprint.unknown
    assert {s.site for s, _ in blueprint.find("norm")} == {"attn.out", "mlp.out"}
    assert {s.site for s, _ in Blueprint.from_config(LISTED["opt"]).find("norm")} == {"attn", "mlp", "final"}


def test_sites_of_the_norms() -> None:
    def sites(name: str) -> dict[str, str | None]:
        specs = Blueprint.from_config(EVERY[name]).find("norm", layer=0)
        return {s.name.split(".0.")[1].removesuffix(".weight"): s.site for s, _ in specs}

    assert sites("llama") == {"input_layernorm": "attn", "post_attention_layernorm": "mlp"}
    assert sites("gemma3_text") == {
        "input_layernorm": "attn", "post_attention_layernorm": "attn.out", "pre_feedforward_layernorm": "mlp",
        "post_feedforward_layernorm": "mlp.out", "self_attn.q_norm": "q", "self_attn.k_norm": "k",
    }  # fmt: skip
    assert sites("olmo2") == {
        "post_attention_layernorm": "attn.out", "post_feedforward_layernorm": "mlp.out",
        "self_attn.q_norm": "q", "self_attn.k_norm": "k",
    }  # fmt: skip
    assert sites("bert") == {"attention.output.LayerNorm": "attn.out", "output.LayerNorm": "mlp.out"}
    assert sites("starcoder2") == sites("llama")


def test_locate() -> None:
    assert parse_name("model.layers.3.mlp.up_proj.weight") == ("model.layers.{L}.mlp.up_proj", 3, None)
    assert parse_name("layers.12.moe.experts.7.w1.weight") == ("layers.{L}.moe.experts.{E}.w1", 12, 7)
    assert parse_name("lm_head.bias") == ("lm_head", None, None)
    assert parse_name("layer1.0.conv.weight") == ("layer1.0.conv", None, None)
