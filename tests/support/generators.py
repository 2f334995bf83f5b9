"""A tiny autoencoder and a tiny pipeline: donors of bytes, one given text, a few steps of training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from autoencoder.config import AutoencoderTrainConfig
from diffusion.config import DiffusionTrainConfig
from tests.support.tiny import donor
from zoo.add import add
from zoo.donors.zoo import Zoo
from zoo.vocabulary import BYTE_VOCAB, save_byte_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog, and says that nothing is new. " * 80
SHAPES: tuple[dict[str, int], ...] = (
    dict(hidden_size=32, kv=2, vocab_size=BYTE_VOCAB),
    dict(hidden_size=24, kv=4, layers=1, vocab_size=BYTE_VOCAB),
)
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


def train_both(zoo: Path, text: Path, out: Path) -> None:
    """Trains `out`/autoencoder and `out`/pipeline."""
    train_tiny_autoencoder(zoo, out / "autoencoder", text)
    train_tiny_diffusion(zoo, out / "autoencoder", out / "pipeline", text)
