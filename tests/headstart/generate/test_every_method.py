"""What every method promises, on one target: a folder that loads, the same bytes for a seed, saved and loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from headstart import samplers
from headstart.config_values import settings_of
from headstart.generate.sampling import build_sampler
from tests.support.commands import generate, lora
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.donors.zoo import Zoo, open_standalone
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint
from zoo.training.corpora import python_reference
from zoo.training.embedded_zoo import train_zoo
from zoo.training.recipes import DonorRecipe

TARGET = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
# There is no convolution here: tests/baselines/distributions/test_conv_covariance.py. The LoRA methods come at the end.
ELSEWHERE = {"conv-covariance", *samplers.LORA_METHODS}
METHODS = [name for name in samplers.METHODS if name not in ELSEWHERE and "model" not in samplers.get(name).needs]
# Nothing is drawn where no row is missing and nothing grows: another seed gives the same weights.
DETERMINISTIC = {"weight-selection", "subcloning", "pruning", "learned-pruning", "sliced", "hypercloning", "stacking"}
SETTINGS = {"learned-pruning": ["steps=6", "batch_size=2", "windows=4"], "subcloning": ["windows=4"]}
SETTINGS |= {"pruning": ["windows=4"], "sliced": ["windows=4"]}
SETTINGS |= {"net2wider": ["donor=nursery-w16-l2-h2-kv2-s0"]}  # the nearest in size needs depth only


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(python_reference()[:20_000])
    return path


@pytest.fixture(scope="module")
def donors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A donor of half the width, one of half the depth, and a larger one."""
    zoo = tmp_path_factory.mktemp("zoo") / "zoo"
    recipes = [
        DonorRecipe(16, 2, heads=2, kv_heads=2, ffn=32, steps=8, head_dim=8),
        DonorRecipe(32, 1, heads=4, kv_heads=4, ffn=64, steps=8, head_dim=8),
        DonorRecipe(48, 3, heads=6, kv_heads=6, ffn=96, steps=8, head_dim=8),
    ]
    train_zoo(zoo, recipes, workers=1, quiet=True)
    return zoo


def sampler(name: str, text: Path) -> Sampler:
    cls = samplers.get(name)
    given = {"text": str(text)} if "text" in cls.__dataclass_fields__ else {}
    return build_sampler(cls, settings_of(SETTINGS.get(name, [])), **given)


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_gives_the_same_bytes_fitted_anew_and_loaded_and_a_whole_folder(
    name: str, donors: Path, text: Path, tmp_path: Path
) -> None:
    """One test, as fits are what takes time: a sampler fitted here, saved and loaded; the plan and the folder of
    `generate`, which fits another; all name the same donors and hold the same bytes."""
    zoo, blueprint, cls = Zoo.open(donors), Blueprint.from_config(TARGET), samplers.get(name)
    one = sampler(name, text).fit(zoo, blueprint)
    first = dict(one.sample(blueprint, 0))
    assert first and all(first[k].shape == blueprint[k].shape and first[k].isfinite().all() for k in first)
    one.save(tmp_path / "saved")
    loaded = dict(samplers.load(tmp_path / "saved").sample(blueprint, 0))
    other = dict(one.sample(blueprint, 1))

    settings = list(SETTINGS.get(name, []))
    if "text" in cls.__dataclass_fields__:
        settings.append(f"text={text}")
    plan = generate(TARGET, name, tmp_path / "out", zoo=donors, settings=settings, plan=True, quiet=True)
    assert isinstance(plan, dict) and not (tmp_path / "out").exists() and len(cls.summary) <= 95
    assert set(one.donors) <= {d["name"] for d in plan["read"]["donors"]}
    out = generate(TARGET, name, tmp_path / "out", zoo=donors, settings=settings, quiet=True)
    assert isinstance(out, Path)
    record = json.loads((out / "headstart.json").read_text())
    assert {d["name"] for d in record["donors"]} == set(one.donors)
    assert record["tensors"]["sampled"] + record["tensors"]["defaulted"] == len(blueprint.names)
    assert record["tensors"]["sampled"] == len(first)

    again = Checkpoint.open(out)
    for key, tensor in first.items():
        assert torch.equal(tensor, again.read(key)), key
        assert torch.equal(tensor, loaded[key]), key
    same = all(torch.equal(tensor, other[key]) for key, tensor in first.items())
    assert same == (name in DETERMINISTIC)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        logits = model(torch.arange(20)[None]).logits
    assert logits.isfinite().all()


@pytest.fixture(scope="module")
def base(donors: Path) -> Path:
    """The donor of three layers, fewer of which have no statistics."""
    return next(d.folder for d in Zoo.open(donors).donors if d.blueprint.metadata.layers == 3)  # type: ignore[union-attr]


LORA = ["pareto:strategy=both_small", "pareto:strategy=both_compensated", *samplers.LORA_METHODS]


def lora_settings(label: str, text: Path) -> list[str]:
    name, *settings = label.split(":")
    if name == "pareto":
        settings.append("bootstraps=20")
    if "text" in samplers.get(name).__dataclass_fields__:
        settings += [f"text={text}", "windows=4"]
    return settings


def lora_sampler(label: str, text: Path) -> Sampler:
    return build_sampler(samplers.get(label.split(":")[0]), settings_of(lora_settings(label, text)))


@pytest.mark.parametrize("label", LORA)
def test_a_seed_gives_an_adapter_the_same_bytes_fitted_anew_and_loaded(
    label: str, base: Path, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    zoo, blueprint = open_standalone(base), Blueprint.from_lora(base, {"r": 4, "target_modules": "all-linear"})
    turned = replace(blueprint, adapter=replace(blueprint.adapter, pairs=blueprint.adapter.pairs[::-1]))  # type: ignore[union-attr,type-var]
    one = lora_sampler(label, text).fit(zoo, blueprint)
    first = dict(one.sample(blueprint, 0))
    assert set(first) == set(blueprint.names)
    assert all(t.shape == blueprint[k].shape and t.dtype == torch.float32 for k, t in first.items())
    one.save(tmp_path)
    again = dict(lora_sampler(label, text).fit(zoo, turned).sample(turned, 0))
    loaded = dict(samplers.load(tmp_path).sample(blueprint, 0))
    for key, tensor in first.items():
        assert torch.equal(tensor, again[key]) and torch.equal(tensor, loaded[key]), key
    other = dict(one.sample(blueprint, 1))
    same = all(torch.equal(tensor, other[key]) for key, tensor in first.items())
    assert same == (label in ("pissa", "olora", "eva", "corda", "lora_ga"))


@pytest.mark.parametrize("label", LORA)
def test_an_adapter_leaves_what_the_base_computes(label: str, base: Path, text: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    name, settings = label.split(":")[0], lora_settings(label, text)
    plan = lora(base, name, 4, tmp_path / "out", settings=settings, plan=True)
    assert isinstance(plan, dict) and not (tmp_path / "out").exists() and len(samplers.get(name).summary) <= 95
    out = lora(base, name, 4, tmp_path / "out", settings=settings, quiet=True)
    assert isinstance(out, Path)
    record = json.loads((out / "headstart.json").read_text())
    assert [d["name"] for d in record["donors"]] == [d["name"] for d in plan["read"]["donors"]] == [base.name]
    sizes = [path.stat().st_size for path in (out / "adapter_model.safetensors", *out.glob("base/*.safetensors"))]
    assert plan["write"]["bytes"] == sum(sizes)
    changed = record["changed_base"] is not None
    assert changed == (label in ("pissa", "olora", "corda", "lora_ga", "pareto:strategy=both_compensated"))
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(base)(torch.arange(20)[None]).logits
        loaded = AutoModelForCausalLM.from_pretrained(out / "base" if changed else base)
        after = peft.PeftModel.from_pretrained(loaded, out)(torch.arange(20)[None]).logits
    bound = 0.0 if record["step0"]["largest_change"] == 0 else 1e-5
    if label.endswith("both_small"):
        bound = 5 * record["options"]["cap"]  # of all matrices, in the few directions that a rank of 4 has
    assert (after - before).abs().max() <= bound * before.abs().max()
