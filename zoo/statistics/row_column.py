"""Tests whether the places of the weights matter: row-column statistics with permutation p-values (2408.08681).

In the mean-field picture, unit i of a hidden space has a latent variable, shared by the row that writes it and the
column that reads it: W_ij = f(xi_i, xi_j, noise). Then rows differ in energy, rows are correlated, and units that
are written strongly are read strongly. Entries in random places, as in an initialisation, show none of this."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.donors.donor import Donor
from zoo.streams import stream
from zoo.targets.roles import parse_name
from zoo.tensors import Metadata, Part, TensorSpec, split_parts

EnergyTable = dict[tuple[str, int | None, int | None], tuple[Tensor, Tensor]]  # role, layer, expert -> rows, columns

READER_ROLES = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")
WRITER_ROLES = ("attn.o", "mlp.down")
ENERGY_FLOOR = 1e-12  # times the mean energy, so that rows of zeros have a logarithm
MAX_SHUFFLED = 1 << 16  # Our choice: entries of a matrix that are shuffled; 262,144 take seconds for each matrix
ENTRIES_PER_BATCH = 1 << 20  # entries that are shuffled at once
VALUES_PER_CHUNK = 1 << 22  # values that are converted to float64 at a time


@dataclass(frozen=True)
class RowColumnSettings:
    """How matrices are compared with shuffles of their entries."""

    permutations: int = 199
    seed: int = 0
    device: str = "cpu"
    most: int = 512  # rows and columns of a matrix that are shuffled


def row_column_study(
    donor: Donor,
    permutations: int = 199,
    seed: int = 0,
    device: str = "cpu",
    most: int = 512,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Studies all matrices of a donor: {"tensors": one per matrix, "couplings": one per hidden space}, in JSON values.

    tensors    {tensor, role, layer, expert, row_spread, row_spread_null, row_spread_p, column_spread, …,
               row_correlation, …}: the standard deviation of the log-energy (sum of squares) of rows and columns, and
               the mean |correlation| of two rows. `_null` is the mean of the same number over shuffles of all entries,
               `_p` its p-value. The numbers depend on the size of the matrix, so compare them with their null. At most
               `most` random rows and columns count, and MAX_SHUFFLED entries. Kernels are [out, in * size]
    couplings  {layer, expert, space, a, b, correlation, p} and, of an encoder-decoder, {stack}: the correlation, over
               all units of a space, between the norm of what writes a unit and the norm of what reads it; p over
               permutations of the units, two-sided

    ffn          space of a block's neurons
    value        components of a KV head; the columns of o are added up over its query heads
    query-key    components of a KV head; the rows of q are added up over its query heads
    residual     what a layer or the embedding writes, and the next layer or the head reads; `layer` is the reader's,
                 None for the head; gains of norms do not count
    hidden       two consecutive matrices whose sizes match, for modules without a config

    p = (1 + number of shuffles that are at least as large) / (1 + permutations). Constant matrices and sides with
    equal norms are left out. One tensor is in memory at a time. progress is called with 1 for every tensor. Raises
    UserError for NaN and infinity."""
    settings = RowColumnSettings(permutations, seed, device, most)
    entries, energies = [], []
    for spec, part, matrix in iterate_matrices(donor, progress):
        entry, rows, columns = measure_matrix(spec, part, matrix, settings)
        energies.append((spec, part, rows, columns))
        if entry is not None:
            entries.append(entry)
    return {"tensors": entries, "couplings": measure_couplings(donor, energies, settings)}


def measure_matrix(
    spec: TensorSpec, part: Part, matrix: Tensor, settings: RowColumnSettings
) -> tuple[dict[str, Any] | None, Tensor, Tensor]:
    """The entry of a matrix [m, n] under "tensors" of `row_column_study`, None where it has none, and the energies
    (sums of squares) of its rows [m] and columns [n], float64."""
    rows, columns = energies_of_sides(matrix)
    name = f"row-column/{spec.name}/{part.role}"
    chosen = random_submatrix(matrix, shuffled_shape(matrix, settings.most), stream(settings.seed, f"{name}/cut"))
    chosen = chosen.to(settings.device, torch.float32)
    if min(chosen.shape) < 2 or chosen.min() == chosen.max():
        return None, rows, columns
    about = {"tensor": spec.name, "role": part.role, "layer": spec.layer, "expert": spec.expert}
    shuffles = stream(settings.seed, f"{name}/shuffles")
    return about | permutation_test(chosen, settings.permutations, shuffles), rows, columns


def energies_of_sides(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of squares of the rows [m] and columns [n] of a matrix [m, n], float64. A part of it is converted at a
    time."""
    rows, columns = [], torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for part in matrix.split(max(1, VALUES_PER_CHUNK // matrix.shape[1])):
        squares = part.double().square()
        rows.append(squares.sum(1))
        columns += squares.sum(0)
    return torch.cat(rows), columns


def measure_couplings(
    donor: Donor, energies: Sequence[tuple[TensorSpec, Part, Tensor, Tensor]], settings: RowColumnSettings
) -> list[dict[str, Any]]:
    """The entries under "couplings" of `row_column_study`. energies: those of rows and columns of all matrices, in the
    order of the donor's tensors."""
    stacks: dict[str, EnergyTable] = {}  # of an encoder-decoder two; "" holds what is in no layer
    line = [(spec.name, rows, columns) for spec, _, rows, columns in energies]  # for a module without a config
    for spec, part, rows, columns in energies:
        if "position" not in part.axes:
            stack = parse_name(spec.name)[0].partition("{L}")[0] if spec.layer is not None else ""
            stacks.setdefault(stack, {})[part.role, spec.layer, spec.expert] = (rows, columns)
    couplings = []
    for stack, pairs in _pairs_by_stack(donor, line, stacks):
        for layer, expert, space, a, b, writes, reads in pairs:
            generator = stream(settings.seed, f"row-column/{stack}{space}/{layer}/{expert}/{a}/{b}")
            found = coupling_test(writes.sqrt(), reads.sqrt(), settings.permutations, generator)
            if found is not None:
                about = {"layer": layer, "expert": expert, "space": space, "a": a, "b": b}
                about |= {"stack": stack} if stack else {}
                couplings.append(about | {"correlation": found[0], "p": found[1]})
    return couplings


def _pairs_by_stack(
    donor: Donor, line: list[tuple[str, Tensor, Tensor]], stacks: dict[str, EnergyTable]
) -> Iterator[tuple[str, Iterator[HiddenSpace]]]:
    """(name of a stack of layers, its hidden spaces); the name is empty where the model has one stack."""
    if donor.blueprint.metadata is None:
        yield "", _adjacent_pairs(line)
        return
    outer = stacks.pop("", {})
    for place, (stack, energies) in enumerate(stacks.items(), 1):
        is_last = place == len(stacks)  # only its output reaches the head
        shared = {key: value for key, value in outer.items() if is_last or key[0] != "head"}
        yield stack if len(stacks) > 1 else "", _hidden_spaces(donor, {**shared, **energies}, is_last)
    if not stacks:
        yield "", _hidden_spaces(donor, outer, True)


def iterate_matrices(
    donor: Donor, progress: Callable[[int], None] | None = None
) -> Iterator[tuple[TensorSpec, Part, Tensor]]:
    """Yields every matrix of a donor in torch's orientation and its dtype on disk, float32 if that has 8 bits.

    Kernels are flattened, fused tensors are split and read once. Integer tensors are not weights and are skipped."""
    for spec in donor.blueprint.specs:
        if len(spec.shape) > 1 and spec.numel and spec.dtype.is_floating_point:
            tensor = donor.read(spec.name)
            logical = split_parts(spec, tensor.float() if tensor.dtype.itemsize == 1 else tensor)
            for part in spec.parts:
                yield spec, part, logical[part.role].flatten(1)
        if progress is not None:
            progress(1)


def random_indices(
    shape: tuple[int, int], most: int | tuple[int, int], generator: torch.Generator
) -> tuple[Tensor | None, Tensor | None]:
    """The numbers of random rows and columns of a matrix, ascending. most: how many of both, or of each, at most. None
    where all are taken."""
    sizes = (most, most) if isinstance(most, int) else most
    rows, columns = (
        torch.randperm(size, generator=generator)[:limit].sort().values if size > limit else None
        for size, limit in zip(shape, sizes, strict=True)
    )
    return rows, columns


def random_submatrix(matrix: Tensor, most: int | tuple[int, int], generator: torch.Generator) -> Tensor:
    """Random rows and columns of a matrix, in their order. most: how many of both, or of each, at most."""
    for dim, index in enumerate(random_indices((matrix.shape[0], matrix.shape[1]), most, generator)):
        if index is not None:
            matrix = matrix.index_select(dim, index.to(matrix.device))
    return matrix


def shuffled_shape(matrix: Tensor, most: int) -> tuple[int, int]:
    """How many rows and columns are shuffled: at most `most` of each, and MAX_SHUFFLED entries."""
    rows, columns = (min(size, most) for size in matrix.shape)
    if rows * columns <= MAX_SHUFFLED:
        return rows, columns
    side = math.isqrt(MAX_SHUFFLED)
    if min(rows, columns) >= side:
        return side, side
    return (rows, MAX_SHUFFLED // rows) if rows < columns else (MAX_SHUFFLED // columns, columns)


def row_column_statistics(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> [n, 3]: spread of log row energy, of log column energy, mean |correlation| of rows."""
    m = matrices.shape[1]
    squares = matrices.square()
    energies = squares.sum(2), squares.sum(1)
    spreads = []
    for energy in energies:
        floor = ENERGY_FLOOR * energy.mean(1, keepdim=True)
        spreads.append(torch.maximum(energy, floor).log().std(1))
    rows = torch.nn.functional.normalize(matrices - matrices.mean(2, keepdim=True), dim=2)
    correlation = (rows @ rows.mT).abs_()
    off = correlation.sum((1, 2)) - correlation.diagonal(dim1=1, dim2=2).sum(1)
    return torch.stack([*spreads, off / (m * (m - 1))], dim=1)


def permutation_test(matrix: Tensor, permutations: int, generator: torch.Generator) -> dict[str, float]:
    """The three statistics of a matrix [m, n], their means over shuffles of its entries, and p-values.

    The shuffles are rotations of one random order of all entries. They form a subgroup of all shuffles, which is
    enough for an exact test, and a rotation is much cheaper than a new shuffle."""
    observed = row_column_statistics(matrix[None])[0]
    order = torch.randperm(matrix.numel(), generator=generator)
    rotations = torch.randint(matrix.numel(), (permutations,), generator=generator).tolist()
    place = order.argsort().to(matrix.device)
    line = matrix.flatten()[order.to(matrix.device)]
    size = max(1, ENTRIES_PER_BATCH // matrix.numel())
    null = torch.cat([
        row_column_statistics(_rotated(line, place, rotations[i : i + size]).view(-1, *matrix.shape))
        for i in range(0, permutations, size)
    ])  # fmt: skip
    p = (1 + (null >= observed).sum(0)) / (1 + permutations)
    means = null.double().mean(0)
    found: dict[str, float] = {}
    for i, name in enumerate(("row_spread", "column_spread", "row_correlation")):
        found |= {name: observed[i].item(), f"{name}_null": means[i].item(), f"{name}_p": p[i].item()}
    return found


def _rotated(line: Tensor, place: Tensor, rotations: Sequence[int]) -> Tensor:
    """[n] -> [rotations, n]: the line rotated by each number, at the places given."""
    twice, n = torch.cat([line, line]), len(line)
    if line.device.type != "cpu":
        return torch.stack([twice[n - t : 2 * n - t][place] for t in rotations])
    found = torch.empty(len(rotations), n, dtype=line.dtype)
    for row, t in zip(found.numpy(), rotations, strict=True):  # numpy gathers twice as fast
        np.take(twice.numpy()[n - t : 2 * n - t], place.numpy(), out=row, mode="clip")
    return found


def coupling_test(
    writes: Tensor, reads: Tensor, permutations: int, generator: torch.Generator
) -> tuple[float, float] | None:
    """Correlation of two vectors [n] with one number per unit, and its two-sided p-value over permutations of the
    units.

    None if one of them is constant."""
    a, b = (v.double() - v.double().mean() for v in (writes, reads))
    if not len(a) > 2 or a.norm() <= 1e-9 * writes.norm() or b.norm() <= 1e-9 * reads.norm():
        return None
    a, b = a / a.norm(), b / b.norm()
    observed = a @ b
    null = torch.stack([a[torch.randperm(len(a), generator=generator)] @ b for _ in range(permutations)])
    p = (1 + (null.abs() >= observed.abs() - 1e-12).sum().item()) / (1 + permutations)
    return observed.item(), p


# (layer, expert, space, writing role, reading role, energy written per unit, energy read per unit)
HiddenSpace = tuple[int | None, int | None, str, str, str, Tensor, Tensor]


def _hidden_spaces(donor: Donor, energies: EnergyTable, has_head: bool) -> Iterator[HiddenSpace]:
    """The hidden spaces of one stack of layers of a model with a config. has_head: whether the head reads it."""
    metadata = donor.blueprint.metadata
    assert metadata is not None
    for role, layer, expert in energies:
        if role == "mlp.down":
            for writer in ("mlp.gate", "mlp.up"):
                if (writer, layer, expert) in energies:
                    writes, reads = energies[writer, layer, expert][0], energies[role, layer, expert][1]
                    yield layer, expert, "ffn", writer, role, writes, reads
        key = ("attn.k" if role == "attn.q" else "attn.v", layer, expert)
        if role in ("attn.q", "attn.o") and key in energies:
            shared = energies[key][0]
            per_head = energies[role, layer, expert][0 if role == "attn.q" else 1]
            # The query heads of a KV group are adjacent: [groups, heads of a group, head_dim].
            sizes = metadata.at_layer(layer)
            grouped = per_head.view(sizes.kv_heads, -1, sizes.head_dim).sum(1).flatten()
            space = "query-key" if role == "attn.q" else "value"
            yield layer, expert, space, key[0], role, shared, grouped
    yield from _residual_spaces(metadata, energies, has_head)


def _residual_spaces(metadata: Metadata, energies: EnergyTable, has_head: bool) -> Iterator[HiddenSpace]:
    """The residual stream before each layer and before the head.

    Position 0 is written by the embedding and read by layer 0; position l is written by layer l - 1."""
    written: dict[int, dict[str, Tensor]] = {}
    read: dict[int, dict[str, Tensor]] = {}

    def add(side: dict[int, dict[str, Tensor]], position: int, role: str, energy: Tensor) -> None:
        if len(energy) == metadata.width:  # an embedding may have another width
            roles = side.setdefault(position, {})
            roles[role] = roles[role] + energy if role in roles else energy

    for (role, layer, _), (rows, columns) in energies.items():
        if role == "embed":
            add(written, 0, role, columns)
        if role == "head" or (role == "embed" and metadata.tied and has_head):
            add(read, metadata.layers, "head", columns)
        if role in WRITER_ROLES and layer is not None:
            add(written, layer + 1, role, rows)
        if role in READER_ROLES and layer is not None:
            add(read, layer, role, columns)
    for place in sorted(written.keys() & read.keys()):
        (a, writes), (b, reads) = (
            (" + ".join(roles), torch.stack(list(roles.values())).sum(0)) for roles in (written[place], read[place])
        )
        yield place if place < metadata.layers else None, None, "residual", a, b, writes, reads


def _adjacent_pairs(line: list[tuple[str, Tensor, Tensor]]) -> Iterator[HiddenSpace]:
    """Consecutive matrices whose sizes match, for a module without a config."""
    for (a, rows, _), (b, _, columns) in itertools.pairwise(line):
        if len(rows) == len(columns):
            yield None, None, "hidden", a, b, rows, columns
