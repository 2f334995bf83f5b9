"""Options: dataclass fields with a help text and bounds, shared by the methods and by the commands."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from zoo.limits import LEAST_INTEGER, MOST_INTEGER


def option(default: Any = dataclasses.MISSING, help: str = "", **bounds: float) -> Any:
    """A dataclass field that the user sets.

    bounds: `least`, `most` (inclusive) or `above` (exclusive), for a number or for each number of a tuple.
    """
    return dataclasses.field(default=default, metadata={"help": help, **bounds})


def type_name(field: dataclasses.Field[Any]) -> str:
    """The type of a field as it is written in code ("float", "int | None"), with postponed annotations or without."""
    return field.type.__name__ if isinstance(field.type, type) else str(field.type)


def bounds_problem(field: dataclasses.Field[Any], value: Any) -> str | None:
    """What the value of a field should be ("at least 1"), None where it is within the field's bounds."""
    if isinstance(value, tuple):
        return next((problem for item in value if (problem := bounds_problem(field, item))), None)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    bounds = field.metadata
    if isinstance(value, int) and not LEAST_INTEGER <= value <= MOST_INTEGER:
        return f"a whole number from {LEAST_INTEGER} to {MOST_INTEGER}"
    if not math.isfinite(value):
        return "a finite number"
    if "above" in bounds and value <= bounds["above"]:
        return f"more than {bounds['above']:g}"
    if "least" in bounds and value < bounds["least"]:
        return f"at least {bounds['least']:g}"
    if "most" in bounds and value > bounds["most"]:
        return f"at most {bounds['most']:g}"
    return None
