"""A model in one or several GGUF files, as a checkpoint that could be read: its config, and every tensor by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.checkpoints.headers import DAMAGED
from zoo.checkpoints.licenses import license_text
from zoo.errors import UserError
from zoo.gguf.config import ModelFacts, rebuild_config, rebuild_generation_config
from zoo.gguf.header import CONVERT, GgufHeader, GgufTensor, read_gguf_header, typed_value
from zoo.gguf.layouts import Change, Layout, find_layout
from zoo.gguf.tensors import read_numbers, read_tensor
from zoo.gguf.tokenizer import json_bytes, rebuild_tokenizer
from zoo.limits import MAX_SHARDS
from zoo.targets.blueprint import Blueprint
from zoo.words import one_line

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.gguf)", re.IGNORECASE)
MAX_FACTOR = 1 << 16  # values of a tensor that is no weight, such as the factors of a rotary embedding
MAX_ORIGIN = 200  # characters of the name of a base model


@dataclass(frozen=True)
class GgufModel:
    """A model whose header is read and checked. Its weights are read one tensor at a time."""

    files: tuple[Path, ...]  # the parts in order
    layout: Layout
    metadata: Mapping[str, Any]
    blueprint: Blueprint
    places: Mapping[str, tuple[GgufTensor, Change]]  # name in transformers -> where it lies, and its change
    notes: tuple[str, ...]  # what of the files is left out: one line each

    @classmethod
    def open(cls, files: Sequence[Path]) -> GgufModel:
        """Reads the headers of all parts, rebuilds the config and finds every tensor that it describes.

        UserError for files that are damaged or no GGUF, an architecture that is not in the table, and tensors that the
        config does not describe, that are missing, or that have another shape.
        """
        headers = [read_gguf_header(path) for path in files]
        tensors = _joined_tensors(headers)
        metadata, where = headers[0].metadata, str(files[0])
        architecture = typed_value(metadata, "general.architecture", str, "", where)
        layout = find_layout(architecture, where)

        def read_small(name: str) -> list[float]:
            if tensors[name].nbytes > 4 * MAX_FACTOR:
                raise UserError(f"{where}: tensor {name!r} has {tensors[name].nbytes} bytes, too many for it")
            return read_numbers(tensors[name])

        facts = ModelFacts(architecture, metadata, tensors, read_small, where)
        config, notes = rebuild_config(facts)
        blueprint = Blueprint.from_config(config, where)
        places = _find_places(layout, tensors, blueprint, where)
        return cls(tuple(files), layout, metadata, blueprint, places, tuple(notes))

    @property
    def where(self) -> str:
        """Its first file, for messages."""
        return str(self.files[0])

    def read(self, name: str) -> Tensor:
        """One tensor by its name in transformers, dequantised, in bfloat16."""
        tensor, change = self.places[name]
        heads = self._heads[change.heads] if change.heads else 1
        return read_tensor(tensor, change, heads)

    @cached_property
    def _heads(self) -> dict[str, int]:
        config = self.blueprint.config or {}
        return {"q": config.get("num_attention_heads", 1), "k": config.get("num_key_value_heads", 1)}

    def side_files(self) -> tuple[dict[str, bytes], list[str]]:
        """({file name: its bytes} beside the weights, what of the tokenizer is left out: one line each)."""
        files, notes = rebuild_tokenizer(self.metadata, self.layout.architecture, self.where)
        facts = ModelFacts(self.layout.architecture, self.metadata, {}, lambda name: [], self.where)
        generation = rebuild_generation_config(facts)
        files |= {"config.json": json_bytes(self.blueprint.config or {})}
        files |= {"generation_config.json": json_bytes(generation)} if generation else {}
        return files, notes

    @property
    def license(self) -> str:
        """The licence in the metadata, `unknown` where there is none."""
        return license_text(*(self.metadata.get(f"general.license{part}") for part in ("", ".name", ".link")))

    @property
    def types(self) -> dict[str, str]:
        """Name in transformers -> how the file stores the tensor: F32, Q4_K, …"""
        return {name: self.places[name][0].type_name for name in self.blueprint.names}

    @property
    def base_models(self) -> list[str]:
        """The models that this one was made from, as the metadata names them: addresses, or names."""
        found = []
        for number in range(min(typed_value(self.metadata, "general.base_model.count", int, 0, self.where), 10)):
            values = [self.metadata.get(f"general.base_model.{number}.{key}") for key in ("repo_url", "url", "name")]
            found += [one_line(v, MAX_ORIGIN) for v in values if isinstance(v, str) and v][:1]
        return found


def describe_types(types: Mapping[str, str]) -> str:
    """'210 tensors in Q4_1, 61 in F32, 1 in Q8_0 of a GGUF file, stored as bfloat16', from `GgufModel.types`."""
    counts = Counter(types.values())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    first, *others = [f"{count} tensors in {kind}" for kind, count in ordered]
    parts = [first, *(other.replace(" tensors", "") for other in others)]
    return f"{', '.join(parts)} of a GGUF file, stored as bfloat16"


def part_files(path: Path) -> list[Path]:
    """All parts of a split GGUF file that lie beside the given one, in order; the file alone where it is not split.

    UserError where a part is missing.
    """
    paths = [path.with_name(name) for name in part_names(path.name)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing and path.is_file():
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{path}: is split into {len(paths)} parts, of which {missing[0]!r}{more} is missing; add it")
    return paths


def part_names(name: str) -> list[str]:
    """The names of all parts of a split GGUF file, from the name of one: `model-00001-of-00003.gguf`."""
    match = PART.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= MAX_SHARDS:
        raise UserError(f"{name}: is part {int(match['number'])} of {count}, which cannot be; give the right file")
    return [f"{match['stem']}-{number:05}-of-{count:05}{match['end']}" for number in range(1, count + 1)]


def stem(name: str) -> str:
    """The name of a model's file without its ending and without the number of a part."""
    match = PART.fullmatch(name)
    return match["stem"] if match else Path(name).stem


def _joined_tensors(headers: Sequence[GgufHeader]) -> dict[str, GgufTensor]:
    """The tensors of all parts. UserError where the parts do not belong together."""
    tensors: dict[str, GgufTensor] = {}
    for number, header in enumerate(headers):
        stated = header.get("split.count", int, 1), header.get("split.no", int, 0)
        expected = (len(headers), number)
        if stated[0] != expected[0] or (len(headers) > 1 and stated[1] != expected[1]):
            where, which = stated[1] + 1, f"{number + 1} of {len(headers)}"
            raise UserError(
                f"{header.path}: says that it is part {where} of {stated[0]}, and its name says {which}; give all parts"
                " under the names that llama.cpp gave them"
            )
        repeated = next((name for name in header.tensors if name in tensors), None)
        if repeated is not None:
            raise UserError(f"{header.path}: has the tensor {repeated!r} of an earlier part; {DAMAGED}")
        tensors |= header.tensors
    total = headers[0].get("split.tensors.count", int, len(tensors))
    if len(headers) > 1 and total != len(tensors):
        raise UserError(f"{headers[0].path}: its parts have {len(tensors)} tensors instead of {total}; {DAMAGED}")
    return tensors


def _find_places(
    layout: Layout, tensors: Mapping[str, GgufTensor], blueprint: Blueprint, where: str
) -> dict[str, tuple[GgufTensor, Change]]:
    """Where each tensor of the blueprint lies. UserError where one is missing, unknown or of another shape."""
    places: dict[str, tuple[GgufTensor, Change]] = {}
    for name, tensor in tensors.items():
        if name in layout.rotary:
            continue
        found = layout.target(name)
        if found is None or found[0] not in blueprint:
            raise UserError(
                f"{where}: tensor {name!r} has no place in a model of the architecture {layout.architecture!r};"
                f" {CONVERT}"
            )
        target, change = found
        shape = tensor.shape[::-1] if change.transposed else tensor.shape
        if shape != blueprint[target].shape:
            described = list(blueprint[target].shape)
            raise UserError(
                f"{where}: tensor {name!r} has the shape {list(shape)}, its metadata describes {described}; {DAMAGED}"
            )
        places[target] = tensor, change
    missing = [name for name in blueprint.names if name not in places]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{where}: lacks the tensor for {missing[0]!r}{more}, which its metadata describes; {DAMAGED}")
    return places
