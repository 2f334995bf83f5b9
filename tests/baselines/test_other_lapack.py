"""Methods give the same weights, up to rounding, whatever signs and bases LAPACK returns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from autoencoder.training import AutoencoderTrainConfig, pca_autoencoder
from diffusion.views import donor_contexts
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
def test_units_and_the_autoencoder_that_training_starts_from(donor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = zoo_of({"wide": DONORS[donor](0), "other": DONORS[donor](1)})

    def tensors() -> dict[str, Tensor]:
        donors = list(align_donors(zoo))
        model = pca_autoencoder(donors, AutoencoderTrainConfig(hidden=8), [])
        units = {f"{d.name} {kind}": d.units[kind] for d in donors for kind in ROLES}
        return units | {name: t.detach().clone() for name, t in model.state_dict().items()}

    expected = tensors()
    use_other_lapack(monkeypatch)
    assert_close(tensors(), expected)


def test_contexts_of_two_donors_have_a_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first component of two donors is (x, -x), whose third moment is zero."""
    tables = [{name: torch.randn(6, generator=torch.Generator().manual_seed(i)) for name in "ab"} for i in range(2)]
    expected = donor_contexts(tables, 3)
    assert float(expected[:, 0].abs().min()) > 0.5
    for seed in range(4):
        use_other_lapack(monkeypatch, seed)
        torch.testing.assert_close(donor_contexts(tables, 3), expected, atol=1e-6, rtol=0)


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
