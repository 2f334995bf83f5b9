"""Do the places of the weights matter? Row-column statistics of a checkpoint, with permutation p-values (2408.08681).

In the mean-field picture unit i of a hidden space has a latent of its own, which the row that writes it and the column
that reads it share: W_ij = f(xi_i, xi_j, noise). Then rows differ in energy, rows are correlated, and what writes a
unit strongly is read strongly. Entries in random places, as an initialisation draws them, know none of this.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.donors.donor import Donor
from zoo.streams import stream
from zoo.tensors import Metadata, Part, TensorSpec, split_parts

EnergyTable = dict[tuple[str, int | None, int | None], tuple[Tensor, Tensor]]  # role, layer, expert -> rows, columns

READER_ROLES = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")
WRITER_ROLES = ("attn.o", "mlp.down")
ENERGY_FLOOR = 1e-12  # of the mean energy: rows of zeros have a logarithm too
ENTRIES_PER_BATCH = 1 << 20  # entries that are shuffled at once


def row_column_study(
    donor: Donor,
    permutations: int = 199,
    seed: int = 0,
    device: str = "cpu",
    most: int = 512,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """{"tensors": one per matrix, "couplings": one per hidden space}; JSON throughout.

    tensors    {tensor, role, layer, expert, row_spread, row_spread_null, row_spread_p, column_spread, ..., and
               row_correlation, ...}: the standard deviation of the log energy (sum of squares) of rows and of columns,
               and the mean |correlation| of two rows. `_null` is the mean of the same number, and `_p` its p-value,
               over shuffles of all entries. Of a matrix with more than `most` rows or columns, that many at random are
               looked at: the numbers depend on the size (the spread of n normal entries is about sqrt(2 / n)), so
               compare them with their null. Kernels of convolutions count as [out, in * size]
    couplings  {layer, expert, space, a, b, correlation, p}: the correlation, over the units of a space, of the norm of
               what writes a unit and the norm of what reads it; p over permutations of the units, two-sided. All
               units count. Spaces: `ffn`; `value` (o's columns of the query heads of a KV group together);
               `query-key` (rows of k, and of q of its group together); `residual` (what a layer, or the embedding,
               writes, and what the next layer, or the head, reads; `layer` is the reader's, None for the head; gains
               of norms are not counted in); `hidden`, for modules without a config: two matrices that follow each
               other and fit

    p = (1 + how many are at least as large) / (1 + permutations): under the null it is at most u with probability at
    most u. A constant matrix has nothing to shuffle, and a side of equal norms nothing to correlate: they are left
    out. One tensor is in memory at a time. progress is called with 1 for every tensor. Raises UserError for NaN and
    infinity."""
    tensors: list[dict[str, Any]] = []
    energies: EnergyTable = {}
    line: list[tuple[str, Tensor, Tensor]] = []  # of a module without config: its matrices in order
    for spec, part, matrix in iterate_matrices(donor, progress):
        rows, columns = (torch.linalg.vector_norm(matrix, dim=d, dtype=torch.float64) ** 2 for d in (1, 0))
        if "position" not in part.axes:
            energies[part.role, spec.layer, spec.expert] = (rows, columns)
        line.append((spec.name, rows, columns))
        name = f"row-column/{spec.name}/{part.role}"
        entries = random_submatrix(matrix, most, stream(seed, f"{name}/cut")).to(device, torch.float32)
        if min(entries.shape) > 1 and entries.min() < entries.max():
            about = {"tensor": spec.name, "role": part.role, "layer": spec.layer, "expert": spec.expert}
            tensors.append(about | permutation_test(entries, permutations, stream(seed, f"{name}/shuffles")))
    couplings = []
    pairs = _adjacent_pairs(line) if donor.blueprint.metadata is None else _hidden_spaces(donor, energies)
    for layer, expert, space, a, b, writes, reads in pairs:
        generator = stream(seed, f"row-column/{space}/{layer}/{expert}/{a}/{b}")
        if (found := coupling_test(writes.sqrt(), reads.sqrt(), permutations, generator)) is not None:
            about = {"layer": layer, "expert": expert, "space": space, "a": a, "b": b}
            couplings.append(about | {"correlation": found[0], "p": found[1]})
    return {"tensors": tensors, "couplings": couplings}


def iterate_matrices(
    donor: Donor, progress: Callable[[int], None] | None = None
) -> Iterator[tuple[TensorSpec, Part, Tensor]]:
    """Every matrix of a donor, in torch's orientation and the dtype on disk (float32 for one of 8 bits); kernels
    flattened, fused tensors split and read once. Integers are no weights and left out."""
    for spec in donor.blueprint.specs:
        if len(spec.shape) > 1 and spec.numel and spec.dtype.is_floating_point:
            tensor = donor.read(spec.name)
            logical = split_parts(spec, tensor.float() if tensor.dtype.itemsize == 1 else tensor)
            for part in spec.parts:
                yield spec, part, logical[part.role].flatten(1)
        if progress is not None:
            progress(1)


def random_submatrix(matrix: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most `most` random rows and columns of a matrix, in their order."""
    for dim in (0, 1):
        if matrix.shape[dim] > most:
            index = torch.randperm(matrix.shape[dim], generator=generator)[:most].sort().values
            matrix = matrix.index_select(dim, index.to(matrix.device))
    return matrix


def row_column_statistics(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> [n, 3]: spread of log row energy, of log column energy, mean |correlation| of rows."""
    spreads = []
    for dim in (2, 1):
        energy = matrices.square().sum(dim)
        floor = ENERGY_FLOOR * energy.mean(1, keepdim=True)
        spreads.append(torch.maximum(energy, floor).log().std(1))
    rows = torch.nn.functional.normalize(matrices - matrices.mean(2, keepdim=True), dim=2)
    correlation = rows @ rows.mT
    m = matrices.shape[1]
    off = correlation.abs().sum((1, 2)) - correlation.diagonal(dim1=1, dim2=2).abs().sum(1)
    return torch.stack([*spreads, off / (m * (m - 1))], dim=1)


def permutation_test(matrix: Tensor, permutations: int, generator: torch.Generator) -> dict[str, float]:
    """The three statistics of a matrix [m, n], their means over shuffles of its entries, and p-values.

    The shuffles are drawn from the rotations of one random order of all entries. That is a subgroup of all shuffles,
    which is all that an exact test needs, and a rotation costs much less than a shuffle from scratch."""
    observed = row_column_statistics(matrix[None])[0]
    order = torch.randperm(matrix.numel(), generator=generator)
    turns = torch.randint(matrix.numel(), (permutations,), generator=generator).tolist()
    place = order.argsort().to(matrix.device)
    line = matrix.flatten()[order.to(matrix.device)]
    size = max(1, ENTRIES_PER_BATCH // matrix.numel())
    null = torch.cat([
        row_column_statistics(torch.stack([line.roll(t)[place].view_as(matrix) for t in turns[i : i + size]]))
        for i in range(0, permutations, size)
    ])  # fmt: skip
    p = (1 + (null >= observed).sum(0)) / (1 + permutations)
    means = null.double().mean(0)
    found: dict[str, float] = {}
    for i, name in enumerate(("row_spread", "column_spread", "row_correlation")):
        found |= {name: observed[i].item(), f"{name}_null": means[i].item(), f"{name}_p": p[i].item()}
    return found


def coupling_test(
    writes: Tensor, reads: Tensor, permutations: int, generator: torch.Generator
) -> tuple[float, float] | None:
    """Two vectors [n] of a number per unit -> their correlation and its two-sided p-value over permutations of the
    units. None where one of them has no spread."""
    a, b = (v.double() - v.double().mean() for v in (writes, reads))
    if not len(a) > 2 or a.norm() <= 1e-9 * writes.norm() or b.norm() <= 1e-9 * reads.norm():
        return None
    a, b = a / a.norm(), b / b.norm()
    observed = a @ b
    null = torch.stack([a[torch.randperm(len(a), generator=generator)] @ b for _ in range(permutations)])
    p = (1 + (null.abs() >= observed.abs() - 1e-12).sum().item()) / (1 + permutations)
    return observed.item(), p


# layer, expert, space, what writes, what reads, and their energies per unit
HiddenSpace = tuple[int | None, int | None, str, str, str, Tensor, Tensor]


def _hidden_spaces(donor: Donor, energies: EnergyTable) -> Iterator[HiddenSpace]:
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
            of_head = energies[role, layer, expert][0 if role == "attn.q" else 1]
            # The query heads of a KV group lie next to each other: [groups, heads of a group, head_dim].
            grouped = of_head.view(metadata.kv_heads, -1, metadata.head_dim).sum(1).flatten()
            space = "query-key" if role == "attn.q" else "value"
            yield layer, expert, space, key[0], role, shared, grouped
    yield from _residual_spaces(metadata, energies)


def _residual_spaces(metadata: Metadata, energies: EnergyTable) -> Iterator[HiddenSpace]:
    """Place 0 of the stream is what the embedding writes and layer 0 reads, place l what layer l - 1 writes."""
    written: dict[int, dict[str, Tensor]] = {}
    read: dict[int, dict[str, Tensor]] = {}

    def count(place: dict[int, dict[str, Tensor]], at: int, role: str, energy: Tensor) -> None:
        if len(energy) == metadata.width:  # an embedding may have a width of its own
            found = place.setdefault(at, {})
            found[role] = found[role] + energy if role in found else energy

    for (role, layer, _), (rows, columns) in energies.items():
        if role == "embed":
            count(written, 0, role, columns)
        if role == "head" or (role == "embed" and metadata.tied):
            count(read, metadata.layers, "head", columns)
        if role in WRITER_ROLES and layer is not None:
            count(written, layer + 1, role, rows)
        if role in READER_ROLES and layer is not None:
            count(read, layer, role, columns)
    for place in sorted(written.keys() & read.keys()):
        (a, writes), (b, reads) = (
            (" + ".join(roles), torch.stack(list(roles.values())).sum(0)) for roles in (written[place], read[place])
        )
        yield place if place < metadata.layers else None, None, "residual", a, b, writes, reads


def _adjacent_pairs(line: list[tuple[str, Tensor, Tensor]]) -> Iterator[HiddenSpace]:
    for (a, rows, _), (b, _, columns) in itertools.pairwise(line):
        if len(rows) == len(columns):
            yield None, None, "hidden", a, b, rows, columns
