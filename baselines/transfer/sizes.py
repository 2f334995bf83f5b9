"""The sizes of a donor and a target, axis by axis."""

from __future__ import annotations

from zoo.donors.donor import Donor
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata


def metadata_pair(donor: Donor, blueprint: Blueprint) -> tuple[Metadata, Metadata]:
    """The metadata of a donor and of a target. `donor_choice.mismatches` refuses models without metadata earlier."""
    source, target = donor.blueprint.metadata, blueprint.metadata
    assert source is not None and target is not None
    return source, target


def axis_sizes(source: Metadata, target: Metadata) -> list[tuple[str, int, int]]:
    """[(axis, donor's size, target's size)] of every axis."""
    pairs = [(name, getattr(source, name), getattr(target, name)) for name in ("layers", "width", "ffn", "head_dim")]
    pairs += [("kv_heads", source.kv_heads, target.kv_heads)]
    pairs += [("heads per KV head", heads_per_kv_head(source), heads_per_kv_head(target))]
    pairs += [("positions", source.positions, target.positions), ("experts", source.experts, target.experts)]
    pairs += [("expert ffn", expert_ffn_size(source), expert_ffn_size(target))]
    pairs += [("shared ffn", shared_ffn_size(source), shared_ffn_size(target))]
    return [*pairs, ("vocab", source.vocab, target.vocab)]


def heads_per_kv_head(metadata: Metadata) -> int:
    """The number of query heads that share a KV head, 0 without attention."""
    return metadata.heads // metadata.kv_heads if metadata.kv_heads else 0


def describe_changes(source: Metadata, target: Metadata) -> str:
    """The axes that change, as text: 'width 64 -> 96, layers 5 -> 8'."""
    changed = [(axis, n_source, n_target) for axis, n_source, n_target in axis_sizes(source, target)]
    return ", ".join(f"{axis} {a} -> {b}" for axis, a, b in changed if a != b) or "same shape"


def ffn_size(metadata: Metadata) -> int:
    """The number of neurons of a dense MLP."""
    return metadata.ffn


def expert_ffn_size(metadata: Metadata) -> int:
    """The number of neurons of one expert, 0 without experts."""
    return int(str(metadata.extra.get("expert_ffn", metadata.ffn))) if metadata.experts else 0


def shared_ffn_size(metadata: Metadata) -> int:
    """The number of neurons of the MLP that every token uses beside its experts, 0 without one."""
    return int(str(metadata.extra.get("shared_ffn", 0)))


def changes_alibi_heads(source: Metadata, target: Metadata) -> bool:
    """Whether a donor with ALiBi gets another number of heads."""
    return bool(source.extra.get("alibi")) and target.heads != source.heads
