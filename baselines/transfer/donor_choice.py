"""Whether a donor fits a target, and which donor of a zoo is used."""

from __future__ import annotations

import logging
from collections.abc import Callable

from baselines.transfer.index_maps import rope_index
from baselines.transfer.sizes import axis_sizes, rotary_dim
from baselines.transfer.vocabulary import vocabulary_rows
from zoo.donors.donor import Donor, dissimilarity
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint

log = logging.getLogger(__name__)


def mismatches(donor: Donor, blueprint: Blueprint, wider: bool) -> list[str]:
    """Why a donor cannot fill a target, axis by axis with both sizes; empty where it can. wider: whether an axis of
    the target may be larger than the donor's. Reads configs only."""
    source, target = donor.blueprint.metadata, blueprint.metadata
    if source is None or target is None:
        return ["index maps need a config on both sides"]
    found = []
    here, there = _tensor_kinds(donor.blueprint), _tensor_kinds(blueprint)
    if not there:
        return ["no tensor of the target has a known role"]
    for who, side in (("the donor", donor.blueprint), ("the target", blueprint)):
        assert side.metadata is not None
        if not side.metadata.kv_heads or not side.metadata.heads:
            return [f"{who} ({side.metadata.architecture}) has no attention heads"]
        if not _has_uniform_layers(side):
            return [f"{who}'s layers are not all of one kind ({side.metadata.architecture}): maps go by depth alone"]
    found += [f"the target has {role} and the donor has none" for role in sorted(there - here)]
    found += [f"the donor has {role} and the target has none" for role in sorted(here - there)]
    if source.norm != target.norm:
        found.append(f"the donor has {source.norm} norms and the target {target.norm} norms")
    if (source.rope_theta is None) != (target.rope_theta is None):
        found.append("one of the two has rotary positions and the other has none")
    for axis, t, s in axis_sizes(source, target):
        if axis == "head_dim":
            try:
                rope_index(t, s, rotary_dim(source))
            except UserError:
                more = f": heads do not grow, take more of {t}" if s > t else ""
                found.append(f"head_dim {t} is no whole multiple of the target's {s}{more}")
        elif s > t and not wider and axis not in ("layers", "vocab"):
            found.append(f"{axis} {t} is smaller than the target's {s}")
    return found


ExtraMismatches = Callable[["Donor", Blueprint], list[str]]


def choose_donor(
    zoo: Zoo | None,
    blueprint: Blueprint,
    name: str | None,
    tokenizer: str | None,
    wider: bool,
    who: str,
    refuses: ExtraMismatches = lambda donor, blueprint: [],
    grow: str = "the method row-column or net2wider",
) -> Donor:
    """The donor called `name`, or of those that fit the one nearest in size, with the same tokenizer if there is one
    (ties by name). refuses: a method's own reasons; grow: what a larger axis needs. Raises UserError where it (or none)
    fits, saying which axis and which sizes, and which other donors would do."""
    if zoo is None:
        raise UserError(f"{who} needs a donor: give --zoo DIR, or --donor FOLDER")
    refused: list[tuple[bool, int, float, str]] = []
    fitting: list[tuple[bool, float, str]] = []
    for donor in [zoo.donor(name)] if name is not None else zoo.donors:
        other, distance = dissimilarity(donor, blueprint)
        found, same = _check_donor(donor, blueprint, tokenizer, wider, refuses)
        if not found:
            fitting.append((not same, distance, donor.name))
        else:
            why = f"{who}: donor {donor.name!r} does not fit the target: {'; '.join(found)}"
            refused.append((other, len(found), distance, why))
    if not fitting:
        if not refused:
            raise UserError(f"{who} needs a donor and {zoo.path} holds none: fill it with `headstart zoo add`")
        message = min(refused)[-1]
        others = f" ({len(refused)} donors, none fits)" if len(refused) > 1 else ""
        if name is not None:
            do = [d.name for d in zoo.donors if not _check_donor(d, blueprint, tokenizer, wider, refuses)[0]]
            others = f" (of this zoo would do: {', '.join(do)})" if do else ""
        wish = "" if wider else f"; a larger axis needs {grow}"
        raise UserError(message + others + (wish if "smaller than the target's" in message else ""))
    chosen = zoo.donor(min(fitting)[2])
    if name is None:
        log.info("%s: donor %s (%s parameters)", who, chosen.name, f"{chosen.parameters:,}")
    return chosen


def _check_donor(
    donor: Donor, blueprint: Blueprint, tokenizer: str | None, wider: bool, refuses: ExtraMismatches
) -> tuple[list[str], bool]:
    """(why a donor does not fit, whether it has the target's tokenizer)."""
    found = mismatches(donor, blueprint, wider) or refuses(donor, blueprint)
    if found:
        return found, False
    try:
        return [], vocabulary_rows(donor, blueprint, tokenizer).same
    except UserError as error:
        return [str(error)], False


def _tensor_kinds(blueprint: Blueprint) -> set[str]:
    """What kinds of tensors a model has; head and embedding are interchangeable, so the head does not count."""
    found = set()
    for spec in blueprint.specs:
        for part in spec.parts:
            if "other" not in part.axes and (part.role, spec.kind) != ("head", "weight"):
                site = f" ({spec.site})" if spec.site else f" ({part.axes[0]})" if part.role == "embed" else ""
                experts = " per expert" if spec.expert is not None else ""
                found.add(f"{part.role} {spec.kind}{site}{experts}")
    return found


def _has_uniform_layers(blueprint: Blueprint) -> bool:
    """Whether every layer has the same kinds of tensors."""
    kinds: dict[int, set[tuple[str, str, str | None, bool]]] = {}
    for spec in blueprint.specs:
        if spec.layer is not None and spec.role != "other":
            kinds.setdefault(spec.layer, set()).add((spec.role, spec.kind, spec.site, spec.expert is not None))
    return len({frozenset(kind) for kind in kinds.values()}) <= 1
