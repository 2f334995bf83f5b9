"""Filters with a donor's covariance: known covariances, other depths and widths, and a small zoo on digits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MambaConfig

from baselines.distributions.conv_covariance import ConvCovariance, nearest_in_depth
from benchmarks.convolutions import initialised_network, load_digits_split, train, train_donors
from zoo.donors.memory import zoo_of
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.training.loop import reproducible


def smooth(taps: int, width: float) -> Tensor:
    """A covariance of neighbouring taps."""
    i = torch.arange(taps, dtype=torch.float64)
    return (-((i[:, None] - i) ** 2) / (2 * width**2)).exp() + 0.01 * torch.eye(taps, dtype=torch.float64)


def coloured(conv: nn.Module, covariance: Tensor, seed: int, mean: float = 0.0) -> None:
    """Fills a convolution with filters of that covariance at fan-in 1."""
    weight: Tensor = conv.weight  # type: ignore[assignment]
    root = torch.linalg.cholesky(covariance).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        z = torch.randn(weight.shape[:2].numel(), len(root), generator=generator)
        weight.copy_(((z @ root.mT + mean) / weight[0].numel() ** 0.5).view(weight.shape))


def chain(widths: list[int], kernel: int, groups: bool = False) -> nn.Sequential:
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(nn.Conv2d(a, b, kernel, groups=a if groups else 1) for a, b in pairs))


def moments(weight: Tensor) -> tuple[Tensor, Tensor]:
    filters = weight.flatten(0, 1).flatten(1).double() * weight[0].numel() ** 0.5
    return filters.mean(0), filters.mT.cov(correction=0)


@pytest.mark.parametrize("groups", [False, True])
def test_filters_have_the_covariance_of_their_depth(groups: bool) -> None:
    """Three convolutions with three covariances, to five of another width: each has that of the nearest depth."""
    donors, laws = {}, [smooth(9, 0.5), smooth(9, 2.0), smooth(9, 5.0)]
    for name, seed in (("a", 0), ("b", 1)):
        donor = chain([900] * 4 if groups else [30, 30, 30, 30], 3, groups)
        for conv, covariance in zip(donor, laws, strict=True):
            coloured(conv, covariance, seed)
        donors[name] = donor
    target = chain([4000] * 6 if groups else [64] * 6, 3, groups)
    blueprint = Blueprint.from_module(target)
    sampler = ConvCovariance().fit(zoo_of(donors), blueprint)
    drawn = dict(sampler.sample(blueprint, 0))
    assert set(drawn) == {f"{i}.weight" for i in range(5)}  # biases keep their default
    for i, depth in enumerate((0, 0, 1, 2, 2)):
        mean, covariance = moments(drawn[f"{i}.weight"])
        assert (covariance - laws[depth]).norm() / laws[depth].norm() < 0.15
        assert mean.abs().max() < 0.1
    assert [nearest_in_depth(i, 5, 3) for i in range(5)] == [0, 0, 1, 2, 2]


def test_the_mean_filter_and_the_scale_are_options() -> None:
    donor, target = chain([40, 40], 3), chain([10, 90], 3)
    coloured(donor[0], smooth(9, 1.0), 0, mean=3.0)
    blueprint = Blueprint.from_module(target)
    drawn = {
        (mean, rescale): dict(
            ConvCovariance(mean=mean, rescale=rescale).fit(zoo_of({"a": donor}), blueprint).sample(blueprint)
        )["0.weight"]
        for mean in ("zero", "pooled")
        for rescale in ("fan-in", "none")
    }
    assert abs(float(moments(drawn["pooled", "fan-in"])[0].mean()) - 3) < 0.2
    assert abs(float(moments(drawn["zero", "fan-in"])[0].mean())) < 0.2
    assert torch.isclose(
        drawn["zero", "none"].std() * 2, drawn["zero", "fan-in"].std(), rtol=1e-4
    )  # 40 inputs, then 10


def test_the_convolutions_of_mamba(tmp_path: Path) -> None:
    """1-D and depthwise, in transformers' own names, to another depth and width; saved and loaded."""
    sizes: dict[str, Any] = dict(vocab_size=20, state_size=4, conv_kernel=4)
    donor = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=400, num_hidden_layers=2, **sizes))
    laws = [smooth(4, 0.5), smooth(4, 3.0)]
    for block, covariance in zip(donor.backbone.layers, laws, strict=True):
        coloured(block.mixer.conv1d, covariance, 0)
    blueprint = Blueprint.from_pretrained_config(MambaConfig(hidden_size=500, num_hidden_layers=4, **sizes))
    sampler = ConvCovariance().fit(zoo_of({"mamba": donor}), blueprint)
    drawn = dict(sampler.sample(blueprint, 0))
    assert list(drawn) == [f"backbone.layers.{i}.mixer.conv1d.weight" for i in range(4)]
    for i, tensor in enumerate(drawn.values()):
        assert tensor.shape == (1000, 1, 4) and tensor.dtype == torch.float32
        assert (moments(tensor)[1] - laws[i // 2]).norm() / laws[i // 2].norm() < 0.15
    sampler.save(tmp_path)
    loaded = ConvCovariance.load(tmp_path)
    assert loaded.donors == ("mamba",)
    assert all(torch.equal(tensor, drawn[name]) for name, tensor in loaded.sample(blueprint, 0))
    assert not any(torch.equal(tensor, drawn[name]) for name, tensor in loaded.sample(blueprint, 1))


def test_refusals() -> None:
    zoo: Zoo = zoo_of({"three": chain([2, 2], 3), "dense": nn.Linear(2, 2)})
    five, three = Blueprint.from_module(chain([2, 2], 5)), Blueprint.from_module(chain([2, 2], 3))
    cases = [
        (ConvCovariance(), five, "kernels are 5x5, and the zoo has 3x3"),
        (ConvCovariance(donor="dense"), three, "the donor has no convolutions"),
        (ConvCovariance(), Blueprint.from_module(chain([2, 2], 1)), "no convolution of more than one tap"),
    ]
    for sampler, blueprint, message in cases:
        for work in (sampler.fit, sampler.planned_donors):
            with pytest.raises(UserError, match=message):
                work(zoo, blueprint)
    assert ConvCovariance().planned_donors(zoo, three) == ("three",)


# --- digits -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> Iterator[tuple[tuple[Tensor, Tensor], Zoo]]:
    """The data, and three trained networks of another width."""
    pytest.importorskip("sklearn.datasets")
    with reproducible():
        data = load_digits_split()
        yield data, train_donors(data)


@pytest.mark.parametrize("seed", range(2))
def test_digits_are_learned_faster(trained: tuple[tuple[Tensor, Tensor], Zoo], seed: int) -> None:
    """After 80 steps on the same batches, a wider network has a lower held-out loss than from torch's default. The
    control, the same values permuted over taps and filters, gains as much: what helps here is their scale."""
    data, zoo = trained
    losses = {
        method: train(initialised_network(method, 1.0, zoo, seed), data, seed, steps=80, lr=2e-3)
        for method in ("default", "conv-covariance", "conv-covariance, permuted")
    }
    assert losses["conv-covariance"] < 0.9 * losses["default"], losses
    assert losses["conv-covariance, permuted"] < losses["default"], losses
