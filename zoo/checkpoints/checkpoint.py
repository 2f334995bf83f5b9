"""A checkpoint: a folder in Hugging Face layout, read one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from zoo.checkpoints.files import PICKLES, file_inside, read_json
from zoo.checkpoints.headers import INDEX, Entry, read_header, read_index
from zoo.errors import NotFinite, UserError, unknown

# What belongs to a checkpoint besides its weights. facts.json is what its trainer knows: {"loss", "tokens", "seed"}.
SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "facts.json",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """`entries` are the tensors on disk, by name, in the order of their files and offsets; no weight is read yet."""

    folder: Path
    config: dict[str, Any]
    entries: dict[str, Entry]
    files: tuple[str, ...]  # every file that belongs to it, sorted

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Reads config and headers. Raises UserError for a folder without config or safetensors, for pickles, and
        for anything in headers or index that is damaged or lies."""
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give one that holds config.json and safetensors")
        if not (folder / "config.json").exists():
            raise UserError(f"{folder}: has no config.json; {_suggest(folder)}")
        config = read_json(file_inside(folder, "config.json"))
        entries = _entries(folder)
        names = {e.file for e in entries.values()} | {n for n in SIDE_FILES if (folder / n).exists()}
        if (folder / INDEX).exists() and not (folder / "model.safetensors").exists():
            names.add(INDEX)
        if "tokenizer.json" not in names and (folder / "tokenizer.model").exists():
            names.add("tokenizer.model")
        for name in names:
            file_inside(folder, name)
        return cls(folder, config, entries, tuple(sorted(names)))

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    @property
    def parameters(self) -> int:
        return sum(math.prod(e.shape) for e in self.entries.values())

    @cached_property
    def facts(self) -> dict[str, Any]:
        """facts.json, or {}: what is known of the training (loss, tokens, seed)."""
        return read_json(self.folder / "facts.json") if "facts.json" in self.files else {}

    def entry(self, name: str) -> Entry:
        """Where the tensor with this name on disk lies. UserError for an unknown name."""
        if name not in self.entries:
            raise unknown(f"tensor of {self.folder.name}", name, self.entries)
        return self.entries[name]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on the CPU, of the shape and dtype on disk (or cast to `dtype`); only its bytes are read.
        Raises NotFinite where it holds NaN or infinity."""
        entry = self.entry(name)
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        try:
            with (self.folder / entry.file).open("rb") as f:
                f.seek(entry.offset)
                count = f.readinto(memoryview(raw.numpy()))
        except OSError as error:
            raise UserError(f"{self.folder / entry.file}: cannot be read ({error.strerror})") from error
        if count != entry.nbytes:
            raise UserError(f"{self.folder / entry.file}: ends inside tensor {name!r}; fetch the file again")
        tensor = raw.view(entry.dtype).reshape(entry.shape)
        if not finite(tensor):
            raise NotFinite(f"{self.folder}: tensor {name!r} holds NaN or infinity; use another checkpoint")
        return tensor if dtype is None else tensor.to(dtype)

    def vocabulary(self) -> dict[str, int] | None:
        """token string -> id from tokenizer.json (added tokens included), or None where there is no such file."""
        if "tokenizer.json" not in self.files:
            return None
        tokenizer = read_json(self.folder / "tokenizer.json")
        model = tokenizer.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocab, list):  # Unigram: [[token, score], …]
            vocab = {token: i for i, (token, _) in enumerate(vocab)}
        if not isinstance(vocab, dict):
            raise UserError(f"{self.folder / 'tokenizer.json'}: has no vocabulary; write it with save_pretrained")
        added = {t["content"]: t["id"] for t in tokenizer.get("added_tokens") or []}
        return {**vocab, **added}


def finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. Integers always are; float8 has no isfinite of its own."""
    if not tensor.is_floating_point():
        return True
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return bool(torch.isfinite(wide).all())


def _entries(folder: Path) -> dict[str, Entry]:
    if (folder / "model.safetensors").exists():
        return read_header(file_inside(folder, "model.safetensors"))
    if (folder / INDEX).exists():
        weight_map = read_index(file_inside(folder, INDEX))
        entries: dict[str, Entry] = {}
        for file in sorted(set(weight_map.values())):
            shard = read_header(file_inside(folder, file))
            lost = next((n for n, f in weight_map.items() if f == file and n not in shard), None)
            if lost is not None:
                raise UserError(f"{folder / INDEX}: {file} does not hold {lost!r} as it should; fetch both again")
            entries.update({n: e for n, e in shard.items() if weight_map.get(n) == file})
        return entries
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(found) == 1:
        return read_header(file_inside(folder, found[0]))
    if found:
        raise UserError(f"{folder}: has {_list(found)} but no {INDEX} that says what is where; add it")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{folder / pickles[0]}: a pickle can run code when it is loaded; convert it to safetensors and give that"
        )
    raise UserError(f"{folder}: has no safetensors file; give a folder that holds the weights")


def _suggest(folder: Path) -> str:
    """What to give instead of a folder that holds no config."""
    inner = sorted(str(p.parent) for depth in ("*", "*/*") for p in folder.glob(f"{depth}/config.json"))
    if inner:
        return f"give the folders inside it: {_list(inner)}"
    return "give a folder that holds config.json and safetensors"


def _list(items: Iterable[str], most: int = 6) -> str:
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
