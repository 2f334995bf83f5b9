"""A tiny autoencoder and a tiny pipeline: donors of bytes, one given text, a few steps of training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from autoencoder.config import AutoencoderTrainConfig
from diffusion.config import DiffusionTrainConfig
from diffusion.pipeline import WeightDiffusionPipeline, load_pipeline
from tests.support.tiny import donor
from zoo.add import add
from zoo.donors.zoo import Zoo
from zoo.vocabulary import BYTE_VOCAB, save_byte_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog, and says that nothing is new. " * 80
SHAPES: tuple[dict[str, int], ...] = (
    dict(hidden_size=32, kv=2, vocab_size=BYTE_VOCAB),
    dict(hidden_size=24, kv=4, layers=1, vocab_size=BYTE_VOCAB),
)
SIZES: dict[str, Any] = {
    "vocab_size": BYTE_VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GQA = {**SIZES, "num_key_value_heads": 2}
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "vocab_size": BYTE_VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40,
    "n_inner": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**GQA, "model_type": "llama"},
    "qwen2": {**GQA, "model_type": "qwen2"},
    "qwen3": {**GQA, "model_type": "qwen3", "head_dim": 16},
    "gemma2": {**GQA, "model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3": {**GQA, "model_type": "gemma3_text", "head_dim": 8, "query_pre_attn_scalar": 8},
    "olmo2": {**GQA, "model_type": "olmo2"},
    "gpt2": GPT2,
    "gpt_neox": {**SIZES, "model_type": "gpt_neox", "rotary_pct": 0.5},
}
SMALLER = {
    **{"hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 40, "num_attention_heads": 2},
    **{"n_embd": 24, "n_layer": 3, "n_inner": 50, "n_head": 3, "n_positions": 24},
}
AUTOENCODER = AutoencoderTrainConfig(steps=3, warmup=2, reconstruction=3, shapes=3, batch=4, sequence=16)
DIFFUSION = DiffusionTrainConfig(
    steps=3, tuning=2, batch=4, tuning_windows=4, sequence=16, hidden=32, layers=1, shapes=3, sample_bytes=3000
)


def byte_zoo(folder: Path) -> Zoo:
    """Donors with the tokenizer of bytes, and beside them `text.txt`."""
    sources = [donor(folder / "sources" / f"d{i}", i, **shape) for i, shape in enumerate(SHAPES)]
    for source in sources:
        save_byte_tokenizer(source)
    add([str(source) for source in sources], folder / "zoo", quiet=True)
    (folder / "text.txt").write_text(TEXT)
    return Zoo.open(folder / "zoo")


def family_target(family: str, **changes: Any) -> dict[str, Any]:
    """A config of a family at a shape that no donor of `family_zoo` has."""
    config = FAMILIES[family]
    return {**config, **{key: value for key, value in SMALLER.items() if key in config}, **changes}


def family_zoo(folder: Path, *families: str) -> Zoo:
    """A random donor of bytes of each of some families, and beside them `text.txt`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sources = [folder / "sources" / family for family in families]
    for i, source in enumerate(sources):
        torch.manual_seed(i)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FAMILIES[source.name]))
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                if parameter.ndim == 1:
                    parameter.add_(0.2 * noise)
                else:
                    parameter.copy_(0.8 * noise / parameter.shape[-1] ** 0.5)
        model.save_pretrained(source)
        save_byte_tokenizer(source)
        (source / "facts.json").write_text(json.dumps({"loss": 2.0 + i / 10}))
    add([str(source) for source in sources], folder / "zoo", quiet=True)
    (folder / "text.txt").write_text(TEXT)
    return Zoo.open(folder / "zoo")


def train_tiny_autoencoder(
    zoo: str | Path, out: Path, text: Path | None = None, config: AutoencoderTrainConfig = AUTOENCODER, **options: Any
) -> Path:
    """A trained autoencoder. text: what all donors are trained on; None samples a few tokens from each."""
    from autoencoder import texts, training

    config = replace(config, corpora={} if text is None else {"all": str(text)})
    with patch.object(texts, "SAMPLED", (16, 80)):
        return training.train_autoencoder(config, zoo, out, **{"device": "cpu", "quiet": True, **options})


def train_tiny_diffusion(
    zoo: str | Path,
    autoencoder: Path,
    out: Path,
    text: Path | None = None,
    config: DiffusionTrainConfig = DIFFUSION,
    **options: Any,
) -> Path:
    """A trained pipeline. text: as for `train_tiny_autoencoder`."""
    from autoencoder import texts
    from diffusion import latent_data, training

    config = replace(config, corpora={} if text is None else {"all": str(text)})
    with patch.object(texts, "SAMPLED", (16, 80)), patch.object(latent_data, "POOL", 24):
        return training.train_diffusion(config, zoo, autoencoder, out, **{"device": "cpu", "quiet": True, **options})


def shaken_pipeline(folder: Path) -> WeightDiffusionPipeline:
    """A pipeline whose denoiser a few steps of training have hardly moved: shaken, so that its conditions show."""
    loaded = load_pipeline(str(folder))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.denoiser.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def train_both(zoo: Path, text: Path, out: Path) -> None:
    """Trains `out`/autoencoder and `out`/pipeline."""
    train_tiny_autoencoder(zoo, out / "autoencoder", text)
    train_tiny_diffusion(zoo, out / "autoencoder", out / "pipeline", text)
