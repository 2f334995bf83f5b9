"""The pipeline as people call it: a config and a text to weights, and the method `diffusion`."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

from autoencoder.field import Latents
from autoencoder.loading import load_autoencoder
from diffusion import WeightDiffusionPipeline, training
from diffusion.pipeline import load_pipeline
from diffusion.sampler import DiffusionSampler
from tests.support.commands import generate
from tests.support.generators import (
    DIFFUSION,
    TEXT,
    byte_zoo,
    shaken_pipeline,
    train_both,
    train_tiny_diffusion,
)
from tests.support.hub_server import use_hub
from tests.support.hub_uploads import serve_uploads
from tests.support.tiny import config
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.training.resumable import STATE_FILE
from zoo.training.text_features import SIZE as TEXT_SIZE

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return byte_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def trained(zoo: Zoo) -> Path:
    folder = zoo.path.parent
    train_both(zoo.path, folder / "text.txt", folder)
    return folder / "pipeline"


@pytest.fixture(scope="module")
def pipe(trained: Path) -> WeightDiffusionPipeline:
    """A shaken pipeline that reacts to texts."""
    loaded = shaken_pipeline(trained)
    loaded.denoiser.get_buffer("inverse")[-2 * TEXT_SIZE : -TEXT_SIZE] = 1.0  # as in a zoo of several texts
    return loaded


def target(**changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"hidden_size": 28, "kv": 2, "layers": 3, "vocab_size": 256} | changes
    return config(**options).to_dict() | {"architectures": ["LlamaForCausalLM"]}


def generated(pipe: WeightDiffusionPipeline, seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    given = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(seed)} | options
    return pipe(given.pop("config", target()), **given).state_dict()


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    name = "model.layers.1.mlp.down_proj.weight"
    return float((one[name] - other[name]).norm() / one[name].norm())


def test_the_seed_decides(pipe: WeightDiffusionPipeline) -> None:
    first, again, other = generated(pipe), generated(pipe), generated(pipe, seed=1)
    assert first.keys() == other.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert distance(first, other) > 1e-3
    torch.manual_seed(3)
    free, drawn = generated(pipe, generator=None), generated(pipe, generator=None)
    assert distance(free, drawn) > 1e-3  # torch's own generator, which goes on
    torch.manual_seed(3)
    assert distance(free, generated(pipe, generator=None)) == 0


@pytest.mark.parametrize("tied", [False, True])
def test_the_output_loads_into_transformers(pipe: WeightDiffusionPipeline, tmp_path: Path, tied: bool) -> None:
    settings = target(tie_word_embeddings=tied, layers=5, hidden_size=48, kv=4)
    output = pipe(settings, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    weights = output.state_dict()
    model = AutoModelForCausalLM.from_config(config(48, 4, layers=5, vocab_size=256, tie_word_embeddings=tied))
    head = {"lm_head.weight": weights["model.embed_tokens.weight"]} if tied else {}
    model.load_state_dict(weights | head, strict=True)
    output.save_pretrained(tmp_path / "model")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(tokens).logits, model.eval()(tokens).logits, atol=1e-5, rtol=1e-5)


def test_a_config_may_be_a_folder_a_file_or_a_blueprint(pipe: WeightDiffusionPipeline, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(target()))
    expected = generated(pipe)
    for given in (tmp_path, tmp_path / "config.json", str(tmp_path), Blueprint.from_config(target())):
        found = generated(pipe, config=given)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layers_do_not_depend_on_the_order(pipe: WeightDiffusionPipeline) -> None:
    one, other = (pipe(target(), num_inference_steps=2, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    forward = [layer.down.clone() for layer in one.decoder.layers]
    backward = [other.decoder.layers[i].down.clone() for i in (2, 1, 0)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))


def test_a_zoo_of_one_text_does_not_react_to_another(trained: Path, pipe: WeightDiffusionPipeline) -> None:
    loaded = load_pipeline(str(trained))
    loaded.denoiser.load_state_dict(dict(pipe.denoiser.named_parameters()), strict=False)
    plain = generated(loaded)
    assert distance(plain, generated(loaded, text="0123456789" * 300)) == 0
    assert distance(plain, generated(loaded, excess=0.1)) > 1e-5


def test_quality_and_text_are_conditions(pipe: WeightDiffusionPipeline) -> None:
    plain = generated(pipe)
    assert distance(plain, generated(pipe, excess=0.1)) > 1e-5  # the two donors have two losses
    same = generated(pipe, text=None)
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    wanted = pipe.wanted(Blueprint.from_config(target()).metadata, None, TEXT, 0.0)  # type: ignore[arg-type]
    assert wanted.text is not None and torch.equal(
        wanted.text,
        pipe.wanted(wanted.shape, None, TEXT.encode(), 0.0).text,  # type: ignore[arg-type]
    )
    assert distance(generated(pipe, text=TEXT), generated(pipe, text="0123456789" * 300)) > 1e-5


def test_guidance_changes_the_latents(pipe: WeightDiffusionPipeline) -> None:
    plain = generated(pipe)
    assert distance(plain, generated(pipe, guidance_scale=1.0)) == 0
    assert distance(plain, generated(pipe, guidance_scale=4.0)) > 1e-4


def test_a_callback_sees_each_step_and_may_replace_the_latents(pipe: WeightDiffusionPipeline) -> None:
    seen: list[tuple[int, float]] = []

    def watch(step: int, time: float, latents: Latents) -> None:
        assert latents.blocks.shape == (3, 16) and latents.model.shape == (16,)
        seen.append((step, time))

    plain, watched = generated(pipe), generated(pipe, callback_on_step_end=watch)
    assert [step for step, _ in seen] == [0, 1, 2, 3] and seen[0][1] > seen[-1][1]
    assert distance(plain, watched) == 0

    def fixed(step: int, time: float, latents: Latents) -> Latents:
        return Latents(torch.zeros(16), torch.zeros(3, 16))

    one, other = (generated(pipe, seed, callback_on_step_end=fixed) for seed in (0, 1))
    assert distance(one, other) == 0 and distance(one, plain) > 1e-4


def words(folder: Path) -> Path:
    """A tokenizer of three known bytes and a token that the zoo does not know, in another order than the zoo's."""
    folder.mkdir()
    vocabulary = {"c": 0, "a": 1, "abc": 2, "b": 3}
    Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(folder / "tokenizer.json"))
    return folder


def test_tokens_are_matched_by_their_strings(
    pipe: WeightDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = words(tmp_path / "tokenizer")
    rows = {token: i for i, token in enumerate(pipe.autoencoder.token_strings)}
    latents = Latents(torch.ones(16), torch.ones(3, 16))
    given: dict[str, Any] = {"callback_on_step_end": lambda *a: latents, "config": target(vocab_size=4)}
    found = generated(pipe, tokenizer=tokenizer, **given)["model.embed_tokens.weight"]
    own = generated(pipe, callback_on_step_end=lambda *a: latents)["model.embed_tokens.weight"]
    torch.testing.assert_close(found[[1, 3, 0]], own[[rows["a"], rows["b"], rows["c"]]])
    monkeypatch.setattr(pipe, "vocabulary_rule", "mean")
    composed = generated(pipe, tokenizer=tokenizer, **given)["model.embed_tokens.weight"]
    torch.testing.assert_close(composed[2], own[[rows["a"], rows["b"], rows["c"]]].mean(0), atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(pipe, "vocabulary_rule", "strings")
    unknown = generated(pipe, tokenizer=tokenizer, **given)["model.embed_tokens.weight"]
    torch.testing.assert_close(unknown[2], own.mean(0), atol=1e-5, rtol=1e-4)


def test_saved_and_loaded_it_generates_the_same_bytes(pipe: WeightDiffusionPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "again")
    expected = generated(pipe)
    for loaded in (load_pipeline(str(tmp_path / "again")), WeightDiffusionPipeline.from_pretrained(tmp_path / "again")):
        found = generated(loaded)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not [p for p in (tmp_path / "again").rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".py")]


def test_it_is_pushed_to_a_hub_with_its_card(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_uploads() as (address, files):
        use_hub(monkeypatch, address, tmp_path)
        monkeypatch.setenv("HF_TOKEN", "hf_none")
        load_pipeline(str(trained)).push_to_hub("me/weights")
    card = files["README.md"].decode()
    assert "library_name: diffusers" in card and "| d0 |" in card and "| d1 |" in card
    for part in ("autoencoder", "denoiser"):
        assert files[f"{part}/{WEIGHTS}"] == (trained / part / WEIGHTS).read_bytes()
    assert json.loads(files["model_index.json"])["_class_name"] == "WeightDiffusionPipeline"


def test_the_record_names_the_donors_and_the_command(zoo: Zoo, trained: Path, pipe: WeightDiffusionPipeline) -> None:
    record = json.loads((trained / "headstart.json").read_text())
    assert [d["name"] for d in record["donors"]] == ["d0", "d1"] == [d["name"] for d in pipe.donors]
    assert record["recipe"]["tuning"] == DIFFUSION.tuning and record["loss"] > 0
    assert (
        DiffusionSampler(model=str(trained)).fit(None, Blueprint.from_config(target())).provenance(None) == pipe.donors
    )


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    real = training._DiffusionTrainer.train_step

    def stopping(self: Any, at: int) -> None:
        if at == step:
            signal.raise_signal(signal.SIGINT)
        real(self, at)

    with patch.object(training._DiffusionTrainer, "train_step", stopping), pytest.raises(KeyboardInterrupt):
        yield


def test_an_interrupted_training_ends_with_the_same_bytes(zoo: Zoo, trained: Path, tmp_path: Path) -> None:
    coder, text, out = trained.parent / "autoencoder", trained.parent / "text.txt", tmp_path / "cut"
    for step in (1, 3):  # of flow matching, of the tuning
        with interrupted_at(step):
            train_tiny_diffusion(zoo.path, coder, out, text, resume=step > 1)
        assert (out / STATE_FILE).exists()
    with pytest.raises(UserError, match="--resume"):
        train_tiny_diffusion(zoo.path, coder, out, text)
    with pytest.raises(UserError, match="other settings"):
        train_tiny_diffusion(zoo.path, coder, out, text, replace(DIFFUSION, seed=1), resume=True)
    train_tiny_diffusion(zoo.path, coder, out, text, resume=True)
    for part in ("denoiser", "autoencoder"):
        assert (out / part / WEIGHTS).read_bytes() == (trained / part / WEIGHTS).read_bytes()
    assert not (out / STATE_FILE).exists()


def test_flow_matching_learns_which_latents_belong_to_which_condition(zoo: Zoo, trained: Path, tmp_path: Path) -> None:
    """Two donors of two shapes: with a donor's metadata its latents come out, not the other's."""
    settings = replace(DIFFUSION, steps=240, tuning=0, batch=32, mixing=0.0, drop=0.0, lr=3e-3)
    coder = trained.parent / "autoencoder"
    text = trained.parent / "text.txt"
    loaded = load_pipeline(str(train_tiny_diffusion(zoo.path, coder, tmp_path / "out", text, settings)))
    from autoencoder.donors import read_training_donors

    donors = read_training_donors(zoo, quiet=True)[0]
    with torch.no_grad():
        own = [loaded.autoencoder.encode(d.blocks, d.tokens).model for d in donors]
    assert (own[0] - own[1]).norm() > 0.5
    hits = 0
    for i, donor in enumerate(donors):
        wanted = replace(loaded.wanted(donor.shape, None, TEXT, 0.1 * i))
        for seed in range(4):
            found = loaded.sample_latents(wanted, torch.Generator().manual_seed(seed), steps=8).model
            hits += int((found - own[i]).norm() < (found - own[1 - i]).norm())
    assert hits >= 7


@pytest.mark.parametrize("tied", [False, True])
def test_the_method_writes_what_transformers_loads(trained: Path, tmp_path: Path, tied: bool) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text(json.dumps(target(tie_word_embeddings=tied)))
    (tmp_path / "text.txt").write_text(TEXT)
    settings = ["steps=2", f"text={tmp_path / 'text.txt'}"]
    out = generate(
        tmp_path / "target", "diffusion", tmp_path / "out", model=str(trained), settings=settings, quiet=True
    )
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.isfinite(model(torch.arange(10)[None]).logits).all()
    record = json.loads((tmp_path / "out" / "headstart.json").read_text())
    assert {d["name"] for d in record["donors"]} == {"d0", "d1"}


def test_the_method_is_the_pipeline(trained: Path, tmp_path: Path) -> None:
    from zoo.streams import stream

    blueprint = Blueprint.from_config(target())
    (tmp_path / "text.txt").write_text(TEXT)
    sampler = DiffusionSampler(model=str(trained), text=str(tmp_path / "text.txt"), steps=3, guidance=2.0, excess=0.05)
    found = dict(sampler.fit(None, blueprint).sample(blueprint, 5))
    expected = load_pipeline(str(trained))(
        blueprint, text=TEXT, excess=0.05, num_inference_steps=3, guidance_scale=2.0, generator=stream(5, "latents")
    ).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    sampler.save(tmp_path / "fitted")
    again = dict(DiffusionSampler.load(tmp_path / "fitted").sample(blueprint, 5))
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_a_text_is_an_option_of_generate(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text(json.dumps(target()))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    options: dict[str, Any] = {"target": tmp_path / "target", "method": "diffusion", "model": str(trained)}
    shared = options | {"settings": ["steps=2"], "quiet": True}
    for name, given in (("by option", {"text": tmp_path / "text.txt"}), ("by rows", {"text": tmp_path / "rows.jsonl"})):
        generate(out=tmp_path / name, **shared, **given)
    settings = ["steps=2", f"text={tmp_path / 'text.txt'}"]
    generate(out=tmp_path / "by setting", **shared | {"settings": settings})
    found = {(tmp_path / f"by {name}" / "model.safetensors").read_bytes() for name in ("option", "rows", "setting")}
    assert len(found) == 1
    record = json.loads((tmp_path / "by option" / "headstart.json").read_text())
    assert record["options"]["text"] == record["config"]["text"] == str(tmp_path / "text.txt")
    with pytest.raises(UserError, match=r"nowhere\.txt: no such corpus"):
        generate(out=tmp_path / "out", **shared, text=tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="default takes no --text: leave it out"):
        generate(tmp_path / "target", "default", tmp_path / "out", text=tmp_path / "text.txt")
    assert not (tmp_path / "out").exists()


def test_wrong_use_is_refused(trained: Path, pipe: WeightDiffusionPipeline, tmp_path: Path) -> None:
    good = Blueprint.from_config(target())
    other = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 256}
    for use in (pipe, lambda c: DiffusionSampler(model=str(trained)).fit(None, Blueprint.from_config(c))):
        with pytest.raises(UserError, match="the target has an MLP without gates and learned positions, which no"):
            use(other)
        with pytest.raises(
            UserError, match=r"vocabulary has 50 tokens, the zoo's has 256; give the target's --tokenizer"
        ):
            use(target(vocab_size=50))
    with pytest.raises(UserError, match="needs a trained pipeline"):
        DiffusionSampler().fit(None, good)
    with pytest.raises(UserError, match="holds no pipeline; train one with `headstart train diffusion`"):
        DiffusionSampler(model=str(trained.parent / "autoencoder")).fit(None, good)
    with pytest.raises(UserError, match="no such folder"):
        DiffusionSampler(model=str(tmp_path / "nowhere")).fit(None, good)
    with pytest.raises(UserError, match="excess"):
        DiffusionSampler(model=str(trained), excess=-1.0)
    config().save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="not WeightAutoencoder"):
        load_autoencoder(tmp_path / "llama")


def broken(trained: Path, folder: Path, part: str, change: Any) -> Path:
    """A copy of the pipeline whose tensors in one part are changed by a function."""
    shutil.copytree(trained, folder)
    path = folder / part / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


def test_damaged_pipelines_are_one_line(trained: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(trained, cut)
    weights = cut / "denoiser" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"states a header of .* the file is damaged"):
        load_pipeline(str(cut))
    lacking = broken(trained, tmp_path / "lacking", "denoiser", lambda t: t.pop("unconditional"))
    with pytest.raises(UserError, match="lacks the tensor unconditional, so it is damaged or from another version"):
        load_pipeline(str(lacking))
    odd = broken(trained, tmp_path / "odd", "autoencoder", lambda t: t["field.maps.neuron"].fill_(torch.nan))
    with pytest.raises(UserError, match=r"'field\.maps\.neuron' holds NaN or infinity"):
        load_pipeline(str(odd))
    wrong = broken(trained, tmp_path / "wrong", "denoiser", lambda t: t.update(mean=torch.zeros(3)))
    with pytest.raises(UserError, match=r"'mean' has shape \[3\], its config gives"):
        load_pipeline(str(wrong))
