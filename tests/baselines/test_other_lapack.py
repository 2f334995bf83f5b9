"""Methods give the same weights, up to rounding, whatever signs and bases LAPACK returns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from autoencoder.donors import read_training_donors
from headstart import samplers
from tests.support.lapack import use_other_lapack
from tests.support.tiny import STD, config, role
from zoo.donors.memory import zoo_of
from zoo.targets.blueprint import Blueprint
from zoo.units.aligned import align_donors
from zoo.units.units import ROLES

TARGET = config(hidden_size=24, kv=2, vocab_size=256).to_dict() | {"architectures": ["LlamaForCausalLM"]}


def generic_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config(hidden_size=32, vocab_size=256))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.normal_(0, STD[role(name)])
    return model


def symmetric_llama(seed: int = 0) -> LlamaForCausalLM:
    """A donor of many equal singular values: every matrix is a part of an identity, one head is dead, and neither
    embedding nor head has an entry in the last four coordinates."""
    model = generic_llama(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj" in name:
                p.copy_(torch.eye(*p.shape).roll(3 * seed, 1))
            elif p.ndim == 2:
                p[:, -4:] = 0
        model.model.layers[0].self_attn.v_proj.weight[:8] = 0
    return model


DONORS = {"generic": generic_llama, "symmetric": symmetric_llama}


def sample(method: str, model: LlamaForCausalLM, **options: object) -> dict[str, Tensor]:
    blueprint = Blueprint.from_config(TARGET)
    sampler = samplers.get(method)(**options).fit(zoo_of({"donor": model}), blueprint)
    return {name: tensor.clone() for name, tensor in sampler.sample(blueprint, 0)}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5 * float(tensor.abs().max()), rtol=0, msg=name)


@pytest.mark.parametrize("donor", DONORS)
@pytest.mark.parametrize("method", ["sliced", "sliced with text", "matrix-normal", "mimetic", "row-column", "pruning"])
def test_generated_weights(method: str, donor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = DONORS[donor](), {}
    if method == "sliced with text":
        (tmp_path / "text.txt").write_text("Some text that shows what the donor does with its bytes. " * 40)
        method, options = "sliced", {"text": str(tmp_path / "text.txt")}
    expected = sample(method, model, **options)
    sizes = use_other_lapack(monkeypatch)
    assert_close(sample(method, model, **options), expected)
    if donor == "symmetric" and method in ("sliced", "matrix-normal"):
        assert max(sizes) > 3, "LAPACK had a choice"


@pytest.mark.parametrize("donor", DONORS)
def test_units_and_the_tables_that_the_autoencoder_learns(donor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = zoo_of({"wide": DONORS[donor](0), "other": DONORS[donor](1)})

    def tensors() -> dict[str, Tensor]:
        units = {f"{d.name} {kind}": d.units[kind] for d in align_donors(zoo) for kind in ROLES}
        for found in read_training_donors(zoo, quiet=True)[0]:
            tables = found.blocks | {"token": found.tokens}
            units |= {f"{found.name} table {name}": table for name, table in tables.items()}
        return units

    expected = tensors()
    assert len(expected) == 2 * (len(ROLES) + 4)
    use_other_lapack(monkeypatch)
    assert_close(tensors(), expected)


@pytest.mark.parametrize("weight", ["generic", "orthogonal"])
def test_pissa(weight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(hidden_size=32, layers=1))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2 and weight == "orthogonal":
                nn.init.orthogonal_(p)
                p *= torch.where(torch.arange(len(p)) < 4, 2.0, 1.0)[:, None]  # four equal values, then the others
    blueprint = Blueprint.from_lora(model.config.to_dict(), {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"})

    def pairs() -> dict[str, Tensor]:
        return dict(samplers.get("pissa")().fit(zoo_of({"base": model}), blueprint).sample(blueprint, 0))

    expected = pairs()
    sizes = use_other_lapack(monkeypatch, share=1e-6)
    for name, tensor in pairs().items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=0)
    assert max(sizes) == (1 if weight == "generic" else max(sizes)) and len(sizes) > 7
