"""Writes a model in GGUF files as a checkpoint in Hugging Face layout: bfloat16 safetensors, config and tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from zoo.checkpoints.atomic import remove_temporaries, replace_file
from zoo.checkpoints.headers import INDEX
from zoo.checkpoints.writer import Shard, plan_shards, shard_index, write_shard
from zoo.errors import NotFinite
from zoo.gguf.model import GgufModel
from zoo.limits import MAX_MESSAGE
from zoo.words import one_line

DTYPE = torch.bfloat16


def converted_size(model: GgufModel) -> int:
    """The bytes of the weights that `convert` writes."""
    return sum(shard.size for shard in _shards(model))


def convert(model: GgufModel, folder: Path, tick: Callable[[int], object] = lambda n: None) -> list[str]:
    """Fills an existing folder with the checkpoint of a model, one tensor in memory at a time.

    Files that an interrupted conversion of the same model completed are kept. tick: called with the bytes of each
    tensor when it is written. Returns what is left out, one line each. UserError where a value is NaN or infinite, a
    file is too short, or the tokenizer cannot be rebuilt.
    """
    remove_temporaries(folder)
    files, notes = model.side_files()  # before the weights: it may refuse the file
    shards = _shards(model)
    specs = {spec.name: spec for spec in model.blueprint.specs}
    for shard in shards:
        if (folder / shard.file).exists() and (folder / shard.file).stat().st_size == shard.size:
            tick(shard.size)
            continue

        def read(name: str) -> torch.Tensor:
            tick(DTYPE.itemsize * math.prod(specs[name].shape))
            return model.read(name)

        try:
            write_shard(folder / shard.file, shard, specs, read, DTYPE)
        except NotFinite as error:
            raise NotFinite(f"{model.where}: {error}") from error
    if len(shards) > 1:
        files[INDEX] = (json.dumps(shard_index(shards), indent=2) + "\n").encode()
    for name, data in files.items():
        replace_file(folder / name, data)
    return [one_line(note, MAX_MESSAGE) for note in (*model.notes, *notes)]  # they quote texts of the file


def _shards(model: GgufModel) -> list[Shard]:
    return plan_shards(model.blueprint.specs, DTYPE)
