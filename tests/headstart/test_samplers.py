"""The table of methods and the Python names of the contract."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from baselines.distributions.parametric import Normal
from headstart import samplers
from tests.support.tiny import make_zoo
from zoo.errors import UserError
from zoo.sampler import Sampler


@pytest.mark.parametrize("name", samplers.METHODS)
def test_every_method_describes_itself(name: str) -> None:
    cls = samplers.get(name)
    assert issubclass(cls, Sampler)
    assert cls.name == name and cls.family and cls.summary and cls.reference
    assert set(cls.needs) <= {"donor", "donors", "model", "text", "base", "reference"}
    for row in cls.option_table():
        assert set(row) == {"name", "type", "default", "help"} and row["help"]


def test_the_methods_for_adapters_are_those_of_their_family() -> None:
    assert set(samplers.LORA_METHODS) == {name for name in samplers.METHODS if samplers.get(name).family == "lora"}
    for name in samplers.LORA_METHODS:
        assert samplers.lora_sampler(name) is samplers.get(name)
        with pytest.raises(UserError, match=f"headstart lora --base MODEL --method {name}"):
            samplers.model_sampler(name)
    with pytest.raises(UserError, match="normal fills models, not LoRA adapters: choose from pareto, peft-default"):
        samplers.lora_sampler("normal")


def test_the_description_is_json() -> None:
    rows = json.loads(json.dumps(samplers.describe()))
    assert [row["name"] for row in rows] == list(samplers.METHODS)
    assert all(set(row) == {"name", "family", "summary", "reference", "needs", "options"} for row in rows)


def test_the_stored_descriptions_are_those_of_the_classes() -> None:
    """After a change of a summary or an option: python -m headstart.samplers"""
    assert samplers.described_methods() == json.loads(json.dumps(samplers.describe()))


def test_a_wrong_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'weight-selection'"):
        samplers.get("weight_selection")


def test_a_users_method_is_selected_by_its_path() -> None:
    from baselines.schemes.default import Default

    assert samplers.get("baselines.schemes.default.Default") is Default
    with pytest.raises(UserError, match=r"is not a subclass of zoo\.sampler\.Sampler"):
        samplers.get("zoo.donors.zoo.Zoo")
    with pytest.raises(UserError, match="cannot be imported"):
        samplers.get("nowhere.at_all.Method")
    with pytest.raises(UserError, match="cannot be imported"):
        samplers.get("baselines.schemes.default.Defualt")


def test_names_of_the_contract_are_lazy() -> None:
    code = (
        "import sys, headstart; assert not {'torch', 'transformers'} & set(sys.modules);"
        "assert set(dir(headstart)) == set(headstart.__all__); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    from headstart import Blueprint, WeightDiffusionPipeline, Zoo, initialize_lora_weights, load_into, zoo_of
    from headstart import samplers as found

    assert callable(zoo_of) and callable(load_into) and Zoo.open and callable(WeightDiffusionPipeline)
    assert callable(initialize_lora_weights) and Blueprint.from_config
    assert found.get("default")(scale=2.0).options() == {"scale": 2.0}  # type: ignore[call-arg]


def test_a_saved_sampler_is_found_by_its_method(tmp_path) -> None:  # type: ignore[no-untyped-def]
    samplers.get("default")(scale=0.5).save(tmp_path)
    loaded = samplers.load(tmp_path)
    assert loaded.name == "default" and loaded.options() == {"scale": 0.5}
    with pytest.raises(UserError, match=r"has no sampler\.json"):
        samplers.load(tmp_path / "elsewhere")


def test_a_saved_sampler_that_was_changed_is_refused(tmp_path: Path) -> None:
    samplers.get("default")(scale=2.0).save(tmp_path)
    path = tmp_path / "sampler.json"
    sound = json.loads(path.read_text())
    assert samplers.load(tmp_path).options() == sound["options"]
    for change, problem in (
        ({"options": sound["options"] | {"scale": 3.0}}, "were changed after they were saved; fit the sampler"),
        ({"state": None}, "state is None; it must be an object"),
        ({"options": {"scale": "x"}, "seal": None}, "were changed after they were saved"),
        ({"method": 1}, "method is 1; it must be text"),
        ({"method": "antigravity.Nothing"}, "method 'antigravity.Nothing', which is none of ours; import its module"),
    ):
        path.write_text(json.dumps(sound | change))
        with pytest.raises(UserError, match=problem):
            samplers.load(tmp_path)
    assert "antigravity" not in sys.modules
    old = {key: value for key, value in sound.items() if key != "seal"}
    path.write_text(json.dumps(old))
    assert samplers.load(tmp_path).options() == sound["options"], "older samplers have no seal"
    path.write_text(json.dumps(old | {"options": {"no such option": 1}}))
    with pytest.raises(UserError, match=r"cannot be opened: .*no such option"):
        samplers.load(tmp_path)


@pytest.mark.parametrize("damage", [9223372036854775808, {}, {"mean": None, "std": None}, []])
@pytest.mark.parametrize("group", ["attn.q/weight//0", "norm/weight/mlp/0"])
def test_a_damaged_fit_of_an_older_sampler_is_found_when_it_is_opened(
    tmp_path: Path, group: str, damage: object
) -> None:
    zoo = make_zoo(tmp_path, [{}])
    donor = zoo.donors[0]
    Normal().fit(zoo, donor.blueprint).save(tmp_path)
    content = json.loads((tmp_path / "sampler.json").read_text())
    del content["seal"]  # older ones have none
    (tmp_path / "sampler.json").write_text(json.dumps(content))
    assert dict(samplers.load(tmp_path).sample(donor.blueprint, 0))
    assert group in content["state"]["fits"], list(content["state"]["fits"])
    content["state"]["fits"][group] = damage
    (tmp_path / "sampler.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"sampler\.json: cannot be opened"):
        samplers.load(tmp_path)
