"""The manifest of a zoo: one row per tensor, in Parquet, the same bytes for the same donors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from zoo.checkpoints.atomic import remove_leftovers, replace_file
from zoo.checkpoints.files import is_bare_name, read_bytes
from zoo.donors.layout import MANIFEST
from zoo.donors.measures import Measure
from zoo.donors.model_checkpoint import ModelCheckpoint
from zoo.errors import UserError
from zoo.limits import MANIFEST_MEMORY, MANIFEST_SECONDS, MAX_MANIFEST, MAX_ROWS
from zoo.sandbox import Limits, library_errors, shared
from zoo.words import first_line

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


GGUF_COLUMN = "gguf_type"  # how the GGUF file that a donor comes from stored the tensor; only zoos with such donors
SCHEMA_WITH_GGUF = SCHEMA.append(pa.field(GGUF_COLUMN, pa.string()))
MEASURED = ("sha256", "mean", "std", "kurtosis")  # columns that a Measure has
NULLABLE = ("layer", "mean", "std", "kurtosis", GGUF_COLUMN)  # columns that may lack a value


def donor_rows(
    checkpoint: ModelCheckpoint,
    model: str,
    revision: str,
    license: str,
    measures: dict[str, Measure],
    types: Mapping[str, str] | None = None,
) -> pa.Table:
    """The manifest's rows of one donor, in the order of files and offsets.

    A tensor outside the blueprint has the role `other`. Scales of quantised weights have no row. types: of a donor that
    comes from GGUF, how the file stored each tensor.
    """
    blueprint = checkpoint.blueprint
    specs = {checkpoint.entry(s.name).name: s for s in blueprint.specs}
    # A tied tensor that is stored as well has the role of its own name, not of its twin: `lm_head` is a head.
    rows = []
    entries = [checkpoint.entries[name] for name in checkpoint.names]
    for entry in sorted(entries, key=lambda e: (e.file, e.offset, e.name)):
        spec = specs.get(entry.name)
        rows.append(
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
                **{column: getattr(measures[entry.name], column) for column in MEASURED},
                **({} if types is None else {GGUF_COLUMN: types.get(entry.name)}),
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA if types is None else SCHEMA_WITH_GGUF)


def renamed_rows(table: pa.Table, model: str) -> pa.Table:
    """The rows of one donor under another name, as `donor_rows` makes them."""
    schema = SCHEMA_WITH_GGUF if GGUF_COLUMN in table.column_names else SCHEMA
    return pa.Table.from_pylist([row | {"model": model} for row in table.to_pylist()], schema=schema)


def write_rows(path: Path, table: pa.Table) -> None:
    """Writes a manifest, or one donor's rows of it, atomically. A file with the same bytes is left alone."""
    data = _to_parquet(table)
    if path.exists() and path.read_bytes() == data:
        remove_leftovers(path)
    else:
        replace_file(path, data)


def read_manifest(zoo: Path) -> pa.Table:
    """The manifest of the zoo at `zoo`: one row per tensor, the columns of SCHEMA, and GGUF_COLUMN where a
    donor comes from GGUF. UserError as `read_rows`."""
    return read_rows(zoo / MANIFEST)


def read_rows(path: Path) -> pa.Table:
    """A manifest, or one donor's rows of it. UserError where the file is missing, damaged or something else.

    Parquet is decoded in a child process: a small file may describe any number of rows, and texts of any size.
    """
    if not path.exists():
        raise UserError(f"{path}: no such manifest; fill the zoo with `headstart zoo add` or `zoo train`")
    data = read_bytes(path, MAX_MANIFEST)
    advice = "remove it and run `headstart zoo add` again"
    try:
        limits = Limits(MANIFEST_SECONDS, MANIFEST_MEMORY)
        _, table_bytes = shared.call("read_parquet", {"rows": MAX_ROWS}, limits, "Parquet", data)
    except UserError as error:
        raise UserError(f"{path}: not a readable manifest ({first_line(error)}); {advice}") from error
    if len(table_bytes) > MAX_MANIFEST:
        raise UserError(f"{path}: takes {len(table_bytes)} bytes of memory, more than the {MAX_MANIFEST} allowed")
    with library_errors(str(path), advice):
        table = pa.ipc.open_stream(table_bytes).read_all()
    if table.schema not in (SCHEMA, SCHEMA_WITH_GGUF):
        raise UserError(f"{path}: is not the manifest of a zoo; give the folder of a zoo")
    _check_rows(table, path)
    return table


def _check_rows(table: pa.Table, path: Path) -> None:
    """UserError for rows that `donor_rows` does not write: without a value, or with paths out of the zoo."""
    advice = "remove it and run `headstart zoo add` again"
    empty = next((name for name in table.column_names if name not in NULLABLE and table[name].null_count), None)
    if empty is not None:
        raise UserError(f"{path}: has rows without {empty}; {advice}")
    for column in ("model", "file"):
        odd = next((name for name in pc.unique(table[column]).to_pylist() if not is_bare_name(name)), None)
        if odd is not None:
            raise UserError(f"{path}: has the {column} {odd!r:.60}, which is not a name without folders; {advice}")
    for column in ("offset", "nbytes"):
        if len(table) and pc.min(table[column]).as_py() < 0:
            raise UserError(f"{path}: has a negative {column}; {advice}")


def join_rows(parts: Iterable[Path]) -> pa.Table:
    """The manifest made from the files with the donors' rows, sorted by model."""
    tables = []
    for path in parts:
        tables.append(read_rows(path))
        if not len(tables[-1]):
            raise UserError(f"{path}: has no rows; remove the donor's folder and add it again")
    tables.sort(key=lambda table: table["model"][0].as_py())
    return pa.concat_tables(tables, promote_options="default") if tables else SCHEMA.empty_table()


def is_made_from(path: Path, parts: Iterable[Path]) -> bool:
    """Whether the manifest at `path` is the one made from `parts`.

    The rows must be equal, and also the bytes where the installed version of pyarrow wrote the manifest.
    """
    table = join_rows(parts)
    if not read_rows(path).equals(table):
        return False
    data = _to_parquet(table)
    with library_errors(str(path), "remove it and run `headstart zoo add` again"):
        same_writer = pq.read_metadata(path).created_by == pq.read_metadata(pa.BufferReader(data)).created_by
    return not same_writer or read_bytes(path, MAX_MANIFEST) == data


def _to_parquet(table: pa.Table) -> bytes:
    stream = pa.BufferOutputStream()
    pq.write_table(table.combine_chunks(), stream, compression="zstd")
    return stream.getvalue().to_pybytes()
