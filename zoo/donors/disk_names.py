"""The names that a checkpoint gives to the tensors of its blueprint, which may differ by a prefix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint

MOST_PREFIXES = 16  # of a checkpoint that are tried


def find_disk_names(
    blueprint: Blueprint, stored: Collection[str], ties: Mapping[str, str], where: str
) -> dict[str, str]:
    """Name in the blueprint -> name on disk, for the tensors that the checkpoint has under another name.

    A checkpoint saved from a base model lacks the prefix of the head model (`h.0…` for `transformer.h.0…`), or has it
    although the blueprint does not. One saved from a wrapped model has the wrapper's prefix on every name (`module.` of
    DistributedDataParallel, `_orig_mod.` of torch.compile, `base_model.model.` of PEFT). Some checkpoints store the
    head of a tied pair instead of the embedding.

    stored: the names on disk. ties: tied name -> stored name, both ways of which are tried. UserError where two
    prefixes fit equally well.
    """
    missing = [name for name in blueprint.names if name not in stored]
    if not missing:
        return {}
    prefix, names = _prefixed_names(blueprint, missing, stored, where)
    twins = {**ties, **{stored_name: tied for tied, stored_name in ties.items()}}
    for name in missing:
        twin = twins.get(name)
        if name not in names and twin is not None and (prefix + twin in stored or twin in stored):
            names[name] = prefix + twin if prefix + twin in stored else twin
    return names


def _prefixed_names(
    blueprint: Blueprint, missing: list[str], stored: Collection[str], where: str
) -> tuple[str, dict[str, str]]:
    """(the prefix that the missing names have on disk, name -> name on disk); ("", {}) where no prefix fits."""
    candidates: list[tuple[str, dict[str, str]]] = []
    for removed, prefix in _possible_prefixes(blueprint, missing, stored):
        under = {name: prefix + name.removeprefix(removed) for name in missing}
        found = {name: on_disk for name, on_disk in under.items() if on_disk in stored}
        if 2 * len(found) >= len(missing) and all(found != names for _, names in candidates):
            candidates.append((prefix, found))
    if not candidates:
        return "", {}
    most = max(len(found) for _, found in candidates)
    best = [(prefix, found) for prefix, found in candidates if len(found) == most]
    if len(best) > 1:
        raise UserError(
            f"{where}: has {missing[0]!r} and others with the prefixes {best[0][0]!r} and {best[1][0]!r}, which are two"
            " models; keep the tensors of one"
        )
    return best[0]


def _possible_prefixes(blueprint: Blueprint, missing: list[str], stored: Collection[str]) -> Iterator[tuple[str, str]]:
    """(prefix to remove from a name of the blueprint, prefix to add) for the pairs that some missing name suggests.

    Only the first component of most names can be a base model's prefix. A prefix belongs to all names that it can
    belong to: where one of them is there without it, the missing ones are missing.
    """
    first = Counter(name.partition(".")[0] + "." for name in blueprint.names).most_common(1)[0][0]
    for removed in ("", first):
        if any(name in stored for name in blueprint.names if name.startswith(removed)):
            continue
        affected = [name.removeprefix(removed) for name in missing if name.startswith(removed)]
        ends = {affected[0], affected[len(affected) // 2], affected[-1]}
        prefixes = {
            name.removesuffix(end)
            for end in ends
            for name in stored
            if name.endswith(end) and (len(name) == len(end) or name[-len(end) - 1] == ".")
        }
        for prefix in sorted(prefixes, key=lambda p: (len(p), p))[:MOST_PREFIXES]:
            yield removed, prefix
