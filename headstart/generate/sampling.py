"""From a method's name and settings to the tensors of a target."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zoo.errors import UserError, unknown
from zoo.options import type_name
from zoo.targets.blueprint import Blueprint
from zoo.targets.configs import with_language_head
from zoo.words import shortened_list

if TYPE_CHECKING:
    from zoo.sampler import Sampler

log = logging.getLogger(__name__)


def language_model_blueprint(target: str | Path | dict[str, Any]) -> Blueprint:
    """The blueprint of a config as a language model. Raises UserError for a kind of model that predicts no tokens."""
    blueprint = Blueprint.from_config(target)
    assert blueprint.config is not None
    config = with_language_head(blueprint.config, "config" if isinstance(target, dict) else str(target))
    return blueprint if config == blueprint.config else Blueprint.from_config(config)


def build_sampler(cls: type[Sampler], settings: Mapping[str, str] | None = None, **given: Any) -> Sampler:
    """A sampler with `settings` (option -> text of its value) and `given` (option -> value). Of `given`, options that
    the class does not have and values of None are ignored. Raises UserError for an unknown setting or a wrong type."""
    fields = option_fields(cls)
    options = {key: value for key, value in given.items() if key in fields and value is not None}
    for key, value in (settings or {}).items():
        if key not in fields:
            raise unknown(f"option of {cls.name}", key, fields)
        options[key] = _parse_setting(cls.name, key, value, type_name(fields[key]))
    return cls(**options)


def option_fields(cls: type[Sampler]) -> dict[str, dataclasses.Field[Any]]:
    """The fields that the constructor of a sampler takes, by name."""
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


def _parse_setting(method: str, key: str, value: str, kind: str) -> Any:
    """A value of the annotated type `kind`: bool, int, float or str, each maybe with `| None`."""
    if "None" in kind and value.lower() in ("none", ""):
        return None
    kind = kind.replace("| None", "").strip()
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    try:
        if kind == "bool":
            return words[value.lower()]
        return {"int": int, "float": float}.get(kind, str)(value)
    except (KeyError, ValueError):
        raise UserError(f"--set {key}={value}: give {method} a {kind}") from None


def sample_with_defaults(
    sampler: Sampler, blueprint: Blueprint, seed: int, defaulted: list[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the blueprint that is in `sampler.only`, one at a time: first those of the fitted sampler, then
    the architecture's default initialisation for the rest. Adds the names of the rest to `defaulted`."""
    from baselines.schemes.default import Default

    only = sampler.only
    left = dict.fromkeys(name for name in blueprint.names if only is None or name in only)
    for name, tensor in sampler.sample(blueprint, seed):
        if only is None or name in only:
            left.pop(name, None)
            yield name, tensor
    if defaulted is not None:
        defaulted += left
    yield from Default(device=sampler.device).fill(blueprint, left, seed)


def log_defaulted(blueprint: Blueprint, names: Collection[str]) -> None:
    """Says which tensors keep the default initialisation."""
    defaulted = set(names)
    left = [name for name in blueprint.names if name in defaulted]
    if left:
        log.info(
            "%d of %d tensors keep the default initialisation: %s",
            len(left),
            len(blueprint.names),
            shortened_list(left, 3),
        )
    if unknown := [name for name in blueprint.unknown if name in defaulted]:
        log.info(
            "%d tensors have an unknown role and keep the default initialisation: %s",
            len(unknown),
            shortened_list(unknown, 3),
        )
