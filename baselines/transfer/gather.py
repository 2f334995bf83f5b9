"""The tensors of a target, gathered from one donor by index maps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from baselines.transfer.index_maps import AxisMap, IndexMaps, map_part
from baselines.transfer.index_rules import number_new_rows, rope_index
from baselines.transfer.matching import DonorParts, has_unknown_axes, norms_before_head
from baselines.transfer.sizes import metadata_pair
from baselines.transfer.vocabulary import VocabularyRows
from zoo.donors.donor import Donor
from zoo.parallel.threads import make_in_order
from zoo.sampler import wanted_specs
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata, Part, TensorSpec, join_parts, split_parts


def fixed_maps(donor: Donor, blueprint: Blueprint, rows: VocabularyRows) -> dict[str, Any]:
    """The maps that no method decides: vocabulary, positions, coordinates within a head, experts."""
    source, target = metadata_pair(donor, blueprint)
    return {
        "vocab": AxisMap(number_new_rows(rows.index, source.vocab)),
        "tokens": rows.row_map,
        "position": _position_map(_position_rows(donor.blueprint), _position_rows(blueprint)),
        "head_dim": AxisMap(rope_index(source.head_dim, target.head_dim, source.rotary, target.rotary)),
        "experts": tuple(i * source.experts // target.experts for i in range(target.experts)),
    }


def gather_tensors(
    donor: Donor,
    blueprint: Blueprint,
    maps_of: Callable[[str], IndexMaps],
    seed: int,
    method: str,
    copy_head: bool = False,
    only: Collection[str] | None = None,
    device: str = "cpu",
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every tensor of the target that the donor has, on the CPU, in float32 or the donor's float64.

    A tensor comes from the donor's tensor of the same name, with layer and expert mapped. A tensor with unknown axes is
    copied whole, in the donor's dtype, where it has the donor's shape; otherwise it is left out.

    maps_of: the maps for the tensor of a name; the same maps for all names keep the hidden spaces coupled. method: its
    name, for the random streams of what the donor lacks. copy_head: whether a donor without a head gives a copy of its
    embedding; otherwise the head is left out. only: the names that are wanted. device: where rows are gathered and
    drawn. Each thread (`zoo.parallel.threads`) has one tensor of the donor in memory at a time, in the dtype on disk.
    """
    source, (metadata, _) = DonorParts(donor.blueprint, blueprint, copy_head), metadata_pair(donor, blueprint)
    tied_norms = norms_before_head(blueprint) if blueprint.ties else []
    latest = threading.local()  # the donor's latest tensor: targets with other fused parts read it several times

    def read_parts(spec: TensorSpec) -> dict[str, Tensor]:
        if getattr(latest, "name", None) != spec.name:
            latest.name, latest.parts = spec.name, split_parts(spec, _movable(donor.read(spec.name)).to(device))
        return latest.parts

    def make(spec: TensorSpec) -> Tensor | None:
        maps = maps_of(spec.name)
        layer = None if spec.layer is None or spec.layer >= len(maps.layers) else maps.layers[spec.layer]
        expert = None if spec.expert is None or spec.expert >= len(maps.experts) else maps.experts[spec.expert]
        if has_unknown_axes(spec):
            found = source.find_unknown(spec, layer, expert)
            keeps = found is not None and _keeps_places(maps, metadata, spec.layer if layer is not None else None)
            return donor.read(found.name) if found is not None and keeps else None
        matches = [source.find(spec, part, layer, expert) for part in spec.parts]
        if spec.role == "head" and matches == [None]:
            return None
        parts = {}
        generator = stream(seed, f"{method}/free/{spec.name}", device)
        for part, match in zip(spec.parts, matches, strict=True):
            assert match is not None, spec.name  # `donor_choice.mismatches` refuses such a donor
            donor_spec, donor_part = match
            matrix = read_parts(donor_spec)[donor_part.role]
            part_maps = _with_positions(maps, donor_part, part)
            matrix = _append_new_rows(matrix, part, part_maps, stream(seed, f"{method}/{spec.name}", device))
            mapped = map_part(matrix, part, part_maps, spec.layer, spec.expert is not None, spec.kind, generator)
            parts[part.role] = mapped
        tensor = join_parts(spec, parts).cpu()
        if spec.name in tied_norms:
            return _scale_final_norm(tensor, spec, blueprint, maps)
        kept = {matrix.untyped_storage().data_ptr() for matrix in latest.parts.values()}
        return tensor.clone() if tensor.untyped_storage().data_ptr() in kept else tensor

    yield from make_in_order(wanted_specs(blueprint, only), make)


def _movable(tensor: Tensor) -> Tensor:
    """The tensor, as float32 where it has a dtype that torch cannot gather (float8)."""
    return tensor if tensor.is_floating_point() and tensor.dtype.itemsize > 1 else tensor.float()


def copy_tensors(
    donor: Donor, blueprint: Blueprint, only: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every tensor of a target with the donor's own tensors, by name and in the donor's dtype.

    only: the names that are wanted.
    """
    for spec in wanted_specs(blueprint, only):
        yield spec.name, donor.read(spec.name)


def _scale_final_norm(tensor: Tensor, spec: TensorSpec, blueprint: Blueprint, maps: IndexMaps) -> Tensor:
    """The final norm with the scale of the head's columns, which a tied head cannot take itself."""
    residual = maps.residual
    scale = torch.as_tensor(residual.read_scale, dtype=torch.float64) / residual.write_scale / maps.embed_scale
    if residual.free is not None:  # nothing is written there, so that any gain would do
        scale = torch.where(residual.free, scale[~residual.free].mean(), scale)
    scale = scale.to(tensor.dtype)
    offset = blueprint.offset(spec)
    return (tensor + offset) * scale - offset


def _append_new_rows(matrix: Tensor, part: Part, maps: IndexMaps, generator: torch.Generator) -> Tensor:
    """The donor's matrix with rows appended for the tokens or positions that it lacks.

    New rows are normal, with the mean and standard deviation of each column, but for tokens that are composed.
    """
    if part.axes[0] not in ("vocab", "position"):
        return matrix
    index = maps.axis(part.axes[0], None).index
    n_new = int(index.max()) + 1 - len(matrix)
    if n_new <= 0:
        return matrix
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    draws = torch.randn(n_new, *matrix.shape[1:], generator=generator, device=generator.device).to(matrix.device)
    rows = matrix.mean(0) + matrix.std(0, correction=0) * draws
    if part.axes[0] == "vocab" and maps.tokens is not None:
        rows = maps.tokens.fill_composed(rows, matrix, index[maps.tokens.composed] - len(matrix))
    return torch.cat([matrix, rows])


def _keeps_places(maps: IndexMaps, source: Metadata, layer: int | None) -> bool:
    """Whether no space that keeps its size changes the places of its coordinates.

    A tensor with unknown axes and the donor's shape then means the same in the target. layer: of the target.
    """
    spaces = [(maps.residual, source.width), (maps.vocab, source.vocab), (maps.head_dim, source.head_dim)]
    if layer is not None:
        heads, kv_heads = source.heads * source.head_dim, source.kv_heads * source.head_dim
        spaces += [(maps.heads[layer], heads), (maps.kv_heads[layer], kv_heads), (maps.ffn[layer], source.ffn)]
    return all(len(m.index) != size or torch.equal(m.index, torch.arange(size)) for m, size in spaces)


def _with_positions(maps: IndexMaps, donor_part: Part, part: Part) -> IndexMaps:
    """The maps with the positions of this table: encoder and decoder may have tables of different lengths."""
    if part.axes[0] != "position" or len(maps.position.index) == part.shape[0]:
        return maps
    return replace(maps, position=_position_map(donor_part.shape[0], part.shape[0]))


def _position_map(n_source: int, n_target: int) -> AxisMap:
    """The map of a table of positions: each row in its place, then new rows."""
    positions = torch.arange(n_target)
    positions[n_source:] = -1
    return AxisMap(number_new_rows(positions, n_source))


def _position_rows(blueprint: Blueprint) -> int:
    """Rows of the table of learned positions (OPT's has two more than its config says), 0 for none."""
    tables = [part.shape[0] for _, part in blueprint.find("embed") if part.axes[0] == "position"]
    return tables[0] if tables else 0
