"""A checkpoint of random weights in the shape of SmolLM2-1.7B, to measure memory and time on: 3.4 GB in bfloat16.

    python -m benchmarks.speed.large_checkpoint DIR [--tokenizer FOLDER]     a minute, and less than 1 GB of memory

DIR gets config.json, shards of 1 GB with their index, and the tokenizer's files of FOLDER, whose vocabulary must have
49,152 tokens, such as SmolLM2-135M's. The values are normal with a standard deviation of 0.02; gains are 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from zoo.checkpoints.side_files import TOKENIZER_FILES
from zoo.checkpoints.writer import write_checkpoint
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 130000.0,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "dtype": "bfloat16",
}


def write_large_checkpoint(folder: Path, tokenizer: Path | None = None, config: dict[str, object] = CONFIG) -> None:
    """Writes the checkpoint, one tensor in memory at a time. UserError where `folder` exists."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.json"
        path.write_text(json.dumps(config))
        blueprint = Blueprint.from_config(path)
    write_checkpoint(folder, blueprint, _random_tensors(blueprint), torch.bfloat16, "1GB")
    for name in TOKENIZER_FILES if tokenizer is not None else ():
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder / name)


def _random_tensors(blueprint: Blueprint) -> Iterator[tuple[str, Tensor]]:
    for spec in blueprint.specs:
        values = torch.ones(spec.shape)
        yield spec.name, values if spec.role == "norm" else values.normal_(0, 0.02, generator=stream(0, spec.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    write_large_checkpoint(given.folder, given.tokenizer)


if __name__ == "__main__":
    main()
