"""Bounds on the numbers, lists and texts of a config.json, checked before transformers builds anything of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.nn.modules import module

from zoo.errors import UserError
from zoo.limits import (
    MAX_CONFIG_LIST,
    MAX_CONFIG_NUMBER,
    MAX_CONFIG_SIZE,
    MAX_EXPERTS,
    MAX_LABELS,
    MAX_LAYERS,
    MAX_NESTING,
)

COUNTS = (
    (re.compile(r"(layers?|blocks|depths?|repeats)$"), MAX_LAYERS),
    (re.compile(r"experts$"), MAX_EXPERTS),
    (re.compile(r"^num_labels$"), MAX_LABELS),
    # Numbers that nothing is built of: token ids, the base of a rotary embedding, windows, lengths of texts.
    (
        re.compile(r"(theta|base|seed|window|_ids?|length|len|limit|factor|scale|beta|alpha|version)$"),
        MAX_CONFIG_NUMBER,
    ),
)


def check_bounds(data: Mapping[str, Any], where: str) -> None:
    """UserError where a config asks for a model that takes minutes or gigabytes to build, whatever its architecture."""
    for path, value in _values(data, "", MAX_NESTING):
        key = path.rpartition(".")[2]
        if isinstance(value, Mapping | list):
            most = MAX_LABELS if isinstance(value, Mapping) else MAX_CONFIG_LIST
            if len(value) > most:
                raise UserError(f"{where}: {path} has {len(value)} entries, more than the {most} allowed")
        elif isinstance(value, int) and not isinstance(value, bool):
            most = next((most for pattern, most in COUNTS if pattern.search(key)), MAX_CONFIG_SIZE)
            if abs(value) > most:
                raise UserError(
                    f"{where}: {path} is {value}, more than the {most} allowed; check it for a typing error"
                )


@contextmanager
def limited_modules(most: int, where: str) -> Iterator[None]:
    """While it is open, UserError where more than `most` modules, parameters and buffers are built."""
    count = 0

    def count_one(owner: Any, name: str, value: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise UserError(f"{where}: its numbers give more than {most} modules; check them for a typing error")

    hooks = (
        module.register_module_module_registration_hook,
        module.register_module_parameter_registration_hook,
        module.register_module_buffer_registration_hook,
    )
    handles = [hook(count_one) for hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _values(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """(key, value) of everything in a config, with the keys that lead there. An item of a list has the list's key."""
    if path:
        yield path, value
    if depth == 0:
        return
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _values(inner, f"{path}.{key}" if path else str(key), depth - 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner, path, depth - 1)
