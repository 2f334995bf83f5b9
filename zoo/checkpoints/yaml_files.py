"""YAML from outside, with bounds on what its aliases stand for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zoo.errors import UserError
from zoo.limits import MAX_NESTING, MAX_YAML_VALUES


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, plain values only. UserError, about `where`, for one that is not valid, has a key twice
    or more than MAX_NESTING levels, or has more than MAX_YAML_VALUES values when its aliases are written out."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_size(yaml, text, loader)
        return yaml.load(text, Loader=loader)
    except Exception as error:  # PyYAML raises errors of many types for values such as `!!int ""`
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{where}: is neither YAML nor JSON ({reason}); correct it") from error


@dataclass
class _Collection:
    """A list or mapping that is being read."""

    anchor: str | None
    is_mapping: bool
    values: int = 1  # in it, itself included, with its aliases written out
    items: int = 0  # directly in it: of a mapping keys and values in turn
    keys: set[str] = field(default_factory=set)


def _check_size(yaml: Any, text: str, loader: Any) -> None:
    """ValueError for YAML beyond the bounds, found from the parser's events, which build nothing."""
    anchors: dict[str, int] = {}
    open_collections = [_Collection(None, False)]
    for event in yaml.parse(text, Loader=loader):
        inner = open_collections[-1]
        if isinstance(event, yaml.CollectionStartEvent):
            open_collections.append(_Collection(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            if len(open_collections) > MAX_NESTING:
                raise ValueError(f"more than {MAX_NESTING} levels of lists and mappings")
            continue
        if isinstance(event, yaml.ScalarEvent):
            size, anchor = 1, event.anchor
            if inner.is_mapping and inner.items % 2 == 0:
                if event.value in inner.keys and event.value != "<<":
                    raise ValueError(f"the key {event.value[:60]!r} comes twice")
                inner.keys.add(event.value)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:  # also a value that contains itself
                raise ValueError(f"the alias {event.anchor[:60]!r} stands for nothing that comes before it")
            size, anchor = anchors[event.anchor], None
        elif isinstance(event, yaml.CollectionEndEvent):
            size, anchor = inner.values, inner.anchor
            open_collections.pop()
        else:
            continue
        if anchor is not None:
            anchors[anchor] = size
        outer = open_collections[-1]
        outer.values += size
        outer.items += 1
        if outer.values > MAX_YAML_VALUES:
            raise ValueError(f"more than {MAX_YAML_VALUES} values, with its aliases written out")
