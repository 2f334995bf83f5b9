"""Small Llamas of one recipe and two widths: models that differ in width, or in the seed, and in nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.vocabulary.pairs import STORIES, split_text
from zoo.training.loop import TrainingConfig, train_steps
from zoo.vocabulary import encode_text

TWIN = "twin"  # the beginning of their names
TOKENIZER = "stories260K"  # of 512 tokens
LAYERS = 5
SHAPES = {  # width -> sizes that grow with it; heads are of 16 components
    64: {"intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 4},
    128: {"intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 8},
}
TWIN_SEEDS = (0, 1)
STEPS, LR, BATCH_SIZE, SEQUENCE = 1000, 3e-3, 16, 64
TEXT_BYTES = 1 << 20


def twin_folder(work: Path, width: int, seed: int) -> Path:
    return work / f"{TWIN}-{seed} ({width})"


def train_twins(data: Path, work: Path) -> None:
    """Trains all twins that are not there, each for a minute of one core."""
    from transformers import LlamaConfig, LlamaForCausalLM

    text = split_text(data / "corpora" / STORIES)[0][:TEXT_BYTES].decode(errors="ignore")
    tokens = encode_text(text, data / "models" / TOKENIZER)
    for width, sizes in SHAPES.items():
        for seed in TWIN_SEEDS:
            folder = twin_folder(work, width, seed)
            if (folder / "model.safetensors").is_file():
                continue
            torch.manual_seed(seed)
            sizes_and_rest: dict[str, Any] = {**sizes, "vocab_size": 512, "hidden_size": width}
            config = LlamaConfig(num_hidden_layers=LAYERS, max_position_embeddings=SEQUENCE, **sizes_and_rest)
            model = LlamaForCausalLM(config)
            for _ in train_steps(model, tokens, TrainingConfig(STEPS, LR, BATCH_SIZE, SEQUENCE, seed=seed)):
                pass
            model.save_pretrained(folder)
