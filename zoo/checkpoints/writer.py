"""Writes checkpoints tensor by tensor, in any order, with one tensor in memory."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from zoo.checkpoints.atomic import new_folder, replacement_file
from zoo.checkpoints.checkpoint import is_finite
from zoo.checkpoints.headers import DTYPE_NAMES, INDEX
from zoo.errors import NotFinite, UserError, unknown
from zoo.tensors import TensorSpec


class Target(Protocol):
    """What a checkpoint is written for: in practice a Blueprint."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def config(self) -> dict[str, Any] | None: ...


@dataclass(frozen=True)
class Shard:
    """One safetensors file before it has data: its header's bytes and where each tensor goes."""

    file: str
    header: bytes
    offsets: dict[str, int]  # from the start of the file
    size: int  # of the whole file


def write_checkpoint(
    out: str | Path,
    blueprint: Target,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes config.json (where the blueprint has one) and model.safetensors, or shards with their index, to `out`.

    tensors   (name on disk, tensor of the spec's shape, any dtype and device), each name of the blueprint once, in any
              order
    dtype     of every floating tensor on disk, and then of config.json; None keeps the dtype of each spec
    metadata  entries of the safetensors headers besides format=pt

    The shards are planned from the specs, so every offset is known before the first tensor comes. The files are
    allocated at once: a full disk is noticed before the work. Equal input gives equal bytes, whatever the order.

    `out` appears complete or not at all. UserError: out exists, the disk is full, a name is unknown, repeated or
    missing, a shape is wrong, a value is NaN or infinite (after the cast to the dtype on disk).
    """
    with new_folder(out) as folder:
        fill_folder(folder, blueprint, tensors, dtype, max_shard_size, metadata)


def fill_folder(
    folder: Path,
    blueprint: Target,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes the files of `write_checkpoint` into a folder that exists and is not published yet.

    UserError as `write_checkpoint`; the caller then removes the folder.
    """
    shards = plan_shards(blueprint.specs, dtype, max_shard_size, metadata)
    allocate_shards(folder, shards)
    write_tensors(folder, blueprint, shards, tensors, dtype)
    write_description(folder, blueprint, shards, dtype)


def allocate_shards(folder: Path, shards: Sequence[Shard]) -> None:
    """Creates the files of `plan_shards` in their full size, with their headers. OSError for a full disk."""
    for shard in shards:
        with (folder / shard.file).open("w+b", buffering=0) as f:
            _allocate(f, shard.size)
            _write(f, 0, shard.header)


def write_tensors(
    folder: Path,
    blueprint: Target,
    shards: Sequence[Shard],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None = None,
    names: Collection[str] | None = None,
) -> None:
    """Writes tensors to their places in allocated files. names: those that must come, None for all.

    Several processes may write different tensors at the same time. UserError as `write_checkpoint`.
    """
    specs = {spec.name: spec for spec in blueprint.specs}
    shard_of = {name: shard for shard in shards for name in shard.offsets}
    missing = set(shard_of if names is None else names)
    with contextlib.ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for name, tensor in tensors:
            if name not in shard_of:
                raise unknown("tensor for this target", name, shard_of)
            if name not in missing:
                raise UserError(f"tensor {name!r} came twice; a sampler must yield every tensor once")
            missing.remove(name)
            spec, shard = specs[name], shard_of[name]
            if shard.file not in files:
                files[shard.file] = stack.enter_context((folder / shard.file).open("r+b", buffering=0))
            _write(files[shard.file], shard.offsets[name], _tensor_bytes(spec, tensor, dtype))
        if missing:
            first = next(n for n in specs if n in missing)
            raise UserError(f"{len(missing)} tensors are missing, first {first!r}; fill them before writing")


def write_description(
    folder: Path, blueprint: Target, shards: Sequence[Shard], dtype: torch.dtype | None = None
) -> None:
    """Writes config.json, where the blueprint has one, and the index, where there are several shards."""
    if len(shards) > 1:
        _write_json(folder / INDEX, shard_index(shards))
    if blueprint.config is not None:
        _write_json(folder / "config.json", _config_with_dtype(blueprint.config, dtype))


def write_shard(
    path: Path, shard: Shard, specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor], dtype: torch.dtype | None
) -> None:
    """Writes one file of `plan_shards`, tensor by tensor as `read` returns them by name.

    The file appears complete or not at all. UserError as `write_checkpoint`.
    """
    with replacement_file(path) as partial, partial.open("w+b", buffering=0) as f:
        _allocate(f, shard.size)
        _write(f, 0, shard.header)
        for name, offset in sorted(shard.offsets.items(), key=lambda item: item[1]):
            _write(f, offset, _tensor_bytes(specs[name], read(name), dtype))


def plan_shards(
    specs: Iterable[TensorSpec],
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    metadata: dict[str, str] | None = None,
) -> list[Shard]:
    """The files that `write_checkpoint` writes: names, headers, offsets. huggingface_hub divides them into shards."""
    # `split_torch_state_dict_into_shards` does the same, and imports torch's distributed tensors for each size.
    from huggingface_hub import split_state_dict_into_shards_factory
    from huggingface_hub.constants import SAFETENSORS_WEIGHTS_FILE_PATTERN

    meta = {s.name: torch.empty(s.shape, dtype=_disk_dtype(s, dtype), device="meta") for s in specs}
    try:
        split = split_state_dict_into_shards_factory(
            meta,
            get_storage_size=lambda tensor: tensor.numel() * tensor.dtype.itemsize,
            filename_pattern=SAFETENSORS_WEIGHTS_FILE_PATTERN,
            max_shard_size=max_shard_size,
        )
    except ValueError:  # the size cannot be parsed
        raise UserError(f"{str(max_shard_size)[:40]!r} is no size of a shard; give one such as 1GB or 500MB") from None
    shards = []
    for file, names in split.filename_to_tensors.items():
        # Wide dtypes first, as the safetensors library orders them: every tensor is then aligned to its item size.
        ordered = sorted(names, key=lambda n: -meta[n].dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **dict(sorted((metadata or {}).items()))}}
        offsets, end = {}, 0
        for name in ordered:
            tensor = meta[name]
            begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
            offsets[name] = begin
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        raw = len(raw).to_bytes(8, "little") + raw
        shards.append(Shard(file, raw, {n: len(raw) + o for n, o in offsets.items()}, len(raw) + end))
    return shards


def shard_index(shards: Sequence[Shard]) -> dict[str, Any]:
    """The content of model.safetensors.index.json: in which shard each tensor is."""
    weight_map = {name: shard.file for shard in shards for name in shard.offsets}
    total = sum(shard.size - len(shard.header) for shard in shards)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _disk_dtype(spec: TensorSpec, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype


def _tensor_bytes(spec: TensorSpec, tensor: Tensor, dtype: torch.dtype | None) -> memoryview:
    if tuple(tensor.shape) != spec.shape:
        raise UserError(f"tensor {spec.name!r} has shape {list(tensor.shape)}, the target needs {list(spec.shape)}")
    data = tensor.detach().to("cpu", _disk_dtype(spec, dtype)).contiguous()
    if not is_finite(data):
        raise NotFinite(f"tensor {spec.name!r} holds NaN or infinity as {data.dtype}; it cannot be an initial weight")
    return memoryview(data.reshape(-1).view(torch.uint8).numpy())


def _allocate(f: BinaryIO, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(f.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # of file systems that cannot allocate
                raise
    f.truncate(size)  # here, and on macOS and Windows, a full disk is noticed only when the bytes are written


def _write(f: BinaryIO, offset: int, data: bytes | memoryview) -> None:
    f.seek(offset)
    view = memoryview(data)
    while view:  # a raw write may write less (2 GiB at a time on Linux)
        view = view[f.write(view) :]


def _config_with_dtype(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    if dtype is None:
        return config
    return {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": str(dtype).removeprefix("torch.")}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
