"""Headers and indexes of safetensors files, which may come from an untrusted source."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.checkpoints.files import (
    is_bare_name,
    open_regular,
    read_json,
    refuse_other_formats,
    unique_keys,
    without_garbage_collection,
)
from zoo.errors import UserError
from zoo.limits import MAX_AXES, MAX_HEADER, MAX_SHARDS, MAX_TENSOR_NAME, MAX_TENSORS
from zoo.words import first_line

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7; powers of two, which serve as scales
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Valid in a safetensors file, and never those of plain weights.
UNSUPPORTED_DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64")

INDEX = "model.safetensors.index.json"
DAMAGED = "the file is damaged, download or write it again"
CONVERT = "give a checkpoint in float32, float16 or bfloat16"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies on disk."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str  # file name inside the checkpoint's folder
    offset: int  # in bytes, from the start of the file
    nbytes: int


@without_garbage_collection()
def read_header(path: Path) -> dict[str, Entry]:
    """name -> Entry of every tensor in a safetensors file, in the order of their offsets.

    Everything in the header is checked: its length fits in the file, its names are unique, its dtypes are known, its
    shapes agree with its byte counts, and its tensors tile the rest of the file without hole or overlap (the rule of
    the safetensors library). UserError names the file and the tensor. The sizes in `zoo.limits` bound the work.
    """
    refuse_other_formats(path)
    header, start, size = _read_raw_header(path)
    header.pop("__metadata__", None)  # text for readers
    if len(header) > MAX_TENSORS:
        raise UserError(f"{path}: lists {len(header)} tensors; at most {MAX_TENSORS} are read")
    entries = []
    for name, value in header.items():
        if len(name) > MAX_TENSOR_NAME:
            raise UserError(f"{path}: tensor {name[:40]!r}… has a name of {len(name)} characters; {DAMAGED}")
        problem = _entry_problem(value)
        if problem:
            raise UserError(f"{path}: tensor {name!r} {problem}")
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
        with open_regular(path) as f:
            size = os.fstat(f.fileno()).st_size
            prefix = f.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise UserError(f"{path}: {size} bytes cannot hold a safetensors header; {DAMAGED}")
            if length > MAX_HEADER or length > size - 8:
                raise UserError(
                    f"{path}: states a header of {length} bytes, the file has {size} and at most {MAX_HEADER} are read;"
                    f" {DAMAGED}"
                )
            raw = f.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    # A tensor has one object and two lists in the header. More of them would take gigabytes when parsed.
    if raw.count(b"{") > 2 * MAX_TENSORS or raw.count(b"[") > 3 * MAX_TENSORS or raw.count(b'":') > 5 * MAX_TENSORS:
        raise UserError(
            f"{path}: its header of {length} bytes lists more than {MAX_TENSORS} tensors, which is too many"
        )
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
    if len(weight_map) > MAX_TENSORS:
        raise UserError(f"{path}: lists {len(weight_map)} tensors; at most {MAX_TENSORS} are read")
    files = {file for file in weight_map.values() if isinstance(file, str)}
    if len(files) > MAX_SHARDS:
        raise UserError(f"{path}: lists {len(files)} files; at most {MAX_SHARDS} are read")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not is_bare_name(file):
            raise UserError(
                f"{path}: assigns tensor {name!r} to {file!r}; an index may name only files in its own folder"
            )
        refuse_other_formats(path.parent / file)
        if not file.endswith(".safetensors"):
            raise UserError(f"{path}: assigns tensor {name!r} to {file!r}, which is not a safetensors file")
    return weight_map


def _entry_problem(value: object) -> str | None:
    """What is wrong with one entry of a header and what to do about it, None where it is valid."""
    if not isinstance(value, dict) or "dtype" not in value or "shape" not in value or "data_offsets" not in value:
        return f"has no dtype, shape and data_offsets; {DAMAGED}"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        if isinstance(dtype, str) and dtype in UNSUPPORTED_DTYPES:
            return f"has the dtype {dtype}, which is not supported; {CONVERT}"
        return f"has the dtype {_shortened(dtype)}, which is none of {', '.join(DTYPES)}; {DAMAGED}"
    if isinstance(shape, list) and len(shape) > MAX_AXES:
        return f"has a shape of {len(shape)} axes; at most {MAX_AXES} are read; {DAMAGED}"
    if not _is_list_of_sizes(shape):
        return f"has the shape {_shortened(shape)}, which is not a list of sizes; {DAMAGED}"
    if not _is_list_of_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has the data_offsets {_shortened(offsets)}; {DAMAGED}"
    numel = math.prod(shape)
    if numel >= 2**63 or (numel == 0 and math.prod(n for n in shape if n) >= 2**63):
        return f"has the absurd shape {shape}; {DAMAGED}"
    need, have = numel * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if need != have:
        return f"needs {need} bytes for its shape {shape} in {dtype} and has {have}; {DAMAGED}"
    return None


def _is_list_of_sizes(value: object) -> bool:
    if type(value) is not list:
        return False
    for n in value:  # noqa: SIM110  (called for every tensor: half the time of `all`)
        if type(n) is not int or not 0 <= n < 2**63:
            return False
    return True


def _shortened(value: object) -> str:
    """The start of a value of any size, for a message."""
    if isinstance(value, list | dict) and len(value) > MAX_AXES:
        return f"a {type(value).__name__} of {len(value)} elements"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
