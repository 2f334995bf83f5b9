"""One pipeline of a zoo of several families generates each of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM

from autoencoder.loading import load_component
from diffusion import WeightDiffusionPipeline
from diffusion.conditions import SIZE, Wanted, condition_values, fit_scales
from diffusion.denoiser import LatentDenoiser
from diffusion.sampler import DiffusionSampler
from tests.support.generators import family_target, family_zoo, shaken_pipeline, train_both
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.units.family import FLAGS, require_target_family

FAMILIES = ("qwen3", "gpt2")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    with patch("autoencoder.report.FLOP_STEPS", 0):
        yield family_zoo(tmp_path_factory.mktemp("families"), *FAMILIES)


@pytest.fixture(scope="module")
def trained(zoo: Zoo) -> Path:
    folder = zoo.path.parent
    train_both(zoo.path, folder / "text.txt", folder)
    return folder / "pipeline"


@pytest.fixture(scope="module")
def pipe(trained: Path) -> WeightDiffusionPipeline:
    return shaken_pipeline(trained)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_each_family_loads_into_transformers(
    family: str, tied: bool, pipe: WeightDiffusionPipeline, tmp_path: Path
) -> None:
    target = family_target(family, tie_word_embeddings=tied)
    output = pipe(target, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    weights = output.state_dict()
    assert {name: tuple(t.shape) for name, t in weights.items()} == {
        spec.name: spec.shape for spec in Blueprint.from_config(target).specs
    }
    assert all(tensor.isfinite().all() for tensor in weights.values())
    output.save_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert model(torch.arange(20)[None]).logits.std() > 0.01


def test_a_renamed_head_is_saved(pipe: WeightDiffusionPipeline, tmp_path: Path) -> None:
    """transformers calls the head of GPT-NeoX otherwise in memory than on disk."""
    target = family_target("gpt_neox", tie_word_embeddings=False)
    output = pipe(target, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    output.save_pretrained(tmp_path)
    head = AutoModelForCausalLM.from_pretrained(tmp_path).get_output_embeddings().weight
    assert torch.equal(head, output.state_dict()["embed_out.weight"])


def test_the_family_is_a_condition(pipe: WeightDiffusionPipeline, trained: Path) -> None:
    assert (
        pipe.denoiser.config["several_families"]
        and json.loads((trained / "denoiser" / "config.json").read_text())["several_families"]
    )
    qwen3, gpt2 = (require_target_family(Blueprint.from_config(family_target(f)), f) for f in FAMILIES)
    same_sizes = replace(gpt2, **{s: getattr(qwen3, s) for s in ("width", "layers", "heads", "kv_heads", "head_dim")})
    same_sizes = replace(same_sizes, ffn=qwen3.ffn, tied=qwen3.tied, rope_theta=qwen3.rope_theta)
    values = [condition_values(Wanted(shape), several_families=True) for shape in (qwen3, same_sizes)]
    assert values[0].shape == (SIZE + FLAGS,) and torch.equal(values[0][:10], values[1][:10])
    assert torch.equal(condition_values(Wanted(qwen3)).nan_to_num(), values[0][:SIZE].nan_to_num())
    with torch.no_grad():
        one, other = (pipe.denoiser.embed(v[None]) for v in values)
    assert (one - other).norm() > 1e-3


def test_a_family_that_all_donors_share_has_no_effect() -> None:
    shape = require_target_family(Blueprint.from_config(family_target("qwen3")), "qwen3")
    gpt2 = require_target_family(Blueprint.from_config(family_target("gpt2")), "gpt2")
    values = torch.stack([condition_values(Wanted(replace(shape, width=w)), True) for w in (32, 64)])
    model = LatentDenoiser(4, 6, hidden=32, layers=1, several_families=True)
    for name, found in zip(("mean", "inverse"), fit_scales(values, ["", ""]), strict=True):
        model.get_buffer(name).copy_(found)
    moved = values[0].clone()
    moved[SIZE:] = condition_values(Wanted(gpt2), True)[SIZE:]
    with torch.no_grad():
        assert torch.equal(model.embed(values[:1]), model.embed(moved[None]))
    assert "family" not in LatentDenoiser(4, 6, hidden=32, layers=1).groups


def test_other_families_are_refused_or_said(trained: Path) -> None:
    opt = {"model_type": "opt", "vocab_size": 256, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32}
    opt |= {"num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    sampler = DiffusionSampler(model=str(trained), steps=1)
    blueprint = Blueprint.from_config(opt)
    details = sampler.fit(None, blueprint).details(blueprint)
    assert details == {"family": ["no donor has the target's activation: expect a weak start"]}
    bert = Blueprint.from_config({"model_type": "bert", "vocab_size": 256, "hidden_size": 32, "num_attention_heads": 4})
    with pytest.raises(UserError, match=r"^target: "):
        sampler.fit(None, bert)
    qwen3 = Blueprint.from_config(family_target("qwen3"))
    assert DiffusionSampler(model=str(trained)).fit(None, qwen3).details(qwen3) == {}


def test_a_denoiser_that_was_saved_before_families_loads(tmp_path: Path) -> None:
    folder = tmp_path / "denoiser"
    LatentDenoiser(4, 6, hidden=32, layers=1).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    assert values.pop("several_families") is False
    (folder / "config.json").write_text(json.dumps(values))
    assert load_component(LatentDenoiser, folder, "config.json", "train one").config["several_families"] is False
