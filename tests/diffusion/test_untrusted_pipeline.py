"""A trained pipeline from outside: its config must describe the tensors that lie beside it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoencoder.loading import load_autoencoder
from autoencoder.model import UnitAutoencoder
from zoo.errors import UserError
from zoo.units.units import ROLES

DONOR = {"name": "donor", "revision": "r", "sha256": "0", "license": "mit"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    UnitAutoencoder(4, dict.fromkeys(ROLES, 3), hidden=2, donors=[DONOR]).save_pretrained(tmp_path)
    return tmp_path


def test_a_sound_autoencoder_is_loaded(folder: Path) -> None:
    loaded = load_autoencoder(folder)
    assert loaded.width == 4 and loaded.config["donors"] == [DONOR]
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"width": 10**9}, "has shape .*, its config gives"),
        ({"width": 10**30}, "its config cannot be used"),
        ({"width": -4}, "its config cannot be used"),
        ({"width": "4"}, "width is '4'; it must be a whole number"),
        ({"latent": {"neuron": 10**8}}, "has shape|lacks the tensor"),
        ({"latent": {"neuron": None}}, "latent is "),
        ({"latent": {"vo": 3}}, "knows no "),
        ({"latent": dict.fromkeys(map(str, range(100_000)), 1)}, "cannot be used|more than 15000 modules"),
        ({"hidden": 7}, "has shape"),
        ({"donors": [1]}, "donors is "),
        ({"donors": [{"name": 1}]}, "name is 1; it must be text"),
        ({"_class_name": ["UnitAutoencoder"]}, "describes no class, not UnitAutoencoder"),
    ],
)
def test_a_config_of_other_tensors_is_refused_before_they_are_built(
    change: dict[str, Any], problem: str, folder: Path
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    start = time.process_time()
    with pytest.raises(UserError, match=problem):
        load_autoencoder(folder)
    assert time.process_time() - start < 5


def test_values_that_are_no_numbers_are_refused(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["mean_vo"][0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(UserError, match="'mean_vo' holds NaN or infinity"):
        load_autoencoder(folder)
