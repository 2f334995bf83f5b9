"""The diffusion: what it generates has the right shape, scale and bytes; training resumes exactly."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from autoencoder.loading import load_autoencoder
from autoencoder.training import AutoencoderTrainConfig, train_autoencoder
from diffusion import Request, WeightDiffusionPipeline, training
from diffusion.conditions import FEATURES, MODEL_FEATURES, SHAPE_FEATURES, model_features, unit_features
from diffusion.config import DiffusionTrainConfig
from diffusion.memory import MAX_LAYERS, TokenScale
from diffusion.pipeline import CONDITIONS
from diffusion.sampler import DiffusionSampler, zoo_strings
from diffusion.views import donor_contexts, first_head_unit, mean_tokens, view_shape
from tests.support.commands import generate
from tests.support.tiny import STD, config, make_zoo, role
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.training.resumable import STATE_FILE
from zoo.units.residual_basis import residual_vectors
from zoo.units.resizing import residual_energy
from zoo.units.units import unit_addresses
from zoo.vocabularies.tokens import Tokens

SMALL = DiffusionTrainConfig(steps=60, batch=128, hidden=64, blocks=2, pool=8, lr=3e-3, ema=0.99)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def autoencoder(zoo: Zoo) -> Path:
    return train_autoencoder(
        AutoencoderTrainConfig(steps=5), zoo.path, zoo.path.parent / "autoencoder", device="cpu", quiet=True
    )


@pytest.fixture(scope="module")
def trained(zoo: Zoo, autoencoder: Path) -> Path:
    return training.train_diffusion(
        SMALL, zoo.path, autoencoder, zoo.path.parent / "pipeline", device="cpu", quiet=True
    )


@pytest.fixture(scope="module")
def pipeline(trained: Path) -> WeightDiffusionPipeline:
    return WeightDiffusionPipeline.from_pretrained(trained)


def metadata(**changes: Any) -> Metadata:
    found = Blueprint.from_pretrained_config(config(28, 2, layers=3)).metadata
    assert found is not None
    return replace(found, **changes)


def test_saved_and_loaded_it_generates_the_same_bytes(pipeline: WeightDiffusionPipeline, tmp_path: Path) -> None:
    request = Request(metadata(), seed=3, steps=5)
    pipeline.save_pretrained(tmp_path / "again")
    again = WeightDiffusionPipeline.from_pretrained(tmp_path / "again")
    one, other = pipeline(request), again(request)
    assert torch.equal(one.embed, other.embed) and torch.equal(one.layers[2].q, other.layers[2].q)
    assert not [p for p in (tmp_path / "again").rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".py")]


def test_layers_do_not_depend_on_the_order(pipeline: WeightDiffusionPipeline) -> None:
    request = Request(metadata(), seed=1, steps=4)
    one, other = pipeline(request), pipeline(request)
    forward = [layer.down.clone() for layer in one.layers]
    backward = [other.layers[i].down.clone() for i in (2, 1, 0)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not torch.equal(forward[0], pipeline(replace(request, seed=2)).layers[0].down)


def test_the_scale_of_every_role_is_the_donors(tmp_path: Path) -> None:
    """Donors are iid normal with one deviation per role, and as wide as the target: a reader of a narrower donor is
    rightly smaller in a wider stream. Canonical form keeps products, not factors: it balances q
    with k, v with o and up with down, so that the geometric means are what a target must have."""
    zoo = make_zoo(tmp_path, [{"hidden_size": 32, "kv": kv} for kv in (2, 4)])
    coder = train_autoencoder(
        AutoencoderTrainConfig(steps=5), zoo.path, tmp_path / "autoencoder", device="cpu", quiet=True
    )
    folder = training.train_diffusion(SMALL, zoo.path, coder, tmp_path / "pipeline", device="cpu", quiet=True)
    pipeline = WeightDiffusionPipeline.from_pretrained(folder)
    target = metadata(width=32, layers=2)
    found: dict[str, list[float]] = {}
    for seed in range(3):
        decoder = pipeline(Request(target, seed=seed))
        vectors = {"embed": decoder.embed, "head": decoder.head}
        for layer in decoder.layers:
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                found.setdefault(name, []).append(float(getattr(layer, name).square().mean()))
        for name, x in vectors.items():
            found.setdefault(name, []).append(float(x.square().mean()))
    std = {name: (sum(v) / len(v)) ** 0.5 for name, v in found.items()}
    for name in ("embed", "head", "gate"):
        assert std[name] == pytest.approx(STD[name], rel=0.05), name
    for a, b in (("q", "k"), ("up", "down")):
        assert (std[a] * std[b]) ** 0.5 == pytest.approx((STD[a] * STD[b]) ** 0.5, rel=0.05), (a, b)


def test_query_heads_of_a_group_share_their_key(pipeline: WeightDiffusionPipeline) -> None:
    shape = metadata(heads=4, kv_heads=2)
    layer = pipeline(Request(shape, steps=4)).layers[0]
    assert layer.k.shape == (2, 8, 28) and layer.q.shape == (4, 8, 28)
    index = first_head_unit(shape, "qk").unflatten(0, (3, 4, 4))  # layer, head, plane
    assert (index[:, ::2] == -1).all()
    own = torch.arange(index.numel()).view_as(index)
    assert (index[:, 1::2] == own[:, ::2]).all()
    assert (first_head_unit(replace(shape, kv_heads=4), "vo") == -1).all()


def test_units_of_a_block_share_a_block_and_of_a_head_a_head(pipeline: WeightDiffusionPipeline) -> None:
    shape = metadata(width=32, layers=4, heads=6, kv_heads=3)  # the donors have two layers
    seen: dict[str, list[Tensor]] = {"block": [], "neuron": [], "qk": [], "vo": []}
    decode = pipeline._decode

    def watching(kind: str, tokens: Tensor, request: Request, name: str) -> Tensor:
        if kind != "vocab":
            bank = pipeline.memory.bank(kind)
            nearest = torch.cdist(tokens, bank.tokens).argmin(1)
            assert bank.block is not None
            seen["block"].append(bank.block[nearest])
            if bank.group is not None:
                seen[kind].append(bank.group[nearest].unflatten(0, (shape.heads, -1)))
        return decode(kind, tokens, request, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_decode", watching)
        for decoder in (pipeline(Request(shape, seed=seed, steps=8)) for seed in (0, 1)):
            assert len([layer.q for layer in decoder.layers]) == 4
    assert len(seen["block"]) == 3 * 8
    for at in range(8):
        of = torch.cat(seen["block"][3 * at : 3 * at + 3])
        assert (of == of.mode().values).float().mean() > 0.98  # the noise may bring one nearer to a stranger
        taken = []
        for q, v in zip(seen["qk"][at], seen["vo"][at], strict=True):
            both = torch.cat([q, v])
            taken.append(int(both.mode().values))
            assert (both == taken[-1]).float().mean() > 0.8
        pairs = list(zip(taken[::2], taken[1::2], strict=True))  # query heads that share a key
        if of.mode().values // MAX_LAYERS == 1:  # the donor with a KV head for each query head
            assert all(a == b for a, b in pairs) and len(set(pairs)) == 3
        else:  # those with two KV heads of two query heads
            assert set(pairs) == {(0, 1), (2, 3)}
    assert len(torch.stack([b.mode().values for b in seen["block"]]).unique()) > 1  # not the same for all layers


def test_tokens_are_donors_tokens_of_the_same_string(pipeline: WeightDiffusionPipeline) -> None:
    """Whatever the prior has learned: in another order, some of them left out, and with one that no donor knows."""
    memory = pipeline.memory
    known = memory.config["tokens"]
    names = (*reversed(known[:30]), "nowhere", *known[40:])
    shape = metadata(vocab=len(names))
    request = Request(shape, tokens=names, steps=8)
    features = pipeline._unit_features(request, "vocab", unit_addresses(shape)["vocab"], "vocab")
    strings = memory.rows(names)
    bank, context = memory.bank("vocab"), pipeline._context(request)
    made = pipeline._solve(request, "vocab", "vocab", features, context, memory.lookup(strings), bank, strings)
    assert bank.group is not None and len(bank.tokens) > len(known)
    apart = torch.cdist(made, bank.tokens).masked_fill(strings[:, None] != bank.group, torch.inf)
    own = apart.min(1).values / made.norm(dim=1)
    assert (own[strings >= 0] < 0.3).all() and own[30] == torch.inf and made[30].isfinite().all()


def test_a_wider_target_than_any_donor(pipeline: WeightDiffusionPipeline) -> None:
    decoder = pipeline(Request(metadata(width=48), steps=4))
    beyond = decoder.layers[0].down[:, 32:]
    assert beyond.shape[1] == 16 and beyond.abs().min() > 0
    assert beyond.std() < 0.2 * decoder.layers[0].down[:, :32].std()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_narrower_target_keeps_the_axes_of_most_energy(pipeline: WeightDiffusionPipeline, kv_heads: int) -> None:
    shape = metadata(width=20, heads=4, kv_heads=kv_heads)
    request = Request(shape, steps=4)
    decoder = pipeline(request)
    assert decoder.embed.shape == (48, 20) and decoder.layers[0].k.shape == (kv_heads, 8, 20)
    rows = residual_vectors(decoder).double()
    moment = rows.mT @ rows
    held = moment.diagonal()
    noise = 1e-4 if kv_heads == 4 else 0.05  # heads that share a key are generated with one each
    assert (moment - held.diag()).abs().max() < noise * held.max()  # principal axes: nothing is correlated,
    assert (held[:-1] >= held[1:] * (1 - noise)).all()  # the largest first
    context = pipeline._context(request)
    with torch.no_grad():
        units = [{"vocab": pipeline._vocabulary(request, context)}]
    units += [pipeline._units(request, context, index) for index in range(shape.layers)]
    first = sum(float(residual_energy(u, shape).diagonal()[:20].sum()) for u in units)
    assert held.sum() > 1.02 * first  # more than the first coordinates of the same units


def test_controls_change_what_is_generated(pipeline: WeightDiffusionPipeline) -> None:
    request = Request(metadata(), steps=4)
    for address in (unit_addresses(request.metadata)["neuron"], unit_addresses(request.metadata)["vocab"]):
        kind = "neuron" if int(address[0][0]) >= 0 else "vocab"
        true, other, shuffled, mean = (
            pipeline._unit_features(replace(request, condition=c), kind, address, kind) for c in CONDITIONS
        )
        own = model_features(request.metadata, pipeline.memory.config["best_loss"])
        shapes = pipeline.memory.get_buffer("features_context")[:, :MODEL_FEATURES]
        assert torch.equal(true[0, :MODEL_FEATURES], own)
        assert (shuffled[0, :MODEL_FEATURES] == shapes).all(1).any()
        assert torch.equal(other[:, :MODEL_FEATURES], shuffled[:, :MODEL_FEATURES])
        assert torch.equal(other[:, MODEL_FEATURES:], true[:, MODEL_FEATURES:])
        gaps = (shapes - own)[:, :SHAPE_FEATURES].norm(dim=1)
        assert (other[0] - true[0])[:SHAPE_FEATURES].norm() >= gaps.median() > 0
        moved = not torch.equal(other[:, MODEL_FEATURES:], shuffled[:, MODEL_FEATURES:])
        assert moved == (kind == "neuron")  # rows of the vocabulary have no place in depth
        assert torch.allclose(mean[0, :MODEL_FEATURES], shapes.mean(0)) and len(torch.unique(mean, dim=0)) == 1
    made = [pipeline(replace(request, condition=c)).layers[0].up for c in CONDITIONS]
    assert not any(torch.equal(made[i], made[j]) for i in range(len(made)) for j in range(i))
    true = made[0]
    guided = pipeline(replace(request, guidance=2.0)).layers[0].up
    assert not torch.equal(true, guided)


def test_token_scale_round_trip() -> None:
    scale = TokenScale(2.5, (0.5, -1.0), (0.2, 3.0))
    latents, norms = torch.randn(7, 4), torch.randn(7, 2)
    again = scale.from_token(scale.to_token(latents, norms))
    assert torch.allclose(again[0], latents) and torch.allclose(again[1], norms, atol=1e-6)


def test_features_tell_addresses_apart() -> None:
    shape = metadata(heads=4, kv_heads=2)
    for kind in ("neuron", "qk", "vo"):
        found = unit_features(kind, unit_addresses(shape)[kind], shape, 2.0)
        assert found.shape[1] == FEATURES and len(torch.unique(found, dim=0)) == len(found)
    vocab = unit_features("vocab", unit_addresses(shape)["vocab"], shape, None)
    assert len(torch.unique(vocab, dim=0)) == 1  # the partner distinguishes tokens


def test_view_shapes_stay_near_the_donors_shape() -> None:
    shape = metadata(width=32, layers=4, heads=4, kv_heads=2, ffn=40)
    views = [view_shape(shape, 0, f"view {i}") for i in range(60)]
    assert len({str(view) for view in views}) > 10 and shape in views
    for view in views:
        assert 16 <= view.width <= 64 and 2 <= view.layers <= 4 and 20 <= view.ffn <= 80
        assert 1 <= view.kv_heads <= 4 and view.heads == 2 * view.kv_heads


def test_contexts_and_mean_tokens_come_from_weights_alone() -> None:
    tables = [
        {t: torch.randn(5, generator=torch.Generator().manual_seed(10 * i + ord(t))) for t in "abc"} for i in range(4)
    ]
    one = donor_contexts(tables, 6)
    assert one.shape == (4, 6) and torch.equal(one, donor_contexts(tables, 6))
    assert one.square().sum() > 0 and not one[:, 3:].abs().max() > 1e-5  # four points span three directions
    mean = mean_tokens(tables[:2], ("a", "z"), 5)
    assert torch.allclose(mean[0], (tables[0]["a"] + tables[1]["a"]) / 2) and not mean[1].any()


def test_training_resumes_to_the_same_bytes(zoo: Zoo, autoencoder: Path, tmp_path: Path) -> None:
    config = replace(SMALL, steps=24)
    command = {"subcommand": "train diffusion", "steps": 24}

    def train(name: str, config: DiffusionTrainConfig = config, resume: bool = False) -> Path:
        return training.train_diffusion(
            config, zoo.path, autoencoder, tmp_path / name,
            resume=resume, device="cpu", quiet=True, command=command,
        )  # fmt: skip

    whole = train("whole")
    assert json.loads((whole / "headstart.json").read_text())["config"] == command
    real = training.batches

    def cut(*arguments: Any) -> Iterator[Any]:
        for i, item in enumerate(real(*arguments)):
            if i == 11:
                os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step
            yield item

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "batches", cut)
        train("cut")
    with pytest.raises(UserError, match="--resume"):
        train("cut")
    resumed = train("cut", resume=True)
    for part in ("denoiser", "memory", "autoencoder"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert filecmp.cmp(whole / name, resumed / name, shallow=False), part
    assert json.loads((whole / "headstart.json").read_text()) == json.loads((resumed / "headstart.json").read_text())
    assert not (resumed / STATE_FILE).exists()
    assert train("whole", resume=True) == whole
    with pytest.raises(UserError, match="other settings"):
        train("whole", replace(config, seed=1), resume=True)


@pytest.mark.parametrize("tied", [False, True])
def test_generate_writes_what_transformers_loads(trained: Path, tmp_path: Path, tied: bool) -> None:
    target = tmp_path / "target"
    config(28, 2, layers=3, tie_word_embeddings=tied).save_pretrained(target)
    out = generate(target, "diffusion", tmp_path / "out", model=str(trained), settings=["steps=4"], quiet=True)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.isfinite(model(torch.arange(10)[None]).logits).all()


def test_wrong_use_is_refused(trained: Path, autoencoder: Path, tmp_path: Path) -> None:
    other = Blueprint.from_config({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4})
    with pytest.raises(UserError, match="LayerNorm"):
        DiffusionSampler(model=str(trained)).fit(None, other)
    more = Blueprint.from_pretrained_config(type(config()).from_dict({**config().to_dict(), "vocab_size": 50}))
    with pytest.raises(UserError, match="vocabulary has 50 tokens, the zoo's has 48"):
        DiffusionSampler(model=str(trained)).fit(None, more)
    with pytest.raises(UserError, match="holds no pipeline"):
        DiffusionSampler(model=str(autoencoder)).fit(None, Blueprint.from_pretrained_config(config()))
    with pytest.raises(UserError, match="did you mean"):
        DiffusionSampler(model=str(trained), condition="shuffle")
    config().save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="not UnitAutoencoder"):
        load_autoencoder(tmp_path / "llama")
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    weights = broken / "denoiser" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"states a header of .* the file is damaged"):
        DiffusionSampler(model=str(broken)).fit(None, Blueprint.from_pretrained_config(config()))
    lacking = tmp_path / "lacking"
    shutil.copytree(trained, lacking)
    weights = lacking / "memory" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["vocabulary"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match="lacks the tensor vocabulary, so it is damaged or from another version"):
        DiffusionSampler(model=str(lacking)).fit(None, Blueprint.from_pretrained_config(config()))


def test_roles_of_the_tiny_zoo() -> None:
    assert {role(spec.name) for spec in Blueprint.from_pretrained_config(config()).specs} == set(STD) | {"norm"}


def test_tokens_have_the_zoos_strings_whatever_marks_their_words() -> None:
    target = Tokens.of_strings({"Ġthe": 1, "re": 0, "Ġnew": 3})
    assert zoo_strings(target, {"▁the": 0, "re": 1, "▁": 2}, 5) == ("re", "▁the", "<row 2>", "Ġnew", "<row 4>")
