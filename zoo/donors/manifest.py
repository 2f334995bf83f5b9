"""The manifest of a zoo: one row per tensor, in Parquet, the same bytes for the same donors."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from zoo.checkpoints.checkpoint import Checkpoint, finite
from zoo.checkpoints.headers import Entry
from zoo.errors import UserError

MANIFEST = "manifest.parquet"
ROWS = "tensors.parquet"  # one donor's part of it, inside the donor's folder
CHUNK = 1 << 24  # bytes of a tensor in memory at a time

SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("revision", pa.string()),
        ("license", pa.string()),
        ("tensor", pa.string()),
        ("role", pa.string()),
        ("layer", pa.int32()),
        ("shape", pa.list_(pa.int64())),
        ("dtype", pa.string()),
        ("file", pa.string()),
        ("offset", pa.int64()),
        ("nbytes", pa.int64()),
        ("sha256", pa.string()),
        ("mean", pa.float64()),
        ("std", pa.float64()),
        ("kurtosis", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Measure:
    """Of one tensor: the hash of its bytes, and its moments over all values in float64 (std with divisor n; kurtosis
    plain, 3 for a normal; None where there is no spread or no value)."""

    sha256: str
    mean: float | None
    std: float | None
    kurtosis: float | None


def measure(checkpoint: Checkpoint, entry: Entry) -> Measure:
    """Two passes over the tensor, CHUNK bytes in memory. UserError where a value is NaN or infinite."""
    digest, total, count = hashlib.sha256(), 0.0, 0
    for raw, values in _chunks(checkpoint.folder / entry.file, entry):
        digest.update(raw)
        if not finite(values):
            raise UserError(f"{checkpoint.folder}: tensor {entry.name!r} holds NaN or infinity; use another checkpoint")
        total += values.double().sum().item()
        count += values.numel()
    if not count:
        return Measure(digest.hexdigest(), None, None, None)
    mean, second, fourth = total / count, 0.0, 0.0
    for _, values in _chunks(checkpoint.folder / entry.file, entry):
        square = (values.double() - mean).square_()
        second += square.sum().item()
        fourth += square.square_().sum().item()
    variance = second / count
    # Overflow needs values beyond 1e77, which only float64 holds; then there is no kurtosis to speak of.
    kurtosis = fourth / count / variance**2 if 0 < variance < 1e150 and math.isfinite(fourth) else None
    return Measure(digest.hexdigest(), mean, math.sqrt(variance), kurtosis)


def rows(checkpoint: Checkpoint, model: str, revision: str, license: str, measures: dict[str, Measure]) -> pa.Table:
    """The donor's part of the manifest, in the order of files and offsets. A tensor that the blueprint does not know
    has the role `other`."""
    blueprint = checkpoint.blueprint
    specs = {checkpoint.entry(s.name).name: s for s in blueprint.specs}
    # A tied tensor that is stored all the same has the role of its name, not of its twin: the head of `lm_head`.
    found = []
    for entry in sorted(checkpoint.entries.values(), key=lambda e: (e.file, e.offset, e.name)):
        spec = specs.get(entry.name)
        found.append(
            {
                "model": model,
                "revision": revision,
                "license": license,
                "tensor": entry.name,
                "role": spec.role if spec else "head" if entry.name in blueprint.ties else "other",
                "layer": spec.layer if spec else None,
                "shape": entry.shape,
                "dtype": str(entry.dtype).removeprefix("torch."),
                "file": entry.file,
                "offset": entry.offset,
                "nbytes": entry.nbytes,
                **asdict(measures[entry.name]),
            }
        )
    return pa.Table.from_pylist(found, schema=SCHEMA)


def write_rows(path: Path, table: pa.Table) -> None:
    """Atomically; a file that already says the same is left alone."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _write(table, temporary)
        if path.exists() and path.read_bytes() == temporary.read_bytes():
            temporary.unlink()
        else:
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_rows(path: Path) -> pa.Table:
    """UserError for what is no manifest."""
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such manifest; fill the zoo with `headstart zoo add` or `zoo train`") from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable manifest; remove it and run `headstart zoo add` again") from error
    if table.schema != SCHEMA:
        raise UserError(f"{path}: is not a manifest of a zoo; give the folder of a zoo")
    return table


def joined(parts: Iterable[Path]) -> pa.Table:
    """The manifest that the donors' parts make, sorted by model."""
    tables = sorted((read_rows(p) for p in parts), key=lambda t: t["model"][0].as_py())
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


def intact(path: Path, parts: Iterable[Path]) -> bool:
    """Whether the manifest at `path` is the one that `parts` make: the same rows, and the same bytes too where it was
    written by the version of pyarrow that is here."""
    table = joined(parts)
    if not read_rows(path).equals(table):
        return False
    again = pa.BufferOutputStream()
    _write(table, again)
    data = again.getvalue()
    same_writer = pq.read_metadata(path).created_by == pq.read_metadata(pa.BufferReader(data)).created_by
    return not same_writer or path.read_bytes() == data.to_pybytes()


def _write(table: pa.Table, where: Path | pa.NativeFile) -> None:
    pq.write_table(table.combine_chunks(), where, compression="zstd")


def _chunks(path: Path, entry: Entry) -> Iterable[tuple[bytes, torch.Tensor]]:
    with path.open("rb") as f:
        f.seek(entry.offset)
        left = entry.nbytes
        while left:
            raw = f.read(min(CHUNK, left))
            if not raw:
                raise UserError(f"{path}: ends inside tensor {entry.name!r}; fetch the file again")
            left -= len(raw)
            yield raw, torch.frombuffer(bytearray(raw), dtype=entry.dtype)
