"""A checkpoint: a folder in Hugging Face layout, read one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from zoo.checkpoints.headers import INDEX, PICKLES, Entry, inside, read_header, read_index, read_json
from zoo.errors import NotFinite, UserError, unknown

if TYPE_CHECKING:
    from zoo.targets.blueprint import Blueprint

# What belongs to a checkpoint besides its weights. facts.json is what its trainer knows: {"loss", "tokens", "seed"}.
SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "facts.json",
)  # fmt: skip

_blueprints: dict[str, Blueprint] = {}  # by config: the donors of a zoo are often of one shape


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
        config = read_json(inside(folder, "config.json"))
        entries = _entries(folder)
        names = {e.file for e in entries.values()} | {n for n in SIDE_FILES if (folder / n).exists()}
        if (folder / INDEX).exists() and not (folder / "model.safetensors").exists():
            names.add(INDEX)
        if "tokenizer.json" not in names and (folder / "tokenizer.model").exists():
            names.add("tokenizer.model")
        for name in names:
            inside(folder, name)
        return cls(folder, config, entries, tuple(sorted(names)))

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    @property
    def parameters(self) -> int:
        return sum(math.prod(e.shape) for e in self.entries.values())

    @cached_property
    def blueprint(self) -> Blueprint:
        from zoo.targets.blueprint import Blueprint

        key = json.dumps(self.config, sort_keys=True)
        if key not in _blueprints:
            _blueprints[key] = Blueprint.from_config(self.folder / "config.json")
        return _blueprints[key]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """facts.json, or {}: what is known of the training (loss, tokens, seed)."""
        return read_json(self.folder / "facts.json") if "facts.json" in self.files else {}

    @cached_property
    def aliases(self) -> dict[str, str]:
        """blueprint's name -> name on disk, where they differ: checkpoints saved from a base model lack the head
        model's prefix (`h.0…` for `transformer.h.0…`) or the other way round, and some keep the head of a tied pair
        instead of the embedding."""
        wanted = self.blueprint.names
        ties = {target: source for source, target in self.blueprint.ties.items()}
        drop = sorted({n.split(".")[0] + "." for n in wanted})
        add = sorted({n.split(".")[0] + "." for n in self.entries})
        found: dict[str, str] = {}
        for name in wanted:
            if name not in self.entries:
                others = [name.removeprefix(p) for p in drop] + [p + name for p in add] + [ties.get(name, name)]
                other = next((o for o in others if o in self.entries), None)
                if other is not None:
                    found[name] = other
        return found

    def entry(self, name: str) -> Entry:
        """The entry of a tensor, by its name on disk or the blueprint's name for it."""
        if name in self.entries:
            return self.entries[name]
        if name in self.aliases:
            return self.entries[self.aliases[name]]
        raise unknown(f"tensor of {self.folder.name}", name, self.entries)

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


def check_against_blueprint(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Refuses (UserError) a checkpoint whose tensors are not those that its config asks for: one is missing or has
    another shape. Returns the names on disk that the config does not know (old buffers, heads of other tasks); a tied
    tensor that is stored besides its twin is not one of them."""
    blueprint = checkpoint.blueprint
    where = f"{checkpoint.folder}: config.json and weights disagree:"
    hint = "take both from the same checkpoint"
    missing = [n for n in blueprint.names if n not in checkpoint.entries and n not in checkpoint.aliases]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{where} the config asks for {missing[0]!r}{more}, which is not there; {hint}")
    for spec in blueprint.specs:
        shape = checkpoint.entry(spec.name).shape
        if shape != spec.shape:
            raise UserError(
                f"{where} {spec.name!r} has shape {list(shape)}, the config asks for {list(spec.shape)}; {hint}"
            )
    known = {checkpoint.entry(n).name for n in blueprint.names} | set(blueprint.ties)
    return tuple(n for n in checkpoint.entries if n not in known)


def _entries(folder: Path) -> dict[str, Entry]:
    if (folder / "model.safetensors").exists():
        return read_header(inside(folder, "model.safetensors"))
    if (folder / INDEX).exists():
        weight_map = read_index(inside(folder, INDEX))
        entries: dict[str, Entry] = {}
        for file in sorted(set(weight_map.values())):
            shard = read_header(inside(folder, file))
            lost = next((n for n, f in weight_map.items() if f == file and n not in shard), None)
            if lost is not None:
                raise UserError(f"{folder / INDEX}: {file} does not hold {lost!r} as it should; fetch both again")
            entries.update({n: e for n, e in shard.items() if weight_map.get(n) == file})
        return entries
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(found) == 1:
        return read_header(inside(folder, found[0]))
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
