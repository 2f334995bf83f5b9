"""Units hold the whole function of a decoder, at its own width and at a larger one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.zoo.units.test_canonical import CONFIGS, IDS, decoder_of, in_own_dtype, logits, random_model
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.units.canonical import canonicalise
from zoo.units.residual_basis import residual_vectors
from zoo.units.resizing import principal_axes, project_to_axes, residual_energy, resize_units, to_width
from zoo.units.units import ROLES, decoder_to_units, require_units, unit_addresses, units_to_decoder


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa-tied", "mistral", "llama-odd-head-dim", "phi3"])
def test_units_are_the_whole_function(name: str) -> None:
    model = random_model(CONFIGS[name])
    canonical = canonicalise(decoder_of(model)[0]).decoder
    units = decoder_to_units(canonical)
    for kind, unit in units.items():
        assert len(unit.vectors) == unit_addresses(canonical.metadata)[kind][0].numel()
        assert unit.vectors.shape[1] == len(ROLES[kind])
    with torch.no_grad():
        expected = in_own_dtype(model)(IDS).logits
    again = units_to_decoder({kind: unit.vectors for kind, unit in units.items()}, canonical.metadata)
    assert (logits(again, model.config, IDS) - expected).abs().max() < 1e-9


def test_zero_padding_is_exact_growth_of_the_residual_stream() -> None:
    model = random_model({**CONFIGS["llama-gqa-tied"], "rms_norm_eps": 1e-30})
    canonical = canonicalise(decoder_of(model)[0]).decoder
    wide = {kind: to_width(unit.vectors, 44) for kind, unit in decoder_to_units(canonical).items()}
    grown = units_to_decoder(wide, replace(canonical.metadata, width=44))
    config = type(model.config).from_dict({**model.config.to_dict(), "hidden_size": 44, "head_dim": 8})
    with torch.no_grad():
        expected = in_own_dtype(model)(IDS).logits
    assert (logits(grown, config, IDS) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa-tied"])
def test_a_stream_that_needs_no_more_is_narrowed_without_loss(name: str) -> None:
    model = random_model({**CONFIGS[name], "rms_norm_eps": 1e-30})
    canonical = canonicalise(decoder_of(model)[0]).decoder
    width = canonical.metadata.width
    turn = torch.linalg.qr(torch.randn(44, 44, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    hidden = {kind: to_width(unit.vectors, 44) @ turn for kind, unit in decoder_to_units(canonical).items()}
    found = project_to_axes(hidden, principal_axes(residual_energy(hidden, canonical.metadata), width))
    with torch.no_grad():
        expected = in_own_dtype(model)(IDS).logits
    again = units_to_decoder(found, canonical.metadata)
    assert (logits(again, model.config, IDS) - expected).abs().max() < 1e-9
    rows = residual_vectors(again)
    held = residual_energy(found, canonical.metadata)
    assert torch.allclose(rows.mT @ rows, held)  # what the axes weigh is what the tensors hold


def test_cropping_undoes_padding() -> None:
    x = torch.randn(3, 2, 5)
    assert torch.equal(to_width(to_width(x, 9), 5), x)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma3", "llama-mqa-biased", "gpt_neox", "olmo2"])
def test_models_with_more_than_units_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="units do not describe its whole function"):
        require_units(decoder_of(random_model(CONFIGS[name]))[0], "here")


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 40}, {"intermediate_size": 100}, {"num_attention_heads": 8, "num_key_value_heads": 4}],
)
def test_growth_by_resizing_is_exact(changes: dict[str, int]) -> None:
    base = {**CONFIGS["llama-gqa-tied"], "rms_norm_eps": 1e-30, "head_dim": 8}
    model = random_model(base)
    canonical = canonicalise(decoder_of(model)[0]).decoder
    config = type(model.config).from_dict({**model.config.to_dict(), **changes})
    target = Blueprint.from_pretrained_config(config).metadata
    assert target is not None
    vectors = {kind: unit.vectors for kind, unit in decoder_to_units(canonical).items()}
    grown = units_to_decoder(resize_units(vectors, canonical.metadata, target), target)
    with torch.no_grad():
        expected = in_own_dtype(model)(IDS).logits
    assert (logits(grown, config, IDS) - expected).abs().max() < 1e-8


def test_shrinking_keeps_the_most_important() -> None:
    canonical = canonicalise(decoder_of(random_model({**CONFIGS["llama-mha"], "num_hidden_layers": 5}))[0]).decoder
    target = replace(canonical.metadata, width=20, layers=3, heads=2, kv_heads=2, ffn=10)
    vectors = {kind: unit.vectors for kind, unit in decoder_to_units(canonical).items()}
    small = units_to_decoder(resize_units(vectors, canonical.metadata, target), target)
    assert torch.equal(small.embed, canonical.embed[:, :20])
    for layer, old in zip(small.layers, (canonical.layers[i] for i in (0, 2, 4)), strict=True):
        assert torch.equal(layer.down, old.down[:10, :20])
        assert torch.allclose(layer.v * 20**0.5, old.v[:2, :, :20] * 32**0.5)
        assert torch.equal(layer.o, old.o[:2, :, :20])


def test_another_head_dim_is_refused() -> None:
    canonical = canonicalise(decoder_of(random_model(CONFIGS["llama-mha"]))[0]).decoder
    with pytest.raises(UserError, match="head_dim"):
        resize_units({}, canonical.metadata, replace(canonical.metadata, head_dim=4))
