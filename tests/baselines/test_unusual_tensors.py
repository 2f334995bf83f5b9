"""Tensors without dimensions (Apertus) and buffers (BART, Gemma 4) under every method that learns from a donor."""

from __future__ import annotations

import pytest
import torch

from headstart.generate.sampling import sample_with_defaults
from headstart.samplers import get
from tests.support.architectures import UNLISTED
from tests.zoo.targets.test_roles import randomised
from zoo.donors.zoo import Zoo, open_standalone
from zoo.statistics.health import check_health
from zoo.statistics.row_column import row_column_study
from zoo.targets.blueprint import Blueprint

DISTRIBUTIONS = ("normal", "laplace", "student-t", "histogram", "permuted", "hybrid", "mimetic", "identity")
TRANSFERS = ("weight-selection", "row-column", "subcloning", "pruning", "stacking", "net2wider", "hypercloning")
UNUSUAL = {
    "apertus": "model.layers.1.mlp.act_fn.beta",
    "bart": "final_logits_bias",
    "gemma4_text": "model.layers.5.layer_scalar",  # beside heads of two dimensions
}


@pytest.fixture(scope="module", params=UNUSUAL)
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    folder = tmp_path_factory.mktemp(request.param)
    model = randomised(UNLISTED[request.param])
    for name, tensor in model.state_dict().items():
        if name == UNUSUAL[request.param]:
            tensor.fill_(0.375)
    model.save_pretrained(folder)
    return open_standalone(folder)


def unusual(blueprint: Blueprint) -> str:
    assert blueprint.metadata is not None
    return UNUSUAL[blueprint.metadata.architecture]


@pytest.mark.parametrize("method", [*DISTRIBUTIONS, "default"])
def test_a_distribution_leaves_them_to_the_constructor(zoo: Zoo, method: str) -> None:
    blueprint = Blueprint.from_config(zoo.path)
    tensors = dict(sample_with_defaults(get(method)().fit(zoo, blueprint), blueprint, 0))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {s.name: s.shape for s in blueprint.specs}
    name = unusual(blueprint)
    own = dict(get("default")().sample(blueprint))[name]
    assert torch.equal(tensors[name], own) and not torch.equal(own, torch.full_like(own, 0.375))


@pytest.mark.parametrize("method", TRANSFERS)
def test_a_transfer_into_the_own_shape_keeps_them(zoo: Zoo, method: str) -> None:
    blueprint = Blueprint.from_config(zoo.path)
    sampler = get(method)(**({"noise": 0.0} if method == "row-column" else {})).fit(zoo, blueprint)
    name = unusual(blueprint)
    assert torch.equal(dict(sampler.sample(blueprint))[name], zoo.donors[0].read(name))


def test_statistics_skip_them(zoo: Zoo) -> None:
    name = unusual(zoo.donors[0].blueprint)
    assert name not in {tensor for finding in check_health(zoo.donors[0]) for tensor in finding.tensors}
    assert name not in {entry["tensor"] for entry in row_column_study(zoo.donors[0], permutations=2)["tensors"]}
