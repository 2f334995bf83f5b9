"""Tables hold the whole function of a decoder of every family, at its own shape and at a larger one."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from autoencoder import growing
from tests.zoo.units.test_canonical import CONFIGS, IDS, decoder_of, in_own_dtype, logits, random_model
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.units.canonical import canonicalise
from zoo.units.decoder import Decoder
from zoo.units.family import (
    FLAGS,
    PLAIN,
    Family,
    family_of,
    require_family,
    require_served,
    require_target_family,
    with_family,
)
from zoo.units.tables import (
    join_constants,
    layer_to_tables,
    position_table,
    split_constants,
    tables_to_decoder,
    tables_to_layer,
    to_checkpoint,
    token_table,
)

ALL: dict[str, dict[str, Any]] = {
    **CONFIGS,
    "gemma": dict(CONFIGS["gemma3"], model_type="gemma"),
    "gpt_neox-unbiased": dict(CONFIGS["gpt_neox"], attention_bias=False),  # its shift before attention has no bias
    "opt-unbiased": dict(CONFIGS["opt"], enable_bias=False),
}


def canonical_decoder(name: str, **changes: Any) -> tuple[torch.nn.Module, Decoder]:
    """A random model, and its canonical form with its family."""
    model = random_model({**ALL[name], **changes})
    decoder = canonicalise(decoder_of(model)[0]).decoder
    return model, replace(decoder, metadata=with_family(decoder.metadata, require_family(decoder, name)))


@pytest.mark.parametrize("name", ALL)
def test_tables_hold_the_whole_function(name: str) -> None:
    model, decoder = canonical_decoder(name)
    shape = decoder.metadata
    assert family_of(shape) == family_of(require_target_family(Blueprint.from_pretrained_config(model.config), name))
    layers = [tables_to_layer(layer_to_tables(layer, shape), shape) for layer in decoder.layers]
    again = tables_to_decoder(token_table(decoder), layers, shape, position_table(decoder))
    with torch.no_grad():
        expected = in_own_dtype(model)(IDS).logits
    found = logits(to_checkpoint(again, tied=False), model.config, IDS)
    assert (found - expected).abs().max() < 1e-9


LARGER = dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, intermediate_size=60)
LARGER_OF = {"gpt2": dict(n_embd=64, n_head=8, n_inner=160), "gpt_neox": {**LARGER, "num_key_value_heads": 8}}
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")


@pytest.mark.parametrize("name", ["llama-gqa-tied", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "gpt2", "gpt_neox"])
def test_growth_without_noise_is_exact(name: str) -> None:
    """Width-free vectors, gains and constants keep their meaning at another width."""
    small = dict.fromkeys(EPSILONS, 1e-30)
    model, decoder = canonical_decoder(name, **small)
    config = type(model.config).from_dict({**model.config.to_dict(), **LARGER_OF.get(name, LARGER)})
    config.tie_word_embeddings = False
    larger = require_target_family(Blueprint.from_pretrained_config(config), name)
    tables = [layer_to_tables(layer, decoder.metadata) for layer in decoder.layers]
    positions = position_table(decoder)
    with patch.object(growing, "NOISE", 0.0):
        layers = [tables_to_layer(growing.grow_tables(t, larger, i), larger) for i, t in enumerate(tables)]
        tokens = growing.grow_tokens(token_table(decoder), larger)
        positions = None if positions is None else growing.grow_positions(positions, larger)
    grown = to_checkpoint(tables_to_decoder(tokens, layers, larger, positions), tied=False)
    with torch.no_grad():
        expected = in_own_dtype(model)(IDS).logits
    assert grown.embed.shape == (40, 64)
    assert (logits(grown, config, IDS) - expected).abs().max() < 1e-8


@pytest.mark.parametrize("name", ["llama-mha", "gemma3", "gpt2", "gpt_neox"])
def test_a_head_that_is_the_embedding_is_tied_without_loss(name: str) -> None:
    """A constant of the head, too: tied checkpoints have no bias for it."""
    model, decoder = canonical_decoder(name)
    shape = decoder.metadata
    tokens = token_table(decoder)
    scale = shape.width if family_of(shape).scaled_embedding else 1.0
    pairs = split_constants(tokens, family_of(shape))
    tokens = pairs["token"]
    tokens[:, 1] = tokens[:, 0] * shape.width**0.5 / scale**0.5
    if family_of(shape).norm == "layer":
        tokens = join_constants(tokens, pairs["token_numbers"][:, 0])
    layers = [tables_to_layer(layer_to_tables(layer, shape), shape) for layer in decoder.layers]
    made = tables_to_decoder(tokens, layers, shape, position_table(decoder))
    tied, untied = (logits(to_checkpoint(made, tied), model.config, IDS) for tied in (True, False))
    assert (tied - untied).abs().max() < 1e-9


def test_the_family_of_each_architecture() -> None:
    families = {name: require_family(decoder_of(random_model(ALL[name]))[0], name) for name in ALL}
    plain = {name for name, family in families.items() if family == PLAIN}
    assert plain == {"llama-mha", "llama-gqa-tied", "llama-odd-head-dim", "llama-wide-heads", "mistral", "phi3"}
    assert families["llama-mqa-biased"].biases == ("q", "k", "v", "o", "gate", "up", "down")
    assert families["qwen3"] == replace(PLAIN, norms=("attn", "mlp", "q", "k"))
    assert families["olmo2"] == replace(PLAIN, norms=("attn.out", "mlp.out", "q", "k"), gains_per_head=True)
    assert families["gemma2"].norms == ("attn", "mlp", "attn.out", "mlp.out") and families["gemma2"].scaled_embedding
    gpt2, neox = families["gpt2"], families["gpt_neox"]
    assert gpt2 == families["gpt2-untied"] and (gpt2.gated, gpt2.positions, gpt2.rotary) == (False, True, 0.0)
    assert neox.parallel and neox.rotary == 0.25 and not families["gpt_neox-serial"].parallel
    assert len({tuple(f.flags()) for f in families.values()}) == len(set(families.values()))
    for family in families.values():
        assert Family.from_json(asdict(family)) == family and len(family.flags()) == FLAGS
        assert all(0 <= flag <= 1 for flag in family.flags())


@pytest.mark.parametrize(
    "values",
    [
        {"norms": ["nowhere"]},
        {"gated": 1},
        {"rotary": "1"},
        {"rotary": 2.0},
        {"depth": 3},
        {"biases": [["q"]]},
        {"norm": None},
        {"norm": "batch"},
    ],
)
def test_a_family_of_an_untrusted_file_is_checked(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="famil"):
        Family.from_json(asdict(PLAIN) | values)


def family(name: str) -> Family:
    return family_of(require_target_family(Blueprint.from_config(ALL[name]), name))


@pytest.mark.parametrize(
    ("target", "zoo", "missing"),
    [
        ("gpt2", ["llama-mha"], "an MLP without gates and learned positions"),
        ("gpt_neox", ["qwen3", "llama-mha"], "an MLP without gates"),
        ("llama-mha", ["gpt2"], "an MLP with gates and rotary attention"),
        ("qwen3", ["gpt2", "gpt_neox"], "an MLP with gates"),
        ("opt", ["gpt_neox"], "learned positions"),
    ],
)
def test_a_family_that_no_donor_can_serve_is_refused(target: str, zoo: list[str], missing: str) -> None:
    with pytest.raises(UserError, match=f"^diffusion: the target has {missing}, which no donor has; add such a donor$"):
        require_served(family(target), [family(name) for name in zoo], "diffusion")


def test_what_no_donor_has_is_said() -> None:
    def lines(target: str, *zoo: str) -> list[str]:
        return require_served(family(target), [family(name) for name in zoo], "diffusion")

    assert lines("qwen3", "llama-mha", "qwen3") == []
    assert lines("llama-mqa-biased", "llama-mha") == [
        "no donor has the target's o.bias, down.bias, gate.bias, up.bias, q.bias, k.bias, v.bias: gains are 1, biases 0"
    ]
    new, differs = lines("gemma3", "llama-mha")
    assert new == "no donor has the target's attn.out.gain, mlp.out.gain, q.gain, k.gain: gains are 1, biases 0"
    assert differs == "no donor has the target's norms, activation, scaled embedding: expect a weak start"


def test_a_decoder_with_more_than_tables_is_refused() -> None:
    bert = Blueprint.from_config(dict(ALL["llama-mha"], model_type="bert"))
    with pytest.raises(UserError, match=r"^here: this 'bert' lacks gains of norms, so its symmetries are unknown"):
        require_target_family(bert, "here")
    sizes = dict(ALL["gemma3"], model_type="gemma3_text")
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    both = {"model_type": "gemma3", "mm_tokens_per_image": 4, "vision_config": {**vision, "patch_size": 14}}
    with pytest.raises(UserError, match=r"^here: .* are no part of a decoder; give the config of its language model"):
        require_target_family(Blueprint.from_config({**both, "text_config": sizes}), "here")
