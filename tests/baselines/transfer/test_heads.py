"""The head of a target where the donor has none, has one tied to its embedding, or has one that its config denies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from baselines.schemes.default import Default
from baselines.transfer.base import Transfer
from baselines.transfer.growth.hypercloning import HyperCloning
from baselines.transfer.growth.net2wider import Net2Wider
from baselines.transfer.growth.stacking import Stacking
from baselines.transfer.row_column import RowColumn
from baselines.transfer.shrinking.learned_pruning import LearnedPruning
from baselines.transfer.shrinking.pruning import Pruning
from baselines.transfer.shrinking.sliced import Sliced
from baselines.transfer.shrinking.subcloning import Subcloning
from baselines.transfer.weight_selection import WeightSelection
from headstart.generate.sampling import sample_with_defaults
from tests.support.shaken import CONFIGS, build, filled, logits
from zoo.donors.zoo import Zoo, open_standalone
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.units.aligned import align_donors

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
TARGET = {**CONFIGS["llama"], "architectures": ["LlamaForCausalLM"]}
METHODS: dict[str, tuple[type[Transfer], dict[str, Any]]] = {
    "weight-selection": (WeightSelection, {}),
    "row-column": (RowColumn, {"noise": 0.0}),
    "subcloning": (Subcloning, {}),
    "pruning": (Pruning, {}),
    "sliced": (Sliced, {}),
    "stacking": (Stacking, {}),
    "hypercloning": (HyperCloning, {}),
    "net2wider": (Net2Wider, {}),
}


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints without a head: of a base model, and of a classifier whose `score` is none."""
    from transformers import LlamaForSequenceClassification

    folders = {kind: tmp_path_factory.mktemp(kind.replace(" ", "-")) for kind in ("base model", "classifier")}
    model: Any = build(CONFIGS["llama"])
    model.model.save_pretrained(folders["base model"])
    classifier = LlamaForSequenceClassification(model.config)
    classifier.model.load_state_dict(model.model.state_dict())
    classifier.save_pretrained(folders["classifier"])
    return folders


@pytest.mark.parametrize("kind", ["base model", "classifier"])
@pytest.mark.parametrize("method", METHODS)
def test_the_head_of_a_donor_without_one_keeps_the_default_initialisation(
    headless: dict[str, Path], caplog: pytest.LogCaptureFixture, method: str, kind: str
) -> None:
    cls, options = METHODS[method]
    target, defaulted = Blueprint.from_config(TARGET), list[str]()
    sampler = cls(**options).fit(open_standalone(headless[kind]), target)
    tensors = dict(sample_with_defaults(sampler, target, 3, defaulted))
    assert defaulted == [spec.name for spec, _ in target.find("head")]
    assert torch.equal(tensors[HEAD], dict(Default().fill(target, [HEAD], 3))[HEAD])
    assert [r.levelname for r in caplog.records if "has no head: the target's keeps the default" in r.message] == [
        "WARNING"
    ]
    if method != "sliced":  # which rotates all coordinates
        donor = load_file(headless["classifier"] / "model.safetensors")
        assert all(torch.equal(tensors[name], t) for name, t in donor.items() if name != "score.weight")


@pytest.mark.parametrize("method", METHODS)
def test_the_embedding_serves_as_head_on_request(
    headless: dict[str, Path], caplog: pytest.LogCaptureFixture, tmp_path: Path, method: str
) -> None:
    cls, options = METHODS[method]
    zoo = open_standalone(headless["base model"])
    folder = filled(tmp_path / "out", cls(head="embedding", **options), zoo, TARGET)
    assert "has no head: the target's is its embedding" in caplog.text
    donor: Any = build(CONFIGS["llama"])
    donor.lm_head.weight = donor.model.embed_tokens.weight
    with torch.no_grad():
        expected = donor(torch.arange(1, 25).view(2, 12)).logits
    assert torch.allclose(logits(folder), expected, atol=1e-4)


def test_the_tied_head_of_a_base_model_is_its_embedding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = build({**CONFIGS["llama"], "tie_word_embeddings": True})
    model.model.save_pretrained(tmp_path)
    target = Blueprint.from_config(TARGET)
    sampler = WeightSelection().fit(open_standalone(tmp_path), target)
    tensors = dict(sampler.sample(target))
    assert torch.equal(tensors[HEAD], model.lm_head.weight) and "has no head" not in caplog.text


def test_an_unknown_choice_of_head_is_refused() -> None:
    with pytest.raises(UserError, match="unknown head of stacking 'copy': known: default, embedding"):
        Stacking(head="copy")


def test_methods_that_need_a_head_refuse_a_donor_without_one(headless: dict[str, Path]) -> None:
    zoo = open_standalone(headless["base model"])
    with pytest.raises(UserError, match="it has no head, which training its masks needs"):
        LearnedPruning().fit(zoo, Blueprint.from_config({**TARGET, "intermediate_size": 24}))
    with pytest.raises(UserError, match="no donor is"):
        list(align_donors(zoo))


def test_units_of_donors_with_a_head_only(
    headless: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(CONFIGS["llama"]).save_pretrained(tmp_path)
    donors = [open_standalone(folder).donors[0] for folder in (tmp_path, headless["classifier"])]
    found = list(align_donors(Zoo.of_donors(donors), quiet=False))
    assert [aligned.name for aligned in found] == [donors[0].name]
    assert "has no head (a base model or a classifier)" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_a_head_that_the_config_denies_is_transferred(tmp_path: Path, method: str) -> None:
    """transformers loads the file's own head although the config ties it."""
    model: Any = build(CONFIGS["llama"])
    model.save_pretrained(tmp_path / "donor")
    config = json.loads((tmp_path / "donor" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "donor" / "config.json").write_text(json.dumps(config))
    expected = logits(tmp_path / "donor")
    cls, options = METHODS[method]
    folder = filled(tmp_path / "out", cls(**options), open_standalone(tmp_path / "donor"), TARGET)
    assert torch.allclose(logits(folder), expected, atol=1e-4)
    assert not torch.equal(*(load_file(folder / "model.safetensors")[name] for name in (HEAD, EMBED)))


def test_pissa_of_a_head_that_the_config_denies_is_the_base(tmp_path: Path) -> None:
    """The written base with the adapter computes what the original computes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from headstart.config import LoraConfig
    from headstart.lora.lora import lora

    model: Any = build(CONFIGS["llama"])
    model.save_pretrained(tmp_path / "donor")
    config = json.loads((tmp_path / "donor" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "donor" / "config.json").write_text(json.dumps(config))
    expected = logits(tmp_path / "donor")
    lora(LoraConfig(base=str(tmp_path / "donor"), method="pissa", out=str(tmp_path / "adapter"), rank=4))
    base = tmp_path / "adapter" / "base"
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(
        load_file(base / "model.safetensors")[HEAD], load_file(tmp_path / "donor/model.safetensors")[HEAD]
    )
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(adapted(torch.arange(1, 25).view(2, 12)).logits, expected, atol=1e-4)


def test_calibration_runs_quantised_and_wrapped_donors(tmp_path: Path) -> None:
    """transformers reads neither; the model computes what the donor's values give."""
    from baselines.calibration import load_model

    model = build(CONFIGS["llama"])
    model.save_pretrained(tmp_path)
    values = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    codes = (values[name] * 100).to(torch.float8_e4m3fn)
    stored = values | {name: codes, f"{name}_scale": torch.tensor(0.01)}
    values[name] = codes.float() * torch.tensor(0.01)
    save_file({f"module.{key}": t for key, t in stored.items()}, tmp_path / "model.safetensors")
    loaded = load_model(open_standalone(tmp_path).donors[0], "cpu")
    assert all(torch.equal(t, values[key]) for key, t in loaded.state_dict().items())
