"""From a method's name and settings to the tensors of a target."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zoo.checkpoints.hub import with_retries
from zoo.donors.store import Zoo
from zoo.errors import UserError, unknown
from zoo.targets.blueprint import Blueprint
from zoo.targets.configs import with_head

if TYPE_CHECKING:
    from zoo.sampler import Sampler

log = logging.getLogger(__name__)


def language_model_blueprint(target: str | Path | dict[str, Any]) -> Blueprint:
    """The blueprint of a config, with a head that predicts tokens. UserError where there is none of its kind."""
    blueprint = Blueprint.from_config(target)
    assert blueprint.config is not None
    config = with_head(blueprint.config, "config" if isinstance(target, dict) else str(target))
    return blueprint if config == blueprint.config else Blueprint.from_config(config)


def build_sampler(cls: type[Sampler], settings: Sequence[str] = (), **given: Any) -> Sampler:
    """An instance of a sampler from KEY=VALUE settings and from `given`, of which only the fields that the class
    has, and that are not None, are used. Raises UserError for an unknown key or a value of the wrong type."""
    fields = option_fields(cls)
    options = {key: value for key, value in given.items() if key in fields and value is not None}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write it as KEY=VALUE")
        if key not in fields:
            raise unknown(f"option of {cls.name}", key, fields)
        options[key] = _parse_setting(cls.name, key, value, str(fields[key].type))
    return cls(**options)


def option_fields(cls: type[Sampler]) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


def _parse_setting(method: str, key: str, value: str, kind: str) -> Any:
    """A value of the annotated type `kind`: bool, int, float or str, or one of them `| None`."""
    if "None" in kind and value.lower() in ("none", ""):
        return None
    kind = kind.replace("| None", "").strip()
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    try:
        if kind == "bool":
            return words[value.lower()]
        return {"int": int, "float": float}.get(kind, str)(value)
    except (KeyError, ValueError):
        raise UserError(f"--set {key}={value}: {method} wants a {kind} there") from None


def fit_sampler(sampler: Sampler, source: Zoo | None, blueprint: Blueprint) -> None:
    """`sampler.fit`; a trained model that is a hub id is fetched there."""
    model = getattr(sampler, "model", None)
    if model is None or Path(model).exists():
        sampler.fit(source, blueprint)
    else:
        with_retries(lambda: sampler.fit(source, blueprint), f"--model {model}")


def sample_with_defaults(
    sampler: Sampler, blueprint: Blueprint, seed: int, counts: dict[str, int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the blueprint, one at a time: what the fitted sampler yields, then the architecture's default
    initialisation for what it leaves out. `counts` is told how many are `sampled` and `defaulted`."""
    from baselines.schemes.default import Default

    counts = {} if counts is None else counts
    left = dict.fromkeys(blueprint.names)
    for name, tensor in sampler.sample(blueprint, seed):
        left.pop(name, None)
        yield name, tensor
    counts["sampled"], counts["defaulted"] = len(blueprint.names) - len(left), len(left)
    if left:
        log.info(
            "%d of %d tensors keep the default initialisation: %s", len(left), len(blueprint.names), _first_few(left)
        )
    if blueprint.unknown:
        log.info(
            "no method but the default models %d tensors, whose role is unknown: %s",
            len(blueprint.unknown),
            _first_few(blueprint.unknown),
        )
    yield from Default().fill(blueprint, left, seed)


def _first_few(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
