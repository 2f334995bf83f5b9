"""PEFT's own initialisations: what PEFT gives for the whole model, laws of what is drawn, identities of what is not."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from headstart import samplers
from tests.support.architectures import LISTED
from zoo.donors.memory import zoo_of
from zoo.donors.zoo import open_standalone
from zoo.errors import UserError
from zoo.lora.adapters import LoraSampler, base_weight, compensated_weight
from zoo.streams import stream_seed
from zoo.targets.adapters import Pair
from zoo.targets.blueprint import Blueprint

peft = pytest.importorskip("peft")
ARCHITECTURES = ["llama-gqa-tied", "qwen2", "gpt2", "gpt_neox", "phi3", "gemma2"]
NAMES = ["peft-default", "gaussian", "orthogonal", "pissa", "olora"]


def model_of(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A random model whose weights are not small, so that what is lost shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LISTED[architecture]), dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model.eval()


def options(rank: int = 4, **more: Any) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", **more}


def filled(name: str, model: PreTrainedModel, blueprint: Blueprint, seed: int = 0, **given: Any) -> dict[str, Any]:
    sampler = samplers.get(name)(**given).fit(zoo_of({"base": model}), blueprint)
    return dict(sampler.sample(blueprint, seed))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_pairs_and_changed_base_are_those_of_peft_on_the_whole_model(name: str, architecture: str) -> None:
    model = model_of(architecture)
    blueprint = Blueprint.from_lora(LISTED[architecture], options())
    if name == "olora" and architecture == "gpt2":
        with pytest.raises(UserError, match="Conv1D"):
            filled(name, model, blueprint)
        return
    found = filled(name, model, blueprint)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options(), init_lora_weights=name))
    state = peft.get_peft_model_state_dict(theirs)
    assert set(found) == set(state) == set(blueprint.names)
    before, after = dict(model.named_parameters()), dict(theirs.get_base_model().named_parameters())
    assert blueprint.adapter is not None
    for pair in blueprint.adapter.pairs:
        # Singular vectors have no sign of their own; ours follow a rule, PEFT's are those of LAPACK.
        signs = (found[pair.a] * state[pair.a]).sum(1).sign() if name == "pissa" else torch.ones(pair.rank)
        torch.testing.assert_close(found[pair.a], state[pair.a] * signs[:, None])
        torch.testing.assert_close(found[pair.b], state[pair.b] * signs)
        ours = compensated_weight(before[f"{pair.module}.weight"].detach(), pair, found[pair.a], found[pair.b])
        torch.testing.assert_close(ours, after[f"{pair.module}.base_layer.weight"].detach())
        assert not torch.allclose(ours, before[f"{pair.module}.weight"])


@pytest.mark.parametrize("name", ["peft-default", "gaussian", "orthogonal"])
def test_a_drawn_pair_is_what_peft_draws_for_the_layer_under_its_seed(name: str) -> None:
    blueprint = Blueprint.from_lora(LISTED["gpt2"], options())
    assert blueprint.adapter is not None
    found = dict(samplers.get(name)().fit(None, blueprint).sample(blueprint, seed=3))
    pair = blueprint.adapter.pairs[-1]
    bare = nn.Sequential(nn.Linear(pair.columns, pair.rows, bias=False))
    init = {"peft-default": True}.get(name, name)
    torch.manual_seed(stream_seed(3, f"{name}/{pair.module}"))
    layer = peft.get_peft_model(bare, peft.LoraConfig(r=4, init_lora_weights=init, target_modules=["0"]))
    state = peft.get_peft_model_state_dict(layer)
    assert torch.equal(found[pair.a], state["base_model.model.0.lora_A.weight"])
    assert torch.equal(found[pair.b], state["base_model.model.0.lora_B.weight"])


def wide(rank: int) -> Blueprint:
    config = {**LISTED["llama-gqa-tied"], "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    return Blueprint.from_lora(config, options(rank))


def test_distributions_of_drawn_values() -> None:
    blueprint = wide(64)
    assert blueprint.adapter is not None
    default, gaussian, orthogonal = (
        dict(samplers.get(name)().fit(None, blueprint).sample(blueprint)) for name in NAMES[:3]
    )
    for pair in blueprint.adapter.pairs:
        bound = 1 / math.sqrt(pair.columns)
        assert default[pair.a].abs().max() <= bound
        assert abs(default[pair.a].std().item() * math.sqrt(3) / bound - 1) < 0.02
        assert abs(gaussian[pair.a].std().item() * pair.rank - 1) < 0.03
        assert not default[pair.b].any() and not gaussian[pair.b].any()
        size = orthogonal[pair.a].norm() * orthogonal[pair.b].norm()
        assert (orthogonal[pair.b] @ orthogonal[pair.a]).norm() < 1e-6 * size
        assert abs(orthogonal[pair.b].std().item() * 10 * math.sqrt(2) - 1) < 0.05  # half of rank's dimensions


def test_pissa_is_the_best_approximation_of_its_rank_and_olora_has_orthonormal_columns() -> None:
    model, blueprint = model_of("llama-gqa-tied"), Blueprint.from_lora(LISTED["llama-gqa-tied"], options())
    pissa, olora = filled("pissa", model, blueprint), filled("olora", model, blueprint)
    fast = filled("pissa", model, blueprint, niter=8)
    assert blueprint.adapter is not None
    for pair in blueprint.adapter.pairs:
        weight = dict(model.named_parameters())[f"{pair.module}.weight"].detach().double()
        best = torch.linalg.svdvals(weight)[pair.rank :].square().sum().sqrt()
        for found, error in ((pissa, 1e-5), (fast, 0.05)):  # it takes no more directions than it needs
            rest = weight - pair.scaling * found[pair.b].double() @ found[pair.a].double()
            assert rest.norm() == pytest.approx(best.item(), rel=error)
        torch.testing.assert_close(olora[pair.b].mT @ olora[pair.b], torch.eye(pair.rank), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_a_function_of_seed_and_module_alone(name: str, tmp_path: Path) -> None:
    model = model_of("llama-gqa-tied")
    model.save_pretrained(tmp_path / "base")
    zoo, blueprint = open_standalone(tmp_path / "base"), Blueprint.from_lora(tmp_path / "base", options())
    some = Blueprint.from_lora(tmp_path / "base", options(target_modules=["o_proj", "k_proj"]))
    sampler = samplers.get(name)().fit(zoo, blueprint)
    state = torch.random.get_rng_state()
    first = dict(sampler.sample(blueprint, 0))
    assert torch.equal(torch.random.get_rng_state(), state)  # the global random state is left as it was
    torch.rand(7)
    part = dict(samplers.get(name)().fit(zoo, some).sample(some, 0))
    sampler.save(tmp_path / "saved")
    loaded = dict(samplers.load(tmp_path / "saved").sample(blueprint, 0))
    assert set(part) < set(first)
    assert all(torch.equal(first[k], part[k]) for k in part)
    assert all(torch.equal(first[k], loaded[k]) for k in first)
    other = dict(sampler.sample(blueprint, 1))
    assert all(torch.equal(first[k], other[k]) for k in first) == (name in ("pissa", "olora"))


def test_transposed_weights_are_read_as_the_layer_uses_them() -> None:
    model, blueprint = model_of("gpt2"), Blueprint.from_lora(LISTED["gpt2"], options())
    assert blueprint.adapter is not None
    pair: Pair = blueprint.adapter.pairs[0]
    weight = base_weight(zoo_of({"base": model}).donors[0], pair)
    layer, x = cast(Conv1D, model.get_submodule(pair.module)), torch.randn(3, pair.columns)
    assert tuple(weight.shape) == (pair.rows, pair.columns)
    torch.testing.assert_close(x @ weight.mT + layer.bias, layer(x))


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    adapter = Blueprint.from_lora(LISTED["llama"], options(3))
    with pytest.raises(UserError, match=r"even rank.*give 4"):
        samplers.get("orthogonal")().fit(None, adapter)
    with pytest.raises(UserError, match="reads the weights of the base"):
        samplers.get("pissa")().fit(None, adapter)
    with pytest.raises(UserError, match="headstart lora"):
        samplers.get("gaussian")().fit(None, Blueprint.from_config(LISTED["llama"]))
    with pytest.raises(UserError, match="not fitted"):
        dict(samplers.get("olora")().sample(adapter))
    changes = {name: method.compensated for name in NAMES if isinstance(method := samplers.get(name)(), LoraSampler)}
    assert changes == {name: name in ("pissa", "olora") for name in NAMES}
