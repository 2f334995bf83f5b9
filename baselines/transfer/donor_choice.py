"""Whether a donor fits a target, and which donor of a zoo a method uses. Reads configs and tokenizers, no weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from baselines.transfer.index_rules import rope_index
from baselines.transfer.matching import has_unknown_axes, name_pattern, same_tensors, stack_of, unmatched_tensors
from baselines.transfer.sizes import axis_sizes
from baselines.transfer.vocabulary import vocabulary_rows
from zoo.donors.donor import Donor, dissimilarity
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Part, TensorSpec
from zoo.vocabularies.build import DEFAULT_RULE
from zoo.vocabulary import read_vocabulary

log = logging.getLogger(__name__)

ExtraMismatches = Callable[[Donor, Blueprint], list[str]]


@dataclass(frozen=True)
class DonorRequest:
    """What a method asks of its donor."""

    method: str  # its name, for messages
    name: str | None = None  # of the donor; None: the nearest in size that fits
    tokenizer: str | None = None  # the target's
    vocabulary: str = DEFAULT_RULE  # the rule for tokens that a donor does not have
    allow_larger: bool = False  # whether an axis of the target may be larger than the donor's
    extra_mismatches: ExtraMismatches = lambda donor, blueprint: []  # the method's own reasons against a donor
    how_to_grow: str = ""  # advice for a target with a larger axis
    copies: bool = False  # whether it copies a donor of the target's own shape tensor by tensor, of any architecture


def choose_donor(zoo: Zoo | None, blueprint: Blueprint, request: DonorRequest) -> Donor:
    """The donor that is asked for by name, or of those that fit the nearest in size (ties by name).

    Donors with the target's tokenizer come first. Raises UserError where the donor (or none) fits; the message names
    the axis, both sizes, and the donors that would fit.
    """
    method, name = request.method, request.name
    if zoo is None:
        raise UserError(f"{method} needs a donor: give --zoo DIR, or --donor FOLDER")
    refused: list[tuple[bool, int, float, str]] = []
    fitting: list[tuple[bool, float, str]] = []
    for donor in [zoo.donor(name)] if name is not None else zoo.donors:
        other_architecture, distance = dissimilarity(donor, blueprint)
        reasons, same_tokenizer = _check_donor(donor, blueprint, request)
        if not reasons:
            fitting.append((not same_tokenizer, distance, donor.name))
        else:
            message = f"{method}: donor {donor.name!r} does not fit the target: {'; '.join(reasons)}"
            refused.append((other_architecture, len(reasons), distance, message))
    if not fitting:
        if not refused:
            raise UserError(f"{method} needs a donor and {zoo.path} holds none: fill it with `headstart zoo add`")
        raise UserError(_refusal(zoo, blueprint, request, [message for *_, message in sorted(refused)]))
    chosen = zoo.donor(min(fitting)[2])
    if name is None:
        log.info("%s: donor %s (%s parameters)", method, chosen.name, f"{chosen.parameters:,}")
    return chosen


def mismatches(donor: Donor, blueprint: Blueprint, allow_larger: bool) -> list[str]:
    """Why a donor cannot fill a target by index maps, with both sizes of an axis; empty where it can.

    allow_larger: whether an axis of the target may be larger than the donor's.
    """
    source, target = donor.blueprint.metadata, blueprint.metadata
    if source is None or target is None:
        return ["donor and target must both have a config"]
    donor_kinds, target_kinds = _tensor_kinds(donor.blueprint), _tensor_kinds(blueprint)
    if not target_kinds:
        return ["no tensor of the target has a known role"]
    for who, side in (("the donor", donor.blueprint), ("the target", blueprint)):
        assert side.metadata is not None
        if not side.metadata.kv_heads or not side.metadata.heads:
            return [f"{who} ({side.metadata.architecture}) has no attention heads"]
        if not has_uniform_layers(side) and not _same_layers(donor.blueprint, blueprint):
            return [f"{who} ({side.metadata.architecture}) has layers of several kinds; index maps need one kind"]
        if depths := _other_depths(side):
            sizes = ", ".join(f"{depth} in {stack}" for stack, depth in depths.items())
            return [
                f"{who} ({side.metadata.architecture}) has other numbers of layers ({sizes}) than its config's"
                f" {side.metadata.layers}: only a donor of the target's own shape can be copied"
            ]
    found = [f"the target has {role} and the donor has none" for role in sorted(target_kinds - donor_kinds)]
    found += [f"the donor has {role} and the target has none" for role in sorted(donor_kinds - target_kinds)]
    found += [] if found else unmatched_tensors(donor.blueprint, blueprint) or _fixed_sizes(donor.blueprint, blueprint)
    if source.norm != target.norm:
        found.append(f"the donor has {source.norm} norms and the target {target.norm} norms")
    if (source.rope_theta is None) != (target.rope_theta is None):
        found.append("only one of the two has rotary positions")
    elif source.head_dim != target.head_dim and (
        source.extra.get("rotary_differs") or target.extra.get("rotary_differs")
    ):
        found.append(f"the rotary positions of its layers differ, so head_dim {source.head_dim} cannot change")
    elif source.rotary.size * target.head_dim != target.rotary.size * source.head_dim:
        parts = [f"{m.rotary.size} of the {m.head_dim} coordinates of a head" for m in (source, target)]
        found.append(f"the rotary positions of the donor turn {parts[0]}, those of the target {parts[1]}")
    for axis, n_source, n_target in axis_sizes(source, target):
        if axis == "head_dim":
            try:
                rope_index(n_source, n_target, source.rotary, target.rotary)
            except UserError:
                advice = f"; use more heads of {n_source} instead" if n_target > n_source else ""
                found.append(f"head_dim {n_source} must be a whole multiple of the target's {n_target}{advice}")
        elif n_target > n_source and not allow_larger and axis not in ("layers", "vocab"):
            found.append(f"{axis} {n_source} is smaller than the target's {n_target}")
    return found


def _check_donor(donor: Donor, blueprint: Blueprint, request: DonorRequest) -> tuple[list[str], bool]:
    """(why a donor does not fit, whether it has the target's tokenizer)."""
    if request.copies and copies_by_name(donor, blueprint, request.tokenizer, request.vocabulary):
        return [], True
    reasons = mismatches(donor, blueprint, request.allow_larger) or request.extra_mismatches(donor, blueprint)
    if reasons:
        return reasons, False
    try:
        return [], vocabulary_rows(donor, blueprint, request.tokenizer, request.vocabulary).same_tokenizer
    except UserError as error:
        return [str(error)], False


def copies_by_name(donor: Donor, blueprint: Blueprint, tokenizer: str | None, rule: str = DEFAULT_RULE) -> bool:
    """Whether a target has exactly the donor's tensors, and its tokens are in the same rows."""
    if not same_tensors(donor, blueprint):
        return False
    if blueprint.metadata is None:
        return tokenizer is None or donor.vocabulary() in (None, read_vocabulary(tokenizer))
    try:
        rows = vocabulary_rows(donor, blueprint, tokenizer, rule).index
    except UserError:
        return False
    return torch.equal(rows, torch.arange(len(rows)))


def _refusal(zoo: Zoo, blueprint: Blueprint, request: DonorRequest, messages: list[str]) -> str:
    """The message where no donor fits. messages: one per donor, the most similar donor first."""
    others = f" ({len(messages)} donors, none fits)" if len(messages) > 1 else ""
    if request.name is not None:
        names = [donor.name for donor in zoo.donors if not _check_donor(donor, blueprint, request)[0]]
        others = f" (donors of this zoo that fit: {', '.join(names)})" if names else ""
    advice = ""
    if not request.allow_larger and "smaller than the target's" in messages[0]:
        advice = f"; a larger axis needs {request.how_to_grow}"
    return messages[0] + others + advice


def _tensor_kinds(blueprint: Blueprint) -> set[str]:
    """The kinds of tensors that a model has. The head is left out, because an embedding can serve as head."""
    found = set()
    for spec in blueprint.specs:
        for part in spec.parts:
            if not has_unknown_axes(spec) and (part.role, spec.kind) != ("head", "weight"):
                site = f" ({spec.site})" if spec.site else f" ({part.axes[0]})" if part.role == "embed" else ""
                experts = " per expert" if spec.expert is not None else ""
                experts = " beside the experts" if "shared_ffn" in part.axes else experts
                role = part.role if part.role != "other" else _name_of_other(spec, part)
                found.add(f"{role} {spec.kind}{site}{experts}")
    return found


def _name_of_other(spec: TensorSpec, part: Part) -> str:
    """What to call a part without a role whose axes are known."""
    return "router" if part.axes[0] == "experts" else name_pattern(spec).rpartition(".")[2]


def _fixed_sizes(donor: Blueprint, target: Blueprint) -> list[str]:
    """Why coordinates cannot keep their number and order: the first tensor in which it differs."""
    sizes = {(name_pattern(spec), spec.kind): spec.shape for spec in donor.specs}
    for spec in target.specs:
        for part in spec.parts:
            before = sizes.get((name_pattern(spec), spec.kind), spec.shape)
            for axis, n_source, n_target in zip(part.axes, before, spec.shape, strict=False):
                if axis == "fixed" and n_source != n_target:
                    name = name_pattern(spec).rpartition(".")[2]
                    return [f"{name} has {n_source} coordinates, not the target's {n_target}, and their number stays"]
    return []


def has_uniform_layers(blueprint: Blueprint) -> bool:
    """Whether all layers of a stack have the same tensors of known roles, of the same sizes."""
    if blueprint.metadata is not None and blueprint.metadata.layer_sizes:
        return False
    stacks: dict[str, set[frozenset[tuple[str, str, str]]]] = {}
    for (stack, _), kinds in _layer_kinds(blueprint).items():
        stacks.setdefault(stack, set()).add(frozenset(kinds))
    return all(len(kinds) == 1 for kinds in stacks.values())


def _same_layers(donor: Blueprint, target: Blueprint) -> bool:
    """Whether each layer has the kind of the donor's layer at its place (DeepSeek's first layers have no experts)."""
    assert donor.metadata is not None and target.metadata is not None
    sizes = donor.metadata.layer_sizes or target.metadata.layer_sizes
    return not sizes and _layer_kinds(donor) == _layer_kinds(target)


def _layer_kinds(blueprint: Blueprint) -> dict[tuple[str, int], set[tuple[str, str, str]]]:
    """(stack, layer) -> the tensors of known roles in it: (path in the layer, kind, role)."""
    kinds: dict[tuple[str, int], set[tuple[str, str, str]]] = {}
    for spec in blueprint.specs:
        if spec.layer is not None and spec.role != "other":
            stack, _, path = name_pattern(spec).partition("{L}")
            kinds.setdefault((stack, spec.layer), set()).add((path, spec.kind, spec.role))
    return kinds


def _other_depths(blueprint: Blueprint) -> dict[str, int]:
    """{stack: its depth} of an encoder-decoder whose stacks differ in depth; empty where all have one depth."""
    depths: dict[str, int] = {}
    for spec in blueprint.specs:
        if spec.layer is not None and not has_unknown_axes(spec):
            stack = stack_of(spec).strip(".")
            depths[stack] = max(depths.get(stack, 0), spec.layer + 1)
    assert blueprint.metadata is not None
    return depths if any(depth != blueprint.metadata.layers for depth in depths.values()) else {}
