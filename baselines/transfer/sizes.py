"""The sizes of a donor and a target, axis by axis."""

from __future__ import annotations

from zoo.donors.donor import Donor
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata


def axis_sizes(source: Metadata, target: Metadata) -> list[tuple[str, int, int]]:
    """[(axis, donor's size, target's size)]."""
    pairs = [(name, getattr(source, name), getattr(target, name)) for name in ("layers", "width", "ffn", "head_dim")]
    pairs += [("kv_heads", source.kv_heads, target.kv_heads)]
    pairs += [("heads per KV head", source.heads // source.kv_heads, target.heads // target.kv_heads)]
    pairs += [("positions", source.positions, target.positions), ("experts", source.experts, target.experts)]
    pairs += [("expert ffn", expert_ffn_size(source), expert_ffn_size(target))]
    return [*pairs, ("vocab", source.vocab, target.vocab)]


def expert_ffn_size(metadata: Metadata) -> int:
    """The hidden size of an expert, 0 without experts."""
    return int(str(metadata.extra.get("expert_ffn", metadata.ffn))) if metadata.experts else 0


def rotary_dim(metadata: Metadata) -> int:
    """How many coordinates of a head are rotated."""
    return 0 if metadata.rope_theta is None else int(str(metadata.extra.get("rotary_dim", metadata.head_dim)))


def metadata_pair(donor: Donor, blueprint: Blueprint) -> tuple[Metadata, Metadata]:
    """The metadata of a donor and of a target, which `mismatches` has checked to be there."""
    source, target = donor.blueprint.metadata, blueprint.metadata
    assert source is not None and target is not None
    return source, target
