"""A checkpoint: a folder in Hugging Face layout, read one tensor at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from zoo.checkpoints.files import GGUF, GGUF_ADVICE, PICKLES, file_inside, open_regular, read_json
from zoo.checkpoints.headers import INDEX, Entry, read_header, read_index
from zoo.checkpoints.quantised import Quantisation, dequantise, find_quantised
from zoo.checkpoints.side_files import side_files
from zoo.checkpoints.token_ids import read_token_ids
from zoo.errors import NotFinite, UserError, unknown
from zoo.limits import MAX_CONFIG, MAX_TENSORS
from zoo.words import shortened_list

VALUES_CHECKED = 1 << 22  # at a time: float8 is converted


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open checkpoint. Its weights are read only by `read`.

    Its tensors are those of the model. The scales of quantised weights are none: they are in `entries` alone.
    """

    folder: Path
    config: dict[str, Any]  # the parsed config.json
    entries: dict[str, Entry]  # the tensors by name on disk, in the order of files and offsets
    files: tuple[str, ...]  # the names of all its files, sorted

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Reads config.json and the headers.

        UserError for a folder without config.json or safetensors, for pickles, and for a damaged header or index.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give one with config.json and safetensors files")
        if not (folder / "config.json").exists():
            raise UserError(f"{folder}: has no config.json; {_advice(folder)}")
        config = read_json(file_inside(folder, "config.json"), MAX_CONFIG)
        entries = _entries(folder)
        names = {e.file for e in entries.values()} | set(side_files([p.name for p in folder.iterdir()]))
        if (folder / INDEX).exists() and not (folder / "model.safetensors").exists():
            names.add(INDEX)
        for name in names:
            file_inside(folder, name)
        return cls(folder, config, entries, tuple(sorted(names)))

    @property
    def names(self) -> list[str]:
        """The names of its tensors on disk."""
        return [name for name in self.entries if name not in self.quantisation.companions]

    @property
    def parameters(self) -> int:
        """The number of its weights."""
        return sum(math.prod(self.entries[name].shape) for name in self.names)

    @cached_property
    def quantisation(self) -> Quantisation:
        """Which of its tensors are codes, and how they are read."""
        return find_quantised(self.entries, self.config)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What facts.json tells about its training (loss, tokens, seed), {} without that file."""
        return read_json(self.folder / "facts.json", MAX_CONFIG) if "facts.json" in self.files else {}

    def entry(self, name: str) -> Entry:
        """Where the tensor with this name on disk lies. UserError for an unknown name."""
        if name not in self.entries:
            raise unknown(f"tensor of {self.folder.name}", name, self.entries)
        return self.entries[name]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on the CPU, of the shape and dtype on disk or cast to `dtype`. Only its bytes are read.

        A quantised weight is dequantised, to float32. UserError for an unknown name or a file that is too short,
        NotFinite for NaN or infinity.
        """
        entry = self.entry(name)
        quantised = self.quantisation.weights.get(entry.name)
        tensor = self.read_stored(entry) if quantised is None else dequantise(quantised, self.read_stored)
        if not is_finite(tensor):
            raise NotFinite(f"{self.folder}: tensor {name!r} holds NaN or infinity; use another checkpoint")
        return tensor if dtype is None else tensor.to(dtype)

    def read_stored(self, entry: Entry) -> Tensor:
        """One tensor as it is on disk: the codes of a quantised one. UserError for a file that is too short."""
        return self.read_values(entry, 0, math.prod(entry.shape)).reshape(entry.shape)

    def read_values(self, entry: Entry, begin: int, end: int) -> Tensor:
        """The values number `begin` to `end` of a tensor as it is on disk. UserError for a file that is too short."""
        raw = torch.empty((end - begin) * entry.dtype.itemsize, dtype=torch.uint8)
        try:
            with (self.folder / entry.file).open("rb") as f:
                f.seek(entry.offset + begin * entry.dtype.itemsize)
                count = f.readinto(memoryview(raw.numpy()))
        except OSError as error:
            raise UserError(f"{self.folder / entry.file}: cannot be read ({error.strerror})") from error
        if count != len(raw):
            raise UserError(f"{self.folder / entry.file}: ends inside tensor {entry.name!r}; download the file again")
        return raw.view(entry.dtype)

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of a matrix as it is on disk, [rows, columns]; rows: their numbers. Only their bytes are read.

        UserError for an unknown name or a file that is too short.
        """
        entry = self.entry(name)
        columns = entry.shape[1]
        read = torch.empty((len(rows), columns), dtype=entry.dtype)
        raw = memoryview(read.view(torch.uint8).flatten().numpy())
        size = columns * entry.dtype.itemsize
        with open_regular(self.folder / entry.file) as f:
            for target, row in enumerate(rows.tolist()):
                f.seek(entry.offset + row * size)
                if f.readinto(raw[target * size : (target + 1) * size]) != size:
                    raise UserError(
                        f"{self.folder / entry.file}: ends inside tensor {entry.name!r}; download the file again"
                    )
        return read

    def vocabulary(self) -> dict[str, int] | None:
        """Token string -> id from tokenizer.json, added tokens included. None without that file."""
        if "tokenizer.json" not in self.files:
            return None
        return read_token_ids(self.folder / "tokenizer.json")


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. True for integers. A part of the values is looked at at a time."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    for part in tensor.reshape(-1).split(VALUES_CHECKED):
        wide = part.float() if part.dtype.itemsize == 1 else part  # torch has no aminmax for float8
        # NaN passes on to both ends. isfinite makes several copies and takes twenty times as long.
        if not all(end.isfinite() for end in torch.aminmax(wide)):
            return False
    return True


def _entries(folder: Path) -> dict[str, Entry]:
    """The tensors of a folder: of model.safetensors, of the shards in the index, or of the only safetensors file."""
    if (folder / "model.safetensors").exists():
        return read_header(file_inside(folder, "model.safetensors"))
    if (folder / INDEX).exists():
        weight_map = read_index(file_inside(folder, INDEX))
        names_in: dict[str, set[str]] = defaultdict(set)
        for name, file in weight_map.items():
            names_in[file].add(name)
        entries: dict[str, Entry] = {}
        count = 0
        for file, names in sorted(names_in.items()):
            shard = read_header(file_inside(folder, file))
            count += len(shard)
            if count > MAX_TENSORS:
                raise UserError(f"{folder}: its files list more than {MAX_TENSORS} tensors; at most so many are read")
            missing = min(names - shard.keys(), default=None)
            if missing is not None:
                raise UserError(f"{folder / INDEX}: {file} lacks {missing!r}; download both again")
            entries.update({n: e for n, e in shard.items() if n in names})
        return entries
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(files) == 1:
        return read_header(file_inside(folder, files[0]))
    if files:
        raise UserError(f"{folder}: has {shortened_list(files)} but no {INDEX} that assigns tensors to them; add it")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{folder / pickles[0]}: a pickle can run code when it is loaded; convert it to safetensors and give that"
        )
    if any(p.suffix.lower() == GGUF for p in folder.iterdir()):
        raise UserError(f"{folder}: {GGUF_ADVICE}")
    raise UserError(f"{folder}: has no safetensors file; give a folder with weights")


def _advice(folder: Path) -> str:
    """What to give instead of a folder without config.json."""
    inner = sorted(str(p.parent) for depth in ("*", "*/*") for p in folder.glob(f"{depth}/config.json"))
    if inner:
        return f"give the folders inside it: {shortened_list(inner)}"
    if any(p.suffix.lower() == GGUF for p in folder.iterdir()):
        return GGUF_ADVICE
    return "give a folder with config.json and safetensors files"
