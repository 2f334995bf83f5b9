"""The tensors of a target, gathered from one donor by index maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from baselines.transfer.index_maps import AxisMap, IndexMaps, map_part
from baselines.transfer.index_rules import number_new_rows, rope_index
from baselines.transfer.sizes import metadata_pair, rotary_dim
from baselines.transfer.vocabulary import VocabularyRows
from zoo.donors.donor import Donor
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Part, TensorSpec, join_parts, split_parts

PartKey = tuple[str, str, str, str | None, int | None, int | None]


def fixed_maps(donor: Donor, blueprint: Blueprint, rows: VocabularyRows) -> dict[str, Any]:
    """The maps that no method decides: vocabulary, positions, coordinates within a head, experts."""
    source, target = metadata_pair(donor, blueprint)
    positions = torch.arange(_position_rows(blueprint))
    positions[_position_rows(donor.blueprint) :] = -1
    return {
        "vocab": AxisMap(number_new_rows(rows.index, source.vocab)),
        "position": AxisMap(number_new_rows(positions, _position_rows(donor.blueprint))),
        "head_dim": AxisMap(rope_index(source.head_dim, target.head_dim, rotary_dim(source))),
        "experts": tuple(i * source.experts // target.experts for i in range(target.experts)),
    }


def gather_tensors(
    donor: Donor, blueprint: Blueprint, maps_of: Callable[[str], IndexMaps], seed: int, method: str
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every tensor of the target whose role is known, in float32 (float64 where the donor's is).

    maps_of: the maps for the tensor of a name; the same maps for all names keep the hidden spaces coupled. method: its
    name, for the random streams of what the donor lacks. One tensor of the donor is in memory at a time.
    """
    source = {_part_key(spec, part): (spec, part) for spec in donor.blueprint.specs for part in spec.parts}
    cache: dict[str, dict[str, Tensor]] = {}

    def read_parts(spec: TensorSpec) -> dict[str, Tensor]:
        if spec.name not in cache:
            cache.clear()
            cache[spec.name] = split_parts(spec, donor.read(spec.name, torch.promote_types(spec.dtype, torch.float32)))
        return cache[spec.name]

    for spec in blueprint.specs:
        if any("other" in part.axes for part in spec.parts):
            continue
        maps = maps_of(spec.name)
        parts = {}
        generator = stream(seed, f"{method}/free/{spec.name}")
        for part in spec.parts:
            layer = None if spec.layer is None else maps.layers[spec.layer]
            expert = None if spec.expert is None else maps.experts[spec.expert]
            key = _part_key(spec, part, layer, expert)
            if part.role == "head" and key not in source:  # a donor with a tied head
                key = _embedding_key(donor.blueprint)
            donor_spec, donor_part = source[key]
            matrix = read_parts(donor_spec)[donor_part.role]
            matrix = _append_new_rows(matrix, part, maps, stream(seed, f"{method}/{spec.name}"))
            parts[part.role] = map_part(matrix, part, maps, spec.layer, spec.expert is not None, spec.kind, generator)
        tensor = join_parts(spec, parts)
        if spec.role == "norm" and spec.site == "final" and blueprint.ties:
            tensor = _scale_final_norm(tensor, spec, blueprint, maps)
        yield spec.name, tensor


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

    New rows are normal, with the mean and standard deviation of each column.
    """
    if part.axes[0] not in ("vocab", "position"):
        return matrix
    index = maps.axis(part.axes[0], None).index
    n_new = max(0, int(index.max()) + 1 - len(matrix))
    draws = torch.randn(n_new, *matrix.shape[1:], generator=generator)
    return torch.cat([matrix, matrix.mean(0) + matrix.std(0, correction=0) * draws])


def _part_key(spec: TensorSpec, part: Part, layer: int | None = None, expert: int | None = None) -> PartKey:
    """What identifies a part in models of all sizes. `layer` and `expert`, where given, replace the spec's own."""
    return (
        part.role,
        part.axes[0],
        spec.kind,
        spec.site,
        spec.layer if layer is None else layer,
        spec.expert if expert is None else expert,
    )


def _embedding_key(blueprint: Blueprint) -> PartKey:
    return next(_part_key(spec, part) for spec, part in blueprint.find("embed") if part.axes[0] == "vocab")


def _position_rows(blueprint: Blueprint) -> int:
    """Rows of the table of learned positions (OPT's has two more than its config says), 0 for none."""
    tables = [part.shape[0] for _, part in blueprint.find("embed") if part.axes[0] == "position"]
    return tables[0] if tables else 0
