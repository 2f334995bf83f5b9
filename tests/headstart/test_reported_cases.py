"""Faults that were reported from the field, each as its user met it: a saved model, a zoo, a command, what came out.

Older configs, shards and dtypes: generate/test_unusual_checkpoints.py. Chat templates, slow tokenizers and the
generation config: generate/test_side_files.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    Gemma4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MixtralConfig,
    OlmoConfig,
    Qwen2Config,
    XGLMConfig,
)

from tests.support.commands import analyze, generate, lora
from zoo.add import add
from zoo.errors import UserError

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
WIDER = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
XGLM = {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "vocab_size": 96}
GEMMA4 = {
    "head_dim": 8, "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8,
}  # fmt: skip
EXACT = ["noise=0"]


def random_model(config: Any, build: Any = AutoModelForCausalLM.from_config) -> Any:
    """A model in which every parameter is random: no gain is one, no bias is zero."""
    torch.manual_seed(0)
    model: nn.Module = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def target_of(donor: Path, file: Path, **changes: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(json.loads((donor / "config.json").read_text()) | changes))
    return file


def zoo_of(donor: Path, folder: Path) -> Path:
    add([str(donor)], folder, quiet=True)
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 27).view(2, 12)).logits.double()


def load(folder: Path) -> Any:
    """The model of a folder that has every tensor, and none besides."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def assert_same(first: Any, second: Any) -> None:
    before, after = logits(first), logits(second)
    assert (after - before).abs().max() < 1e-4 * before.std()


@pytest.mark.parametrize(
    ("method", "changes", "settings"),
    [
        ("hypercloning", {}, EXACT), ("net2wider", {"ffn_dim": 96}, []), ("weight-selection", {}, []),
        ("pruning", {}, []), ("stacking", {"num_layers": 4}, ["exact=true"]),
    ],
)  # fmt: skip
def test_norms_swapped(tmp_path: Path, method: str, changes: dict[str, int], settings: list[str]) -> None:
    model = random_model(XGLMConfig(**XGLM, max_position_embeddings=66))
    donor = save(model, tmp_path / "donor")
    zoo = zoo_of(donor, tmp_path / "zoo")
    target = target_of(donor, tmp_path / "target" / "config.json", **changes)
    assert_same(model, load(generate(target, method, tmp_path / "out", zoo=zoo, settings=settings)))


def test_sine_waves_over_the_width_cannot_grow(tmp_path: Path) -> None:
    donor = save(random_model(XGLMConfig(**XGLM, max_position_embeddings=66)), tmp_path / "donor")
    target = target_of(donor, tmp_path / "target" / "config.json", d_model=64, ffn_dim=96, attention_heads=8)
    with pytest.raises(UserError, match="its positions are sine waves over the width"):
        generate(target, "hypercloning", tmp_path / "out", donor=str(donor), settings=EXACT)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_but_head_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture, tied: bool) -> None:
    donor = save(random_model(LlamaConfig(**SIZES)), tmp_path / "donor")
    change_config(donor, tie_word_embeddings=True)
    reference = AutoModelForCausalLM.from_pretrained(donor)
    assert not torch.equal(reference.lm_head.weight, reference.model.embed_tokens.weight)
    zoo = zoo_of(donor, tmp_path / "zoo")
    target = target_of(donor, tmp_path / "target" / "config.json", **WIDER, tie_word_embeddings=tied)
    with caplog.at_level("INFO"):
        written = load(generate(target, "hypercloning", tmp_path / "out", zoo=zoo, settings=EXACT))
    if tied:  # one matrix cannot hold both
        assert torch.equal(written.lm_head.weight, written.model.embed_tokens.weight)
        assert "ties its head to the embedding and the donor does not" in caplog.text
    else:
        assert_same(reference, written)


def test_pissa_of_a_tied_config_with_another_head(tmp_path: Path) -> None:
    from peft import PeftModel

    donor = save(random_model(LlamaConfig(**SIZES)), tmp_path / "donor")
    change_config(donor, tie_word_embeddings=True)
    out = lora(donor, "pissa", 4, tmp_path / "out")
    adapted = PeftModel.from_pretrained(load(out / "base"), out)
    assert_same(AutoModelForCausalLM.from_pretrained(donor), adapted)


@pytest.mark.parametrize("method", ["hypercloning", "weight-selection", "stacking"])
def test_base_model_donor(tmp_path: Path, method: str) -> None:
    donor = save(random_model(LlamaConfig(**SIZES)).model, tmp_path / "donor")
    target = target_of(donor, tmp_path / "target" / "config.json", architectures=["LlamaForCausalLM"])
    out = generate(target, method, tmp_path / "out", zoo=zoo_of(donor, tmp_path / "zoo"))
    written = load_file(out / "model.safetensors")
    assert not torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert written["lm_head.weight"].std() < 0.1  # the default's draw, not the donor's embedding
    assert json.loads((out / "headstart.json").read_text())["tensors"]["defaulted"] == 1


def test_untied_head_missing(tmp_path: Path) -> None:
    donor = save(random_model(Qwen2Config(**SIZES)), tmp_path / "donor")
    tensors = load_file(donor / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, donor / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        add([str(donor)], tmp_path / "zoo", quiet=True)


def test_fp8_advice(tmp_path: Path) -> None:
    model = random_model(LlamaConfig(**SIZES))
    donor = save(model, tmp_path / "donor")
    coded: dict[str, Tensor] = {}
    for name, value in load_file(donor / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scale = value.abs().max() / 448
            coded[name] = (value / scale).to(torch.float8_e4m3fn)
            coded[name + "_scale_inv"] = scale.reshape(1, 1)
            model.get_parameter(name).data = coded[name].float() * scale
        else:
            coded[name] = value
    save_file(coded, donor / "model.safetensors", metadata={"format": "pt"})
    for quantization in ({"quant_method": "fp8", "weight_block_size": [128, 128]}, None):
        change_config(donor, quantization_config=quantization)  # None: what the refusal once advised
        target = target_of(donor, tmp_path / "target" / "config.json", **WIDER, quantization_config=None)
        out = generate(target, "hypercloning", tmp_path / f"{quantization is None}", donor=str(donor), settings=EXACT)
        assert_same(model, load(out))


@pytest.mark.parametrize("method", ["weight-selection", "row-column", "subcloning", "pruning"])
def test_zero_dim(tmp_path: Path, method: str) -> None:
    model = random_model(ApertusConfig(**SIZES))
    donor = save(model, tmp_path / "donor")
    assert any(t.ndim == 0 for t in load_file(donor / "model.safetensors").values())
    written = load(generate(donor, method, tmp_path / "out", zoo=zoo_of(donor, tmp_path / "zoo")))
    if method != "row-column":
        assert_same(model, written)


@pytest.mark.parametrize("spelling", ["transformers", "bare"])
def test_infinity(tmp_path: Path, spelling: str) -> None:
    config = Mamba2Config(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8,
                          n_groups=1)  # fmt: skip
    donor = save(random_model(config), tmp_path / "donor")
    text = (donor / "config.json").read_text()
    assert "Infinity" in text
    if spelling == "bare":
        content = json.loads(text) | {"time_step_limit": [0.0, float("inf")]}
        (donor / "config.json").write_text(json.dumps(content))
    written = load(generate(donor, "default", tmp_path / "out"))
    assert written.config.time_step_limit[1] == float("inf")
    zoo_of(donor, tmp_path / "zoo")


def test_olmo1(tmp_path: Path) -> None:
    model = random_model(OlmoConfig(**SIZES))
    donor = save(model, tmp_path / "donor")
    target = target_of(donor, tmp_path / "target" / "config.json", **WIDER)
    assert_same(model, load(generate(target, "hypercloning", tmp_path / "out", donor=str(donor), settings=EXACT)))


@pytest.mark.parametrize(
    ("method", "changes", "settings"),
    [
        ("weight-selection", {}, []), ("stacking", {"num_hidden_layers": 4}, ["exact=true"]),
        ("hypercloning", WIDER, EXACT),
    ],
)  # fmt: skip
def test_moe(tmp_path: Path, method: str, changes: dict[str, int], settings: list[str]) -> None:
    model = random_model(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    donor = save(model, tmp_path / "donor")
    target = target_of(donor, tmp_path / "target" / "config.json", **changes)
    assert_same(model, load(generate(target, method, tmp_path / "out", donor=str(donor), settings=settings)))


def test_gemma4(tmp_path: Path) -> None:
    model = random_model(Gemma4TextConfig(**SIZES | GEMMA4))
    donor = save(model, tmp_path / "donor")
    load(generate(donor, "default", tmp_path / "out"))
    zoo = zoo_of(donor, tmp_path / "zoo")
    assert_same(model, load(generate(donor, "weight-selection", tmp_path / "same", zoo=zoo)))
    analyze(tmp_path / "analysis", donor=str(donor), bootstraps=5)
    lora(donor, "pissa", 2, tmp_path / "adapter")


def test_bart(tmp_path: Path) -> None:
    config = BartConfig(
        vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=66,
    )  # fmt: skip
    model = random_model(config, BartForConditionalGeneration)
    model.final_logits_bias.normal_()
    donor = save(model, tmp_path / "donor")
    generate(donor, "default", tmp_path / "default")
    out = generate(donor, "weight-selection", tmp_path / "out", zoo=zoo_of(donor, tmp_path / "zoo"))
    written, info = AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(written.final_logits_bias, model.final_logits_bias)
    assert_same(model, written)
