"""A tiny zoo of random donors whose standard deviations are known, for tests of what learns from zoos."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zoo.add import add
from zoo.donors.zoo import Zoo

# Far apart, so that a generated tensor has the right scale for a reason.
STD = {"embed": 0.7, "head": 0.05, "q": 0.2, "k": 0.1, "v": 0.15, "o": 0.3, "gate": 0.12, "up": 0.25, "down": 0.4}
SHAPES = (dict(hidden_size=32, kv=2), dict(hidden_size=32, kv=4), dict(hidden_size=24, kv=2))


def config(hidden_size: int = 32, kv: int = 2, layers: int = 2, **more: object) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv,
        max_position_embeddings=64,
        **{"vocab_size": 48, "tie_word_embeddings": False, "head_dim": 8, **more},
    )


def role(name: str) -> str:
    """The key of STD that a tensor of a Llama belongs to, or `norm`."""
    words = {"norm": "norm", "embed": "embed", "lm_head": "head", "gate": "gate", "up_proj": "up", "down": "down"}
    words |= {f".{r}_proj": r for r in "qkvo"}
    return next(r for word, r in words.items() if word in name)


def donor(folder: Path, seed: int, **shape: int) -> Path:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config(**shape))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(0, STD[role(name)])
    model.save_pretrained(folder)
    (folder / "facts.json").write_text(json.dumps({"loss": 2.0 + seed / 10, "tokens": 1000}))
    return folder


def make_zoo(path: Path, shapes: Sequence[dict[str, int]] = SHAPES) -> Zoo:
    sources = [donor(path / "sources" / f"d{i}", i, **shape) for i, shape in enumerate(shapes)]
    add([str(s) for s in sources], path / "zoo", quiet=True)
    return Zoo.open(path / "zoo")
