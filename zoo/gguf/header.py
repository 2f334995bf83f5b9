"""The header of a GGUF file, which may come from an untrusted source: its metadata, and where its tensors lie.

The `gguf` library reads a header without bounds, and makes an array object for every string of a vocabulary. So the
header is read here, with checks of every number, and the library supplies the table of types and the dequantisation.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.checkpoints.files import is_kind, kind_name, open_regular
from zoo.checkpoints.headers import DAMAGED
from zoo.errors import UserError
from zoo.limits import (
    MAX_GGUF_ALIGNMENT,
    MAX_GGUF_AXES,
    MAX_GGUF_HEADER,
    MAX_GGUF_KEY,
    MAX_GGUF_KEYS,
    MAX_GGUF_VALUES,
    MAX_TENSOR_NAME,
    MAX_TENSORS,
)
from zoo.words import shortened_list

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # of the tensors, unless general.alignment says otherwise
ARRAY, TEXT = 9, 8  # types of values that have no fixed size
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
CONVERT = "give a file that llama.cpp wrote in F16, Q8_0 or Q4_K_M, or the original model"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies in a GGUF file."""

    name: str
    type_name: str  # how its values are stored: F32, Q4_K, …
    shape: tuple[int, ...]  # in torch's order, the rows first
    file: Path
    offset: int  # in bytes, from the start of the file
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of one GGUF file."""

    path: Path
    metadata: dict[str, Any]  # key -> number, text, or a list of either
    tensors: dict[str, GgufTensor]  # by name, in the order of the file

    def get(self, key: str, kind: Any, default: Any = None) -> Any:
        """The value under a key, `default` where it is missing. UserError for another kind (`files.is_kind`)."""
        return typed_value(self.metadata, key, kind, default, str(self.path))


def typed_value(metadata: Mapping[str, Any], key: str, kind: Any, default: Any, where: str) -> Any:
    """The value under a key of the metadata, `default` where it is missing. UserError for one of another kind."""
    value = metadata.get(key)
    if value is None:
        return default
    if not is_kind(value, kind):
        raise UserError(f"{where}: {key} is {value!r:.60}; it must be {kind_name(kind)}; {DAMAGED}")
    return value


@cache
def readable_types() -> dict[int, GGMLQuantizationType]:
    """The types of tensors that the library dequantises, by their number in a file."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import _type_traits

    plain = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
    return {int(kind): kind for kind in (*plain, *_type_traits)}


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a GGUF file, with every number checked: counts, lengths, types, shapes, offsets.

    UserError names the file and the key or tensor. The sizes in `zoo.limits` bound the work.
    """
    try:
        with open_regular(path) as file:
            cursor = _Cursor(file, path, os.fstat(file.fileno()).st_size)
            return _read_header(cursor)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


class _Cursor:
    """A position in a file, which moves on as values are read. UserError where the file or its header ends."""

    def __init__(self, file: BufferedReader, path: Path, size: int) -> None:
        self.file = file
        self.path = path
        self.size = size
        self.position = 0
        self.values = 0  # of all lists so far

    def read_bytes(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            raise UserError(f"{self.path}: ends inside {what}, which takes {count} bytes; {DAMAGED}")
        if self.position + count > MAX_GGUF_HEADER:
            raise UserError(f"{self.path}: has a header of more than {MAX_GGUF_HEADER} bytes at {what}; {DAMAGED}")
        data = self.file.read(count)
        if len(data) != count:
            raise UserError(f"{self.path}: ends inside {what}; {DAMAGED}")
        self.position += count
        return data

    def read_numbers(self, layout: str, what: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{layout}", self.read_bytes(struct.calcsize(f"<{layout}"), what))

    def read_number(self, layout: str, what: str) -> Any:
        return self.read_numbers(layout, what)[0]

    def read_text(self, what: str, most: int = MAX_GGUF_HEADER) -> str:
        length = self.read_number("Q", what)
        if length > most:
            raise UserError(f"{self.path}: {what} has {length} bytes, more than the {most} allowed; {DAMAGED}")
        data = self.read_bytes(length, what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: {what} is not UTF-8 at byte {error.start}; {DAMAGED}") from error


def _read_header(cursor: _Cursor) -> GgufHeader:
    path = cursor.path
    if cursor.read_bytes(4, "the first four bytes") != MAGIC:
        raise UserError(f"{path}: does not start with {MAGIC.decode()}, so it is not a GGUF file; give the right file")
    version = cursor.read_number("I", "its version")
    if version not in VERSIONS:
        big = version & 0xFFFF == 0
        what = "has the byte order of big-endian machines" if big else f"is of GGUF version {version}"
        raise UserError(f"{path}: {what}; versions 2 and 3 in little-endian order are read; {CONVERT}")
    tensor_count, key_count = cursor.read_numbers("QQ", "its counts")
    if tensor_count > MAX_TENSORS:
        raise UserError(f"{path}: states {tensor_count} tensors; at most {MAX_TENSORS} are read; {DAMAGED}")
    if key_count > MAX_GGUF_KEYS:
        raise UserError(f"{path}: states {key_count} keys; at most {MAX_GGUF_KEYS} are read; {DAMAGED}")
    metadata = _read_metadata(cursor, key_count)
    alignment = typed_value(metadata, "general.alignment", int, ALIGNMENT, str(path))
    if not 0 < alignment <= MAX_GGUF_ALIGNMENT or alignment & (alignment - 1):
        raise UserError(f"{path}: general.alignment is {alignment}, which is not a power of two in range; {DAMAGED}")
    infos = [_read_tensor_info(cursor) for _ in range(tensor_count)]
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset, nbytes in infos:
        if name in tensors:
            raise UserError(f"{path}: lists the tensor {name!r} twice; {DAMAGED}")
        tensors[name] = GgufTensor(name, kind, shape, path, start + offset, nbytes)
    _check_places(cursor, tensors.values(), start, alignment)
    return GgufHeader(path, metadata, tensors)


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for number in range(count):
        key = cursor.read_text(f"the name of key {number}", MAX_GGUF_KEY)
        if key in metadata:
            raise UserError(f"{cursor.path}: has the key {key!r} twice; {DAMAGED}")
        metadata[key] = _read_value(cursor, cursor.read_number("I", repr(key)), f"the value of {key!r}")
    return metadata


def _read_value(cursor: _Cursor, kind: int, what: str) -> Any:
    if kind in NUMBERS:
        return cursor.read_number(NUMBERS[kind], what)
    if kind == TEXT:
        return cursor.read_text(what)
    if kind != ARRAY:
        raise UserError(f"{cursor.path}: {what} is of the type {kind}, which GGUF does not define; {DAMAGED}")
    kind, count = cursor.read_numbers("IQ", what)
    cursor.values += count
    if cursor.values > MAX_GGUF_VALUES:
        raise UserError(f"{cursor.path}: {what} makes more than {MAX_GGUF_VALUES} values in lists; {DAMAGED}")
    if kind == TEXT:
        return [cursor.read_text(what) for _ in range(count)]
    if kind not in NUMBERS:
        raise UserError(f"{cursor.path}: {what} is a list of values of the type {kind}, which is not read; {DAMAGED}")
    return list(cursor.read_numbers(f"{count}{NUMBERS[kind]}", what)) if count else []


def _read_tensor_info(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int, int]:
    """(name, type, shape, offset from the start of the data, bytes) of the next tensor."""
    path = cursor.path
    name = cursor.read_text("the name of a tensor", MAX_TENSOR_NAME)
    axes = cursor.read_number("I", f"the shape of {name!r}")
    if not 1 <= axes <= MAX_GGUF_AXES:
        raise UserError(f"{path}: tensor {name!r} has {axes} axes; GGUF allows 1 to {MAX_GGUF_AXES}; {DAMAGED}")
    shape = tuple(reversed(cursor.read_numbers(f"{axes}Q", f"the shape of {name!r}")))
    number, offset = cursor.read_numbers("IQ", f"the place of {name!r}")
    values = math.prod(shape)
    if not 0 < values < 2**60 or offset >= 2**62:
        raise UserError(f"{path}: tensor {name!r} has the absurd shape {list(shape)} or offset {offset}; {DAMAGED}")
    kind = readable_types().get(number)
    if kind is None:
        raise UserError(f"{path}: tensor {name!r} is quantised as {_type_text(number)}; {CONVERT}")
    from gguf.constants import GGML_QUANT_SIZES

    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise UserError(
            f"{path}: tensor {name!r} has rows of {shape[-1]} values, which {kind.name} stores in blocks of {block};"
            f" {DAMAGED}"
        )
    return name, kind.name, shape, offset, values // block * block_bytes


def _type_text(number: int) -> str:
    """A type that is not read, for a message."""
    from gguf.constants import GGMLQuantizationType

    known = {int(kind): kind.name for kind in GGMLQuantizationType}
    readable = shortened_list([kind.name for kind in readable_types().values()], 30)
    name = f"{known[number]}, which is not read" if number in known else f"type {number}, which is not known"
    return f"{name} (readable: {readable})"


def _check_places(cursor: _Cursor, tensors: Any, start: int, alignment: int) -> None:
    """UserError where the tensors do not lie one after the other, each aligned, up to the end of the file."""
    path, end = cursor.path, start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset % alignment:
            raise UserError(f"{path}: tensor {tensor.name!r} lies at byte {tensor.offset}, not aligned; {DAMAGED}")
        if tensor.offset < end or tensor.offset - end >= alignment:
            what = "overlaps the one before it" if tensor.offset < end else "leaves a hole before it"
            raise UserError(f"{path}: tensor {tensor.name!r} {what}; {DAMAGED}")
        end = tensor.offset + tensor.nbytes
        if end > cursor.size:
            raise UserError(
                f"{path}: tensor {tensor.name!r} ends at byte {end} of a file of {cursor.size} bytes; {DAMAGED}"
            )
    if cursor.size - end >= alignment and tensors:
        raise UserError(f"{path}: {cursor.size - end} bytes after the last tensor belong to none; {DAMAGED}")
