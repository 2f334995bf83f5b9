"""A trained pipeline from outside: its config must describe the tensors that lie beside it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoencoder.field import FieldSizes
from autoencoder.loading import load_autoencoder
from autoencoder.model import WeightAutoencoder, new_autoencoder
from diffusion.denoiser import LatentDenoiser
from diffusion.pipeline import WeightDiffusionPipeline, load_pipeline
from diffusion.solving import make_scheduler
from zoo.errors import UserError

DONOR = {"name": "donor", "revision": "r", "sha256": "0", "license": "mit"}
SIZES = FieldSizes(
    width=8, neurons=6, groups=2, head_dim=4, tokens=3, bases=2, token_bases=1, rank=5, model_latent=4, block_latent=4,
    hidden=6,
)  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


def coder() -> WeightAutoencoder:
    return new_autoencoder(SIZES, ("a", "b", "c"), "llama", [DONOR], 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    coder().save_pretrained(tmp_path)
    return tmp_path


def test_a_sound_autoencoder_is_loaded(folder: Path) -> None:
    loaded = load_autoencoder(folder)
    assert loaded.sizes == SIZES and loaded.config["donors"] == [DONOR] and loaded.token_strings == ("a", "b", "c")
    stored = load_file(folder / WEIGHTS)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.state_dict().items())


def sizes(**changes: object) -> dict[str, Any]:
    return {"sizes": {**SIZES.to_json(), **changes}}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (sizes(width=10**9), "has shape .*, its config gives"),
        (sizes(width=10**30), "its config cannot be used"),
        (sizes(width=-8), "its config cannot be used|has shape"),
        (sizes(width="8"), "values are each a whole number"),
        (sizes(bases=10**8), "has shape .*, its config gives"),
        (sizes(more=1), "its config cannot be used"),
        ({"sizes": {"width": 8}}, "its config cannot be used"),
        ({"sizes": [8]}, "sizes is "),
        ({"hidden": 7}, "has shape"),
        ({"hidden": None}, "hidden is "),
        ({"tokens": "abc"}, "tokens is "),
        ({"tokens": [1, 2, 3]}, "tokens"),
        ({"donors": [1]}, "donors is "),
        ({"donors": [{"name": 1}]}, "name is 1; it must be text"),
        ({"_class_name": ["WeightAutoencoder"]}, "describes no class, not WeightAutoencoder"),
        ({"_class_name": "UnitAutoencoder"}, "describes UnitAutoencoder, not WeightAutoencoder; train one with"),
    ],
)
def test_a_config_of_other_tensors_is_refused_before_they_are_built(
    change: dict[str, Any], problem: str, folder: Path
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    start = time.process_time()
    with pytest.raises(UserError, match=problem) as refused:
        load_autoencoder(folder)
    assert time.process_time() - start < 5 and "\n" not in str(refused.value)


def test_a_list_of_tokens_that_the_field_does_not_have_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokens": ["a", "b"]}))
    with pytest.raises(UserError, match="2 token strings for 3 rows of the field"):
        load_autoencoder(folder)


def test_values_that_are_no_numbers_are_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["field.bases.key"][0, 0, 0] = torch.nan
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"'field\.bases\.key' holds NaN or infinity"):
        load_autoencoder(folder)


def test_parts_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    WeightDiffusionPipeline(coder(), LatentDenoiser(4, 4, hidden=8, layers=1), make_scheduler()).save_pretrained(
        tmp_path / "sound"
    )
    assert load_pipeline(str(tmp_path / "sound")).donors == [DONOR]
    WeightDiffusionPipeline(coder(), LatentDenoiser(4, 5, hidden=8, layers=1), make_scheduler()).save_pretrained(
        tmp_path / "odd"
    )
    with pytest.raises(UserError, match="its parts do not fit together"):
        load_pipeline(str(tmp_path / "odd"))
