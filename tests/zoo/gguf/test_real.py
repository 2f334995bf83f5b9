"""The two real models, which `make real` fetches: their tensors and tokenizers are those that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.commands import generate
from tests.zoo.gguf.test_gguf import assert_equal_to_transformers
from zoo.add import add
from zoo.donors.verify import verify
from zoo.donors.zoo import Zoo

pytestmark = pytest.mark.real

MODELS = {
    "SmolLM2-135M-Instruct.Q4_1": ("apache-2.0", "210 tensors in Q4_1, 61 in F32, 1 in Q8_0"),
    "gemma-3-270m-q4_k_m": ("gemma", "109 tensors in F32, 81 in Q5_0, 27 in Q4_K, 10 in Q8_0, 9 in Q6_K"),
}
TEXT = "The capital of France is Paris. The Seine flows through the city, and many people visit its museums every year."


@pytest.fixture(scope="module")
def real_zoo(real_models: Path) -> Path:
    add([str(real_models / f"{name}.gguf") for name in MODELS], real_models / "zoo", quiet=True)
    return real_models / "zoo"


@pytest.mark.parametrize("name", MODELS)
def test_a_real_model_equals_what_transformers_loads(real_models: Path, real_zoo: Path, name: str) -> None:
    donor = Zoo.open(real_zoo).donor(name)
    license, types = MODELS[name]
    assert donor.license == license and str(donor.quantisation) == f"{types} of a GGUF file, stored as bfloat16"
    theirs, ours = assert_equal_to_transformers(real_models / f"{name}.gguf", real_zoo / "models" / name)
    ids = torch.tensor([AutoTokenizer.from_pretrained(real_zoo / "models" / name)(TEXT)["input_ids"]])
    with torch.no_grad():
        loss = ours(ids, labels=ids).loss.item()
        assert loss == theirs(ids, labels=ids).loss.item() and loss < 3.5


def test_a_real_donor_fills_a_smaller_target(real_zoo: Path, tmp_path: Path) -> None:
    assert verify(real_zoo) == []
    name = "SmolLM2-135M-Instruct.Q4_1"
    donor = Zoo.open(real_zoo).donor(name)
    config = {**donor.config, "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "head_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    generate(tmp_path / "config.json", "weight-selection", tmp_path / "out", zoo=real_zoo, donor=name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"]])
    with torch.no_grad():
        assert model(ids, labels=ids).loss.isfinite()
    rows = set(donor.read("model.norm.weight").tolist())
    assert set(model.model.norm.weight.tolist()) <= rows  # entries of the donor, not drawn ones
