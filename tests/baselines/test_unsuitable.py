"""Unsuitable donors, targets and options: one clear line each, whatever else the zoo holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from baselines.distributions.empirical import Permuted
from baselines.distributions.matrix_normal import MatrixNormal
from baselines.schemes.mimetic import Mimetic
from baselines.transfer.growth.hypercloning import HyperCloning
from baselines.transfer.shrinking.sliced import Sliced
from baselines.transfer.shrinking.subcloning import Subcloning
from headstart import samplers
from tests.support.tiny import config, make_zoo
from zoo.donors.memory import load_into, zoo_of
from zoo.errors import UserError
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint

SMALL = dict(vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def model(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**options))


def mamba() -> nn.Module:
    return model("mamba", vocab_size=48, hidden_size=32, num_hidden_layers=2, state_size=4)


@pytest.mark.parametrize("name", ["weight-selection", "pruning", "subcloning", "row-column", "net2wider", "stacking"])
def test_a_donor_without_heads_is_passed_over(name: str) -> None:
    llama = model("llama", **SMALL, num_key_value_heads=4)
    target = Blueprint.from_module(llama)
    sampler = samplers.get(name)()
    assert sampler.planned_donors(zoo_of({"llama": llama, "mamba": mamba()}), target) == ("llama",)
    with pytest.raises(UserError, match="has no attention heads"):
        sampler.planned_donors(zoo_of({"mamba": mamba()}), target)
    own = sampler.planned_donors(zoo_of({"mamba": mamba()}), Blueprint.from_module(mamba()))
    assert own == ("mamba",)  # a donor of the target's own shape is copied
    with pytest.raises(UserError, match=r"the target \(mamba\) has no attention heads|the donor has|the target has"):
        sampler.planned_donors(zoo_of({"llama": llama}), Blueprint.from_module(mamba()))


def test_layers_of_several_kinds_are_refused() -> None:
    moe = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32, shared_expert_intermediate_size=32)
    donor, target = (
        model("qwen2_moe", **SMALL | {"num_hidden_layers": n}, **moe, num_key_value_heads=4, mlp_only_layers=[0])
        for n in (3, 2)
    )
    for name in ("weight-selection", "row-column", "pruning", "subcloning"):
        with pytest.raises(UserError, match="has layers of several kinds; index maps need one kind"):
            samplers.get(name)().planned_donors(zoo_of({"moe": donor}), Blueprint.from_module(target))


def test_importance_needs_a_known_attention_layout() -> None:
    ctrl = dict(vocab_size=48, n_embd=32, n_head=4, dff=64, n_positions=16)
    zoo = zoo_of({"ctrl": model("ctrl", **ctrl, n_layer=2)})
    blueprint = Blueprint.from_module(model("ctrl", **ctrl, n_layer=1))
    assert samplers.get("weight-selection")().planned_donors(zoo, blueprint)
    for name in ("pruning", "subcloning"):
        with pytest.raises(UserError, match=r"attn\.q.* are unknown, and importance needs them: use weight-selection"):
            samplers.get(name)().planned_donors(zoo, blueprint)


def test_experts_are_subcloned() -> None:
    def mixtral(ffn: int) -> nn.Module:
        return model(
            "mixtral", **SMALL | {"intermediate_size": ffn}, num_key_value_heads=2, num_local_experts=2,
            num_experts_per_tok=1,
        )  # fmt: skip

    target = Blueprint.from_module(mixtral(40))
    drawn = dict(Subcloning().fit(zoo_of({"mixtral": mixtral(64)}), target).sample(target))
    assert any(".experts.1." in name for name in drawn) and all(t.isfinite().all() for t in drawn.values())


def test_growth_names_every_setting_that_changes_the_function() -> None:
    def blueprint(**options: Any) -> Blueprint:
        wide = SMALL | {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 128}
        return Blueprint.from_module(model("llama", **wide, num_key_value_heads=8, **options))

    donor = zoo_of({"llama": model("llama", **SMALL, num_key_value_heads=4)})
    plain = blueprint()
    assert HyperCloning().fit(donor, plain).function_differences(plain) == []
    scaled = blueprint(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    assert any("rope_parameters" in line for line in HyperCloning().fit(donor, scaled).function_differences(scaled))


def test_matrices_without_spread_are_their_mean() -> None:
    def net(middle: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, middle), nn.ReLU(), nn.Linear(middle, 3))

    torch.manual_seed(0)
    a, b = net(5), net(4)
    with torch.no_grad():
        a[0].weight.zero_()
        b[0].weight.zero_()
    target = net(5)
    blueprint = Blueprint.from_module(target)
    for donors in ({"a": a, "b": a}, {"a": a, "b": b}, {"a": a}):
        load_into(target, MatrixNormal().fit(zoo_of(donors), blueprint).sample(blueprint))
        assert all(p.isfinite().all() for p in target.parameters())
        assert not target[0].weight.any()
    twice = dict(MatrixNormal().fit(zoo_of({"a": a, "b": a}), blueprint).sample(blueprint))
    assert torch.allclose(twice["4.weight"], a[4].weight)


@pytest.mark.parametrize("options", [{"vo_alpha": 0.0, "vo_depth": "flip"}, {"qk_alpha": 0.0, "qk_beta": 0.0}])
def test_mimetic_products_may_be_zero(options: dict[str, Any]) -> None:
    blueprint = Blueprint.from_pretrained_config(config(layers=3))
    assert all(t.isfinite().all() for _, t in Mimetic(**options).fit(None, blueprint).sample(blueprint))


def test_saving_over_another_sampler_leaves_nothing_of_it(tmp_path: Path) -> None:
    zoo, blueprint = make_zoo(tmp_path / "zoo"), Blueprint.from_pretrained_config(config(hidden_size=24))
    cut = Sliced(donor="d0").fit(zoo, blueprint)
    cut._basis = torch.eye(32, dtype=torch.float64)
    cut.save(tmp_path / "saved")
    plain = Sliced(donor="d0").fit(zoo, blueprint)
    plain.save(tmp_path / "saved")
    loaded = dict(samplers.load(tmp_path / "saved").sample(blueprint))
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in plain.sample(blueprint))


def test_a_module_that_is_read_while_sampling_cannot_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("teacher").mkdir()  # a folder of the module's name is not the module
    module = nn.Linear(4, 4)
    sampler = Permuted().fit(zoo_of({"teacher": module}), Blueprint.from_module(module))
    with pytest.raises(UserError, match="module in memory"):
        sampler.save(tmp_path / "saved")


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"std": float("nan")}, "std is nan; give a finite number"),
    ("truncated-normal", {"std": 0.0}, "more than 0"),
    ("mimetic", {"heads": 0}, "at least 1"),
    ("row-column", {"noise": -1.0}, "at least 0"),
    ("pruning", {"ridge": float("inf")}, "finite"),
    ("histogram", {"points": 10**11}, "at most"),
    ("mixture", {"components": 10**6}, "at most 64"),
    ("learned-pruning", {"mask_lr": -1.0}, "at least 0"),
    ("learned-pruning", {"warmup": 2.0}, "at most 1"),
    ("subcloning", {"windows": 10**9}, "at most"),
]


@pytest.mark.parametrize(("name", "options", "says"), WRONG)
def test_numbers_out_of_bounds_are_refused_at_once(name: str, options: dict[str, Any], says: str) -> None:
    cls: type[Sampler] = samplers.get(name)
    with pytest.raises(UserError, match=says):
        cls(**options)
