"""The written-down initialisations against the laws that their sources state, and against what they compute."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.linalg import hadamard
from scipy.stats import kstest, truncnorm
from torch import Tensor, nn

from baselines.schemes.default import Default
from baselines.schemes.rules import GPT2, Identity, ScaledDefault, TruncatedNormal, repeated_identity, zero_matrix
from headstart.generate.sampling import sample_with_defaults
from tests.support.commands import generate
from tests.support.shaken import CONFIGS, logits
from zoo.checkpoints.writer import write_checkpoint
from zoo.errors import UserError
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint
from zoo.tensors import split_parts

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256, "num_hidden_layers": 3, "head_dim": 16},
    "gpt2": {"n_embd": 64, "vocab_size": 256, "n_layer": 3, "n_positions": 64},
}
SIZES |= {name: SIZES["llama"] for name in ("llama-tied", "qwen2", "gemma2", "phi3")}
ALL: tuple[Sampler, ...] = (
    GPT2(), TruncatedNormal(), TruncatedNormal(recipe="olmo"), TruncatedNormal(recipe="olmo2"), ScaledDefault(),
    Identity(), Identity(scheme="zero"), Identity(scheme="nanochat"),
)  # fmt: skip


def config(name: str) -> dict[str, Any]:
    return CONFIGS[name] | SIZES[name]


def parts(sampler: Sampler, name: str) -> dict[tuple[str, int | None], Tensor]:
    """(role, layer) -> logical matrix. Tables of tokens and positions are `vocab` and `position`."""
    blueprint = Blueprint.from_config(config(name))
    found: dict[tuple[str, int | None], Tensor] = {}
    for tensor_name, tensor in sampler.fit(None, blueprint).sample(blueprint):
        spec = blueprint[tensor_name]
        assert tensor.shape == spec.shape and tensor.dtype == torch.float32 and tensor.isfinite().all()
        if spec.kind == "weight" and spec.role != "norm":
            for part in spec.parts:
                role = part.axes[0] if part.role == "embed" else part.role
                found[role, spec.layer] = split_parts(spec, tensor)[part.role]
    return found


def std_is(values: Tensor, std: float, kurtosis: float = 3.0) -> bool:
    """Whether a sample has mean zero and this standard deviation, within three standard errors."""
    n = values.numel()
    error = 3 * std * math.sqrt((kurtosis - 1) / (4 * n))
    return bool(abs(values.double().std() - std) < error and abs(values.double().mean()) < 3 * std / math.sqrt(n))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "phi3"])
def test_gpt2_divides_what_writes_to_the_stream(name: str) -> None:
    for (role, _), matrix in parts(GPT2(), name).items():
        assert std_is(matrix, 0.02 / math.sqrt(6) if role in ("attn.o", "mlp.down") else 0.02), role


def test_gpt2_is_transformers_own_for_gpt2() -> None:
    blueprint = Blueprint.from_config(config("gpt2"))
    ours, theirs = dict(GPT2().sample(blueprint)), dict(Default().sample(blueprint))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        if tensor.std() == 0:
            assert torch.equal(ours[name], tensor), name
        else:
            error = 3 * tensor.std() / math.sqrt(tensor.numel())  # of a difference of two sample deviations
            assert abs(ours[name].std() - tensor.std()) < error, name


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma2"])
def test_truncated_normals_follow_their_recipes(name: str) -> None:
    d, ffn = 64, 256 if name == "gpt2" else 128
    gated, tied = name != "gpt2", name != "llama"
    normal = truncnorm(-3, 3)
    for (role, layer), matrix in parts(TruncatedNormal(), name).items():
        deep = 0.02 / math.sqrt(2 * ((layer or 0) + 1))
        if role == "head" or (role == "vocab" and tied):
            assert matrix.abs().max() <= 3 * d**-0.5
            assert std_is(matrix, d**-0.5 * normal.std(), 2.8), role
        elif role in ("vocab", "position"):
            assert std_is(matrix, 1.0), role
        else:
            assert std_is(matrix, deep if role in ("attn.o", "mlp.down") or (role == "mlp.up" and gated) else 0.02), (
                role
            )
    for (role, layer), matrix in parts(TruncatedNormal(recipe="olmo"), name).items():
        depth = 2 * ((layer or 0) + 1)
        std = {"attn.o": (d * depth) ** -0.5, "mlp.down": (ffn * depth) ** -0.5}.get(role, d**-0.5)
        assert matrix.abs().max() <= 3 * std and std_is(matrix, std * normal.std(), 2.8), role
        assert matrix.numel() < 10_000 or kstest(matrix.flatten().numpy() / std, normal.cdf).pvalue > 1e-4
    for (role, _), matrix in parts(TruncatedNormal(recipe="olmo2", std=0.1), name).items():
        assert 0.2 < matrix.abs().max() <= 0.3 and std_is(matrix, 0.1 * normal.std(), 2.8), role


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_nanochat_is_uniform_with_silent_blocks(name: str) -> None:
    for (role, _), matrix in parts(Identity(scheme="nanochat"), name).items():
        if role in ("attn.o", "mlp.down"):
            assert not matrix.any(), role
        elif role in ("vocab", "position", "head"):
            std = 0.001 if role == "head" else 1 / 8 if role == "vocab" and name != "llama" else 1.0
            assert std_is(matrix, std), role
        else:
            assert matrix.abs().max() <= math.sqrt(3) / 8 and std_is(matrix, 1 / 8, 1.8), role


def test_norms_multiply_by_one_and_biases_add_nothing() -> None:
    for name, gain in (("llama", 1.0), ("gpt2", 1.0), ("gemma2", 0.0), ("qwen2", 1.0)):
        blueprint = Blueprint.from_config(config(name))
        got = dict(GPT2().sample(blueprint))
        vectors = {s.name: s.kind for s in blueprint.specs if len(s.shape) == 1}
        assert all((got[n] == (gain if kind == "weight" else 0.0)).all() for n, kind in vectors.items()), name


@pytest.mark.parametrize("shape", [(1, 4), (5, 3), (8, 8), (3, 7), (12, 5), (16, 9), (33, 32)])
def test_zero_is_the_corner_of_a_hadamard_matrix(shape: tuple[int, int]) -> None:
    rows, columns = shape
    size = 2 ** math.ceil(math.log2(rows))
    corner = torch.eye(rows, size) @ torch.tensor(hadamard(size)).float() @ torch.eye(size, columns) / size**0.5
    assert torch.allclose(zero_matrix(rows, columns), torch.eye(rows, columns) if rows <= columns else corner)


def test_repeated_identities_keep_every_input_and_have_full_rank() -> None:
    tall = repeated_identity(7, 3)
    assert (
        torch.equal(tall[:3], torch.eye(3)) and torch.equal(tall[3:6], torch.eye(3)) and torch.equal(tall[6], tall[0])
    )
    assert torch.equal(repeated_identity(3, 7), tall.mT)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gemma2", "mixtral"])
@pytest.mark.parametrize("scheme", ["zero", "idinit", "nanochat"])
def test_an_identity_is_its_embedding_norm_and_head(name: str, scheme: str, tmp_path: Path) -> None:
    """The logits of the whole model are those of transformers' own embedding, final norm and head without a block."""
    from transformers import AutoModelForCausalLM

    blueprint = Blueprint.from_config(CONFIGS[name])
    sampler = Identity(scheme=scheme).fit(None, blueprint)
    write_checkpoint(tmp_path / "model", blueprint, sample_with_defaults(sampler, blueprint, 0))
    whole = logits(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    stack = model.get_decoder()
    (stack.h if name == "gpt2" else stack.layers).__init__()  # type: ignore[misc]
    model.config.num_hidden_layers = 0
    with torch.no_grad():
        empty = model(torch.arange(1, 25).view(2, 12), use_cache=False).logits
    exact = 1e-6 if scheme != "idinit" else 0.03 if name == "gemma2" else 1e-3  # its norms after blocks amplify epsilon
    assert whole.std() > 1e-4 and (whole - empty).abs().max() < exact * whole.abs().max()


def test_scaled_default_is_the_default_times_two_scales() -> None:
    blueprint = Blueprint.from_config(CONFIGS["qwen2"])
    base = dict(Default().sample(blueprint))
    got = dict(ScaledDefault(scale=0.25, embeddings=2.0).sample(blueprint))
    for name, tensor in base.items():
        factor = 1.0 if tensor.ndim == 1 else 2.0 if "embed" in name or "lm_head" in name else 0.25
        assert torch.equal(got[name], factor * tensor), name
    one_scale = dict(ScaledDefault(scale=0.25).sample(blueprint))
    assert all(torch.equal(one_scale[n], t) for n, t in Default(scale=0.25).sample(blueprint))


@pytest.mark.parametrize("sampler", ALL, ids=lambda s: f"{s.name}-{next(iter(s.options().values()))}")
def test_bytes_depend_on_the_seed_only_and_survive_saving(sampler: Sampler, tmp_path: Path) -> None:
    blueprint = Blueprint.from_config(CONFIGS["gpt2"])
    sampler.fit(None, blueprint).save(tmp_path)
    first = dict(sampler.sample(blueprint, seed=3))
    again = dict(type(sampler).load(tmp_path).sample(blueprint, seed=3))
    assert set(first) == set(again) and all(torch.equal(first[n], again[n]) for n in first)
    drawn = [n for n, t in first.items() if t.ndim > 1 and (t != t[0, 0]).any()]
    other = dict(sampler.sample(blueprint, seed=4))
    differ = [n for n in drawn if not torch.equal(other[n], first[n])]
    deterministic = sampler.name == "identity" and sampler.options()["scheme"] != "nanochat"
    assert deterministic or differ == drawn


def test_a_generated_folder_loads(tmp_path: Path) -> None:
    for method, settings in (("gpt2", []), ("truncated-normal", ["recipe=olmo"]), ("identity", []), ("mimetic", [])):
        generate(CONFIGS["llama-tied"], method, tmp_path / method, settings=settings, quiet=True)
        assert logits(tmp_path / method).isfinite().all()


def test_a_target_of_unknown_tensors_is_refused() -> None:
    blueprint = Blueprint.from_module(nn.LSTM(4, 4))
    for sampler in (GPT2(), Identity()):
        with pytest.raises(UserError, match="has a rule for none of the target's 4 tensors; use default"):
            sampler.planned_donors(None, blueprint)
    with pytest.raises(UserError, match="unknown recipe of truncated-normal 'olm'"):
        TruncatedNormal(recipe="olm")
