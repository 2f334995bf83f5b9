"""The values of one tensor of a GGUF file, dequantised by the `gguf` library a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from zoo.checkpoints.files import open_regular
from zoo.errors import UserError
from zoo.gguf.header import GgufTensor, readable_types
from zoo.gguf.layouts import Change

CHUNK = 1 << 22  # values that are dequantised at a time: in float32, with copies, about 100 MB


def read_tensor(tensor: GgufTensor, change: Change, heads: int = 1) -> Tensor:
    """One tensor in bfloat16, with the values and the order that transformers has.

    heads: how many heads the rows belong to, where `change` says that they are interleaved. Each value is dequantised
    to float32, changed there, and rounded once. UserError for a file that is too short.
    """
    flat, begin = torch.empty(math.prod(tensor.shape), dtype=torch.bfloat16), 0
    for chunk in _float_rows(tensor):
        flat[begin : begin + chunk.numel()] = (chunk + change.offset if change.offset else chunk).flatten()
        begin += chunk.numel()
    values = flat.reshape(tensor.shape)
    if change.heads is not None:
        values = _split_halves(values, heads)
    return values.T.contiguous() if change.transposed else values


def read_numbers(tensor: GgufTensor) -> list[float]:
    """The values of a small tensor."""
    return [value for chunk in _float_rows(tensor) for value in chunk.flatten().tolist()]


def _float_rows(tensor: GgufTensor) -> Iterator[Tensor]:
    """The values in float32, some rows at a time, [rows, values of a row]."""
    from gguf.quants import dequantize

    kind = next(kind for kind in readable_types().values() if kind.name == tensor.type_name)
    count = math.prod(tensor.shape[:-1])
    row_bytes = tensor.nbytes // count
    step = max(1, CHUNK // tensor.shape[-1])
    with open_regular(tensor.file) as file:
        file.seek(tensor.offset)
        for begin in range(0, count, step):
            rows = min(step, count - begin)
            raw = np.empty((rows, row_bytes), dtype=np.uint8)
            if file.readinto(memoryview(raw).cast("B")) != raw.nbytes:
                raise UserError(f"{tensor.file}: ends inside tensor {tensor.name!r}; download the file again")
            with np.errstate(all="ignore"):  # scales may be infinite in a damaged file, which the writer refuses
                values = dequantize(raw, kind)
            yield torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _split_halves(values: Tensor, heads: int) -> Tensor:
    """The rows of each head with the two halves that rotate together apart, as transformers has them.

    llama.cpp has row 2i beside row 2i + 1, transformers row i and row i + size / 2.
    """
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)
