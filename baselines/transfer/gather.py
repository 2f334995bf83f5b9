"""The tensors of a target, gathered from one donor by index maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from baselines.transfer.index_maps import AxisMap, IndexMaps, index_new_rows, map_part, rope_index
from baselines.transfer.sizes import rotary_dim
from baselines.transfer.vocabulary import VocabularyRows
from zoo.donors.donor import Donor
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Part, TensorSpec, join, split


def fixed_maps(donor: Donor, blueprint: Blueprint, rows: VocabularyRows) -> dict[str, Any]:
    """The maps that no method decides: vocabulary, positions, coordinates within a head, experts."""
    source, target = donor.blueprint.metadata, blueprint.metadata
    assert source is not None and target is not None
    positions = torch.arange(_position_rows(blueprint))
    positions[_position_rows(donor.blueprint) :] = -1
    return {
        "vocab": AxisMap(index_new_rows(rows.index, source.vocab)),
        "position": AxisMap(index_new_rows(positions, _position_rows(donor.blueprint))),
        "head_dim": AxisMap(rope_index(source.head_dim, target.head_dim, rotary_dim(source))),
        "experts": tuple(i * source.experts // target.experts for i in range(target.experts)),
    }


def gather_tensors(
    donor: Donor, blueprint: Blueprint, maps: Callable[[str], IndexMaps], seed: int, who: str
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor in float32) for every tensor of the target whose role is known; float64 where the donor is. maps:
    of a tensor's name, always the same one where the coordinates are coupled. One tensor of the donor is in memory at
    a time."""
    source = {_part_key(spec, part): (spec, part) for spec in donor.blueprint.specs for part in spec.parts}
    cache: dict[str, dict[str, Tensor]] = {}

    def read(spec: TensorSpec) -> dict[str, Tensor]:
        if spec.name not in cache:
            cache.clear()
            cache[spec.name] = split(spec, donor.read(spec.name, torch.promote_types(spec.dtype, torch.float32)))
        return cache[spec.name]

    for spec in blueprint.specs:
        if any("other" in part.axes for part in spec.parts):
            continue
        found = maps(spec.name)
        parts = {}
        generator = stream(seed, f"{who}/free/{spec.name}")
        for part in spec.parts:
            layer = None if spec.layer is None else found.layers[spec.layer]
            expert = None if spec.expert is None else found.experts[spec.expert]
            key = _part_key(spec, part, layer, expert)
            if part.role == "head" and key not in source:  # a tied donor: its head is its embedding
                key = _embedding_key(donor.blueprint)
            donor_spec, donor_part = source[key]
            matrix = _append_new_rows(read(donor_spec)[donor_part.role], part, found, f"{who}/{spec.name}", seed)
            parts[part.role] = map_part(matrix, part, found, spec.layer, spec.expert is not None, spec.kind, generator)
        tensor = join(spec, parts)
        if spec.role == "norm" and spec.site == "final" and blueprint.ties:
            tensor = _scale_final_norm(tensor, spec, blueprint, found)
        yield spec.name, tensor


def _scale_final_norm(tensor: Tensor, spec: TensorSpec, blueprint: Blueprint, maps: IndexMaps) -> Tensor:
    """A tied head cannot have its columns scaled without the embedding: the norm before it takes the scale."""
    assert blueprint.metadata is not None
    scale = torch.as_tensor(maps.residual.scale, dtype=torch.float64) / maps.residual.write / maps.embed_scale
    if maps.residual.free is not None:  # nothing is written there: any gain would do
        scale = torch.where(maps.residual.free, scale[~maps.residual.free].mean(), scale)
    scale = scale.to(tensor.dtype)
    one = blueprint.offset(spec)
    return (tensor + one) * scale - one


def _append_new_rows(matrix: Tensor, part: Part, maps: IndexMaps, name: str, seed: int) -> Tensor:
    """The donor's matrix with rows appended for the tokens or positions that it lacks: normal, with the mean and the
    standard deviation of its rows, coordinate by coordinate."""
    if part.axes[0] not in ("vocab", "position"):
        return matrix
    index = maps.axis(part.axes[0], None).index
    fresh = max(0, int(index.max()) + 1 - len(matrix))
    draws = torch.randn(fresh, *matrix.shape[1:], generator=stream(seed, name))
    return torch.cat([matrix, matrix.mean(0) + matrix.std(0, correction=0) * draws])


PartKey = tuple[str, str, str, str | None, int | None, int | None]


def _part_key(spec: TensorSpec, part: Part, layer: int | None = None, expert: int | None = None) -> PartKey:
    """What a part is, apart from its sizes; a layer or expert given replaces the spec's own."""
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
