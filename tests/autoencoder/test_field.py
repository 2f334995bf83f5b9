"""Tables, the field and the latents: what must be exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoencoder.behaviour import field_decoder, logits, make_skeleton
from autoencoder.field import FieldSizes, Latents, WeightField, all_blocks, start_field
from autoencoder.growing import grow_tables
from autoencoder.model import WeightAutoencoder, new_autoencoder
from autoencoder.shapes import random_shape, shape_range
from tests.support.tiny import config
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.units.decoder import read_decoder, write_decoder
from zoo.units.gains import tie_head
from zoo.units.tables import BLOCK_TABLES, layer_to_tables, tables_to_decoder, tables_to_layer, token_table

TOKENS = torch.arange(12)[None] % 48
SIZES = FieldSizes(width=32, neurons=40, groups=4, head_dim=8, tokens=48, bases=3, token_bases=1, rank=96)


def shape_of(**changes: Any) -> Metadata:
    found = Blueprint.from_pretrained_config(config(32, 4, layers=3)).metadata
    assert found is not None
    return replace(found, **changes)


def random_tables(shape: Metadata, seed: int = 0) -> tuple[list[dict[str, Tensor]], Tensor]:
    """The tables of each block, and of the tokens."""
    rng = torch.Generator().manual_seed(seed)
    groups, share, h, d = shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim, shape.width

    def draw(*size: int) -> Tensor:
        return 0.3 * torch.randn(*size, generator=rng)

    blocks = [
        {"neuron": draw(shape.ffn, 3, d), "query": draw(groups, share, h, 2, d), "key": draw(groups, h, 2, d)}
        for _ in range(shape.layers)
    ]
    return blocks, draw(shape.vocab, 2, d)


def logits_of(shape: Metadata, blocks: list[dict[str, Tensor]], tokens: Tensor) -> Tensor:
    decoder = tables_to_decoder(tokens, [tables_to_layer(block) for block in blocks], shape)
    return logits(make_skeleton(config().to_dict(), shape), decoder, TOKENS)


def latents_for(shape: Metadata, seed: int = 0) -> Latents:
    rng = torch.Generator().manual_seed(seed)
    return Latents(torch.randn(16, generator=rng), torch.randn(shape.layers, 16, generator=rng))


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_tables_hold_the_whole_function_of_a_decoder(kv: int) -> None:
    shape = shape_of(kv_heads=kv)
    blueprint = Blueprint.from_config(config(32, kv, layers=3).to_dict() | {"architectures": ["LlamaForCausalLM"]})
    rng = torch.Generator().manual_seed(kv)
    weights = {
        spec.name: torch.ones(spec.shape) if spec.role == "norm" else 0.2 * torch.randn(spec.shape, generator=rng)
        for spec in blueprint.specs
    }
    decoder = read_decoder(blueprint, lambda name: weights[name].double(), where="model")
    blocks = [layer_to_tables(layer, shape) for layer in decoder.layers]
    sizes = {name: tuple(table.shape) for name, table in blocks[0].items()}
    assert sizes == {"neuron": (40, 3, 32), "query": (kv, 4 // kv, 8, 2, 32), "key": (kv, 8, 2, 32)}
    again = tables_to_decoder(token_table(decoder), [tables_to_layer(block) for block in blocks], shape)
    written = dict(write_decoder(again, blueprint))
    assert written.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(written[name].float(), tensor, atol=1e-6, rtol=1e-5)


def one_hot(field: WeightField) -> None:
    """Makes block l of a shape of three blocks read base l alone: its mixers see the first block latent."""
    for table, mixer in field.mixers.items():
        assert isinstance(mixer, nn.Linear)
        nn.init.zeros_(mixer.weight)
        nn.init.zeros_(mixer.bias)
        count = field.sizes.base_count(table)
        with torch.no_grad():
            mixer.weight[:count, :count] = torch.eye(count)
            if table == "token":
                mixer.weight[:count].zero_()
                mixer.bias[:count] = 1.0


class _LatentAsCondition(nn.Module):
    """Passes the block latents on as the condition; they are the last 16 features."""

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.pad(features[:, -16:], (0, 128 - 16))


def test_a_field_with_enough_bases_and_rank_is_a_donor_exactly() -> None:
    shape = shape_of()
    blocks, tokens = random_tables(shape)
    field = WeightField(SIZES)
    start_field(field, blocks, [{"token": tokens}], stream(0, "start"))
    one_hot(field)
    field.condition = _LatentAsCondition()  # type: ignore[assignment]
    latents = Latents(torch.zeros(16), torch.eye(3, 16))
    with torch.no_grad():
        found = all_blocks(field, shape, latents)
        pairs = field.tokens(shape, latents)
    for i, block in enumerate(blocks):
        for table in BLOCK_TABLES:
            torch.testing.assert_close(found[table][i], block[table], atol=2e-5, rtol=0)
    torch.testing.assert_close(pairs, tokens, atol=2e-5, rtol=0)
    with torch.no_grad():
        again = logits(
            make_skeleton(config().to_dict(), shape), field_decoder(field, replace(shape, tied=False), latents), TOKENS
        )
    torch.testing.assert_close(again, logits_of(shape, blocks, tokens), atol=1e-4, rtol=0)


def test_too_small_a_rank_keeps_the_principal_components() -> None:
    shape = shape_of(layers=1)
    blocks, tokens = random_tables(shape)
    errors = []
    for rank in (20, 60):
        field = WeightField(replace(SIZES, rank=rank, bases=1))
        start_field(field, blocks, [{"token": tokens}], stream(0, "start"))
        base, maps, scale = field.bases["neuron"][0], field.maps["neuron"], field.get_buffer("scale_neuron")
        found = torch.einsum("ns,spw->npw", base, maps * scale[:, None]).detach()
        wanted = blocks[0]["neuron"] / scale[:, None]
        errors.append(float((found / scale[:, None] - wanted).square().sum()))
        left = torch.linalg.svdvals(wanted.flatten(1))[rank:].square().sum()
        assert errors[-1] == pytest.approx(float(left), rel=1e-3, abs=1e-6)
    assert errors[1] < errors[0]


def test_what_no_donor_has_starts_neither_at_zero_nor_loud() -> None:
    shape = shape_of(width=24, ffn=30, kv_heads=2, heads=4)
    blocks, tokens = random_tables(shape)
    field = WeightField(SIZES)
    start_field(field, blocks, [{"token": tokens}], stream(0, "start"))
    base = field.bases["neuron"][0].detach()
    assert 0.2 < float(base[30:].square().mean() / base[:30].square().mean()) ** 0.5 < 1
    maps = field.maps["neuron"].detach()
    assert 0 < float(maps[..., 24:].square().mean()) < float(maps[..., :24].square().mean())


@pytest.fixture(scope="module")
def coder() -> WeightAutoencoder:
    return new_autoencoder(SIZES, tuple(map(str, range(48))), "llama", [], 0).eval()


SHAPES = {
    "as the donor": {},
    "grouped queries": dict(heads=12, kv_heads=4, width=24),
    "one KV head": dict(kv_heads=1),
    "deeper": dict(layers=7),
    "one layer": dict(layers=1),
    "narrower": dict(width=20, ffn=12, kv_heads=2, heads=2),
    "wider": dict(width=48),
    "more neurons": dict(ffn=100),
    "more KV heads": dict(width=48, heads=6, kv_heads=6),
    "smaller heads": dict(head_dim=4),
    "larger heads": dict(head_dim=16, heads=2, kv_heads=2),
    "tied": dict(tied=True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_written(name: str, coder: WeightAutoencoder) -> None:
    shape = shape_of(**SHAPES[name])
    latents = latents_for(shape)
    decoder = coder.decode(shape, latents, coder.token_pairs(shape, latents))
    skeleton = make_skeleton(config().to_dict(), shape)
    written = dict(write_decoder(tie_head(decoder) if shape.tied else decoder, skeleton.blueprint))
    assert {n: tuple(t.shape) for n, t in written.items()} == {s.name: s.shape for s in skeleton.blueprint.specs}
    assert ("lm_head.weight" in written) == (not shape.tied)
    found = logits(skeleton, decoder, TOKENS)
    assert found.shape == (1, 12, 48) and found.isfinite().all()
    again = coder.decode(shape, latents, coder.token_pairs(shape, latents))
    assert torch.equal(again.layers[-1].down, decoder.layers[-1].down)


@pytest.mark.parametrize("larger", [dict(ffn=100), dict(ffn=55)])
def test_repeated_neurons_share_their_output(larger: dict[str, int]) -> None:
    shape = shape_of()
    blocks, tokens = random_tables(shape)
    grown = [grow_tables(block, replace(shape, **larger), i) for i, block in enumerate(blocks)]
    assert len(grown[0]["neuron"]) == larger["ffn"]
    found = logits_of(replace(shape, **larger), grown, tokens)
    torch.testing.assert_close(found, logits_of(shape, blocks, tokens), atol=2e-5, rtol=0)


@pytest.mark.parametrize("groups", [6, 8])
def test_repeated_heads_share_their_output(groups: int) -> None:
    shape, larger = shape_of(width=48), shape_of(width=48, heads=groups, kv_heads=groups)
    blocks, tokens = random_tables(shape)
    grown = [grow_tables(block, larger, i) for i, block in enumerate(blocks)]
    assert grown[0]["query"].shape[:2] == (groups, 1) and len(grown[0]["key"]) == groups
    found = logits_of(larger, grown, tokens)
    torch.testing.assert_close(found, logits_of(shape, blocks, tokens), atol=2e-5, rtol=0)


def test_further_coordinates_hold_weak_noise() -> None:
    shape, larger = shape_of(), shape_of(width=48)
    blocks, _ = random_tables(shape)
    one, again = (grow_tables(blocks[0], larger, 0)["neuron"] for _ in range(2))
    assert torch.equal(one, again) and torch.equal(one[..., :32], blocks[0]["neuron"])
    ratio = one[..., 32:].square().mean().sqrt() / one[..., :32].square().mean().sqrt()
    assert float(ratio) == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(one, grow_tables(blocks[0], larger, 1)["neuron"])


def test_latents_at_another_depth_and_mixed() -> None:
    latents = Latents(torch.tensor([1.0]), torch.tensor([[0.0], [1.0], [2.0]]))
    assert latents.at_depth(3) is latents
    assert latents.at_depth(5).blocks.flatten().tolist() == [0, 1, 1, 2, 2]
    assert latents.at_depth(2).blocks.flatten().tolist() == [0, 2]
    assert latents.at_depth(1).blocks.flatten().tolist() == [0]
    other = Latents(torch.tensor([5.0]), torch.tensor([[4.0], [8.0]]))
    mixed = latents.mixed(other, 0.25)
    assert mixed.model.tolist() == [4.0]
    assert mixed.blocks.flatten().tolist() == pytest.approx([0.75 * 4, 0.25 + 0.75 * 8, 0.5 + 0.75 * 8])


def test_a_donors_latents_have_unit_rms_and_depend_on_its_weights(coder: WeightAutoencoder) -> None:
    shape = shape_of()
    found = []
    for seed in (0, 1):
        blocks, tokens = random_tables(shape, seed)
        stacked = {t: torch.stack([block[t] for block in blocks]) for t in BLOCK_TABLES}
        with torch.no_grad():
            found.append(coder.encode(stacked, tokens))
        assert found[-1].blocks.shape == (3, 16) and found[-1].model.shape == (16,)
        assert torch.allclose(found[-1].blocks.square().mean(1), torch.ones(3), atol=1e-2)
    assert (found[0].blocks - found[1].blocks).abs().max() > 0.1


def test_random_shapes_fit_the_field_and_transformers() -> None:
    base = shape_of()
    bounds = shape_range([base, shape_of(width=24, layers=1, ffn=28)], SIZES)
    shapes = [random_shape(base, bounds, 0, f"shape {i}") for i in range(40)]
    assert len({str(shape) for shape in shapes}) > 30
    for shape in shapes:
        assert 16 <= shape.width <= SIZES.width and shape.width % shape.heads == 0
        assert shape.heads % shape.kv_heads == 0 and shape.kv_heads <= SIZES.groups
        assert 1 <= shape.layers <= 6 and shape.ffn <= SIZES.neurons and shape.head_dim == 8
        assert 0.5 <= shape.heads * 8 / shape.width <= 2 and 1.2 <= shape.ffn / shape.width <= 4
    assert {shape.tied for shape in shapes} == {True, False}
