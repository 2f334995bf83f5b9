"""Headers and indexes of safetensors read as what they are: bytes from a stranger."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from zoo.checkpoints.files import first_line, is_bare_name, read_json, refuse_pickle, unique_keys
from zoo.errors import UserError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `nbytes` bytes at `offset` (counted from the start of the file) of `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str  # file name inside the checkpoint's folder
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """name -> Entry of every tensor in the safetensors file `path`, in the order of their offsets.

    Nothing of the header is believed: its length must fit in the file, its names be unique, its dtypes known, its
    shapes agree with its byte counts, and its tensors tile the rest of the file without hole or overlap (the rule of
    the safetensors library). Raises UserError, naming the file and the tensor.
    """
    again = "the file is damaged, fetch or write it again"
    refuse_pickle(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            prefix = f.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise UserError(f"{path}: {size} bytes cannot hold a safetensors header; {again}")
            if length > MAX_HEADER or length > size - 8:
                raise UserError(f"{path}: says that its header has {length} bytes, the file has {size}; {again}")
            raw = f.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        header = json.loads(raw, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its header is not valid JSON ({first_line(error)}); {again}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is not a JSON object; {again}")

    entries = []
    for name, value in header.items():
        if name == "__metadata__":
            continue
        problem = _entry_problem(value)
        if problem:
            raise UserError(f"{path}: tensor {name!r} {problem}; {again}")
        begin, end = value["data_offsets"]
        if end > size - 8 - length:
            raise UserError(
                f"{path}: tensor {name!r} ends at byte {end} of the data, which has {size - 8 - length}; {again}"
            )
        entries.append(
            Entry(name, DTYPES[value["dtype"]], tuple(value["shape"]), path.name, 8 + length + begin, end - begin)
        )

    entries.sort(key=lambda e: (e.offset, e.nbytes))
    position = 8 + length
    for entry in entries:
        if entry.offset != position:
            what = "overlaps the one before it" if entry.offset < position else "leaves a hole before it"
            raise UserError(f"{path}: tensor {entry.name!r} {what}; {again}")
        position += entry.nbytes
    if position != size:
        raise UserError(f"{path}: {size - position} bytes after the last tensor belong to none; {again}")
    return {entry.name: entry for entry in entries}


def read_index(path: Path) -> dict[str, str]:
    """tensor name -> file name of a `model.safetensors.index.json`; every file must lie in the index's own folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: has no weight_map from tensor names to files; fetch it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not is_bare_name(file):
            raise UserError(
                f"{path}: sends tensor {name!r} to {file!r}; an index may name files of its own folder only"
            )
        refuse_pickle(path.parent / file)
        if not file.endswith(".safetensors"):
            raise UserError(f"{path}: sends tensor {name!r} to {file!r}, which is no safetensors file")
    return weight_map


def _entry_problem(value: object) -> str | None:
    """What is wrong with one entry of a header, or None."""
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        return "has no dtype, shape and data_offsets"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has the dtype {dtype!r}, which is none of {', '.join(DTYPES)}"
    if not _naturals(shape):
        return f"has the shape {shape!r}, which is no list of sizes"
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has the data_offsets {offsets!r}"
    if math.prod(max(n, 1) for n in shape) >= 2**63:
        return f"has the absurd shape {shape}"
    need, have = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if need != have:
        return f"needs {need} bytes for its shape {shape} in {dtype} and has {have}"
    return None


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
