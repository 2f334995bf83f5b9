"""Which tensor of a donor each tensor of a target comes from: the one of its own name, layer and expert mapped."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from baselines.transfer.sizes import axis_sizes
from zoo.donors.donor import Donor
from zoo.targets.blueprint import Blueprint
from zoo.targets.roles import parse_name
from zoo.tensors import Part, TensorSpec

# What a part does: role, first axis, kind, site, whether it lies in a layer, whether it belongs to an expert. Several
# tensors of a layer may do the same (self-attention of encoder and decoder, two norms of an unknown site), so that only
# the name tells them apart.
Purpose = tuple[str, str, str, str | None, bool, bool]
HEAD: Purpose = ("head", "vocab", "weight", None, False, False)


def name_pattern(spec: TensorSpec) -> str:
    """The name of a tensor with its layer and expert abstracted: 'model.layers.{L}.mlp.up_proj'."""
    return parse_name(spec.name)[0]


def stack_of(spec: TensorSpec) -> str:
    """The stack of layers that a tensor belongs to: 'model.layers.', or 'encoder.block.'; the whole path outside."""
    return name_pattern(spec).partition("{L}")[0]


def has_unknown_axes(spec: TensorSpec) -> bool:
    """Whether no index map can cut a tensor: its role or what its axes count is unknown, or it has no axis."""
    return any(not part.axes or "other" in part.axes for part in spec.parts)


def same_tensors(donor: Donor, blueprint: Blueprint) -> bool:
    """Whether donor and target are one architecture of one shape, so that each tensor is copied by its name."""
    source, target = donor.blueprint, blueprint
    if source.config is None or target.config is None:
        return False
    if source.config.get("model_type") != target.config.get("model_type") or source.ties != target.ties:
        return False
    if {spec.name: spec.shape for spec in source.specs} != {spec.name: spec.shape for spec in target.specs}:
        return False
    a, b = source.metadata, target.metadata
    if a is None or b is None:  # without its sizes, only the whole config shows what the tensors mean
        return a is b and _settings(source.config) == _settings(target.config)
    same_sizes = all(n_source == n_target for _, n_source, n_target in axis_sizes(a, b))
    return same_sizes and a.norm == b.norm and (a.rope_theta is None) == (b.rope_theta is None)


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config, but for those that do not change what its tensors mean."""
    ignored = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
    return {key: value for key, value in config.items() if key not in ignored}


def norms_before_head(blueprint: Blueprint) -> list[str]:
    """The names of the gains and shifts of the final norm, of an encoder-decoder the decoder's."""
    found = [spec.name for spec in blueprint.specs if spec.role == "norm" and spec.site == "final"]
    return [name for name in found if "encoder" not in name.split(".")] or found


class DonorParts:
    """The parts of a donor, found by what a target's part does and by its name."""

    def __init__(self, donor: Blueprint, target: Blueprint, copy_head: bool = False) -> None:
        """copy_head: whether the embedding of a donor without a head serves as head."""
        self._parts = {_address(spec, part): (spec, part) for spec in donor.specs for part in spec.parts}
        self._unknown = {
            (name_pattern(spec), spec.kind, spec.layer, spec.expert): spec
            for spec in donor.specs
            if has_unknown_axes(spec)
        }
        self._tied_head = _tied_head(donor) if donor.has_head or copy_head else None
        self._patterns, self.mismatches = _match_patterns(_purposes(donor), _purposes(target))

    def find(
        self, spec: TensorSpec, part: Part, layer: int | None, expert: int | None
    ) -> tuple[TensorSpec, Part] | None:
        """The donor's tensor and part for a part of the target, None where the donor does not have it.

        layer, expert: the donor's, for the layer and expert of the target's tensor.
        """
        purpose = _purpose(spec, part)
        pattern = self._patterns.get((purpose, name_pattern(spec)))
        if pattern is None:
            return self._tied_head if purpose == HEAD else None
        return self._parts.get((pattern, spec.kind, part.role, layer, expert))

    def find_unknown(self, spec: TensorSpec, layer: int | None, expert: int | None) -> TensorSpec | None:
        """The donor's tensor of the same name and shape for a tensor with unknown axes, None where it has none."""
        found = self._unknown.get((name_pattern(spec), spec.kind, layer, expert))
        return found if found is not None and found.shape == spec.shape else None


def unmatched_tensors(donor: Blueprint, target: Blueprint) -> list[str]:
    """Why the tensors of a target cannot be told apart among the donor's: one line each, empty where they can."""
    return DonorParts(donor, target).mismatches


def drawn_tensors(donor: Blueprint, target: Blueprint) -> list[str]:
    """The tensors of a target with unknown axes that are not copied whole: the donor has none of the same shape.

    In a layer of a deeper target, the donor's last layer stands for those that it does not have.
    """
    source = DonorParts(donor, target)
    last = max((spec.layer for spec in donor.specs if spec.layer is not None), default=None)
    drawn = []
    for spec in target.specs:
        if has_unknown_axes(spec):
            layer = spec.layer if last is None or spec.layer is None else min(spec.layer, last)
            if source.find_unknown(spec, layer, spec.expert) is None:
                drawn.append(spec.name)
    return drawn


def _address(spec: TensorSpec, part: Part) -> tuple[str, str, str, int | None, int | None]:
    return name_pattern(spec), spec.kind, part.role, spec.layer, spec.expert


def _purpose(spec: TensorSpec, part: Part) -> Purpose:
    return part.role, part.axes[0], spec.kind, spec.site, spec.layer is not None, spec.expert is not None


def _purposes(blueprint: Blueprint) -> dict[Purpose, list[str]]:
    """Purpose -> the patterns of the names of the tensors that serve it, in the model's order."""
    found: dict[Purpose, dict[str, None]] = defaultdict(dict)
    for spec in blueprint.specs:
        if not has_unknown_axes(spec):
            for part in spec.parts:
                found[_purpose(spec, part)][name_pattern(spec)] = None
    return {purpose: list(patterns) for purpose, patterns in found.items()}


def _match_patterns(
    donor: dict[Purpose, list[str]], target: dict[Purpose, list[str]]
) -> tuple[dict[tuple[Purpose, str], str], list[str]]:
    """({(purpose, target's pattern): donor's pattern}, why patterns have no match).

    A pattern matches itself, or itself with or without its first component, or where only one tensor serves the purpose
    on either side, that one.
    """
    matches: dict[tuple[Purpose, str], str] = {}
    problems = []
    for purpose, patterns in target.items():
        candidates = donor.get(purpose, [])
        if not candidates:
            if purpose != HEAD:
                problems.append(f"the donor has no tensor with the axes of the target's {patterns[0]}")
            continue
        found = {pattern: _same_name(pattern, candidates) for pattern in patterns}
        if len(candidates) == len(patterns) == 1:
            found = {patterns[0]: candidates[0]}
        missing = next((pattern for pattern, match in found.items() if match is None), None)
        if missing is not None or len(candidates) != len(patterns):
            role = f"{purpose[0]} {purpose[2]}"
            problems.append(
                f"the donor has {len(candidates)} tensors that serve as {role} ({candidates[0]}) and the target"
                f" {len(patterns)} ({missing or patterns[0]}), and their names do not match"
            )
        matches |= {(purpose, pattern): match for pattern, match in found.items() if match is not None}
    return matches, problems


def _same_name(pattern: str, candidates: list[str]) -> str | None:
    """The candidate that equals a pattern, with or without the first component of either; None where none does."""
    if pattern in candidates:
        return pattern
    bare = [c for c in candidates if c.partition(".")[2] == pattern or pattern.partition(".")[2] == c]
    return bare[0] if len(bare) == 1 else None


def _tied_head(donor: Blueprint) -> tuple[TensorSpec, Part] | None:
    """The embedding that a donor without a head of its own uses as head: the tied one, else the token embedding."""
    tables = {spec.name: (spec, part) for spec, part in donor.find("embed") if part.axes[0] == "vocab"}
    tied = next((tables[stored] for stored in donor.ties.values() if stored in tables), None)
    return tied or next(iter(tables.values()), None)
