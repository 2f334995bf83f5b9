"""Headers and indexes of safetensors files, which may come from an untrusted source."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.checkpoints.files import is_bare_name, read_json, refuse_pickle, unique_keys
from zoo.errors import UserError
from zoo.words import first_line

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

INDEX = "model.safetensors.index.json"
DAMAGED = "the file is damaged, download or write it again"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies on disk."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str  # file name inside the checkpoint's folder
    offset: int  # in bytes, from the start of the file
    nbytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """name -> Entry of every tensor in a safetensors file, in the order of their offsets.

    Everything in the header is checked: its length fits in the file, its names are unique, its dtypes are known, its
    shapes agree with its byte counts, and its tensors tile the rest of the file without hole or overlap (the rule of
    the safetensors library). UserError names the file and the tensor.
    """
    refuse_pickle(path)
    header, start, size = _read_raw_header(path)
    entries = []
    for name, value in header.items():
        if name == "__metadata__":
            continue
        problem = _entry_problem(value)
        if problem:
            raise UserError(f"{path}: tensor {name!r} {problem}; {DAMAGED}")
        begin, end = value["data_offsets"]
        dtype, shape = DTYPES[value["dtype"]], tuple(value["shape"])
        if end > size - start:
            raise UserError(
                f"{path}: tensor {name!r} ends at byte {end} of the data, which has {size - start} bytes; {DAMAGED}"
            )
        entries.append(Entry(name, dtype, shape, path.name, start + begin, end - begin))
    entries.sort(key=lambda e: (e.offset, e.nbytes))
    _check_tiling(path, entries, start, size)
    return {entry.name: entry for entry in entries}


def _read_raw_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(the header's JSON object, the offset of the data, the size of the file)."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            prefix = f.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise UserError(f"{path}: {size} bytes cannot hold a safetensors header; {DAMAGED}")
            if length > MAX_HEADER or length > size - 8:
                raise UserError(f"{path}: states a header of {length} bytes, the file has {size}; {DAMAGED}")
            raw = f.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        header = json.loads(raw, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its header is not valid JSON ({first_line(error)}); {DAMAGED}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is not a JSON object; {DAMAGED}")
    return header, 8 + length, size


def _check_tiling(path: Path, entries: list[Entry], start: int, size: int) -> None:
    """UserError where the entries, sorted by offset, do not fill the bytes from `start` to `size` exactly."""
    position = start
    for entry in entries:
        if entry.offset != position:
            what = "overlaps the one before it" if entry.offset < position else "leaves a hole before it"
            raise UserError(f"{path}: tensor {entry.name!r} {what}; {DAMAGED}")
        position += entry.nbytes
    if position != size:
        raise UserError(f"{path}: {size - position} bytes after the last tensor belong to none; {DAMAGED}")


def read_index(path: Path) -> dict[str, str]:
    """tensor name -> file name, from a `model.safetensors.index.json`. UserError for a file outside its folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: has no weight_map from tensor names to files; download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not is_bare_name(file):
            raise UserError(
                f"{path}: assigns tensor {name!r} to {file!r}; an index may name only files in its own folder"
            )
        refuse_pickle(path.parent / file)
        if not file.endswith(".safetensors"):
            raise UserError(f"{path}: assigns tensor {name!r} to {file!r}, which is not a safetensors file")
    return weight_map


def _entry_problem(value: object) -> str | None:
    """What is wrong with one entry of a header, None where it is valid."""
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        return "has no dtype, shape and data_offsets"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has the dtype {dtype!r}, which is none of {', '.join(DTYPES)}"
    if not _is_list_of_sizes(shape):
        return f"has the shape {shape!r}, which is not a list of sizes"
    if not _is_list_of_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has the data_offsets {offsets!r}"
    if math.prod(max(n, 1) for n in shape) >= 2**63:
        return f"has the absurd shape {shape}"
    need, have = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if need != have:
        return f"needs {need} bytes for its shape {shape} in {dtype} and has {have}"
    return None


def _is_list_of_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
