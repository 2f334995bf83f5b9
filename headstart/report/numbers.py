"""Numbers as a reader of a report sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

DASH = "–"  # stands for a number that does not exist


def or_dash(value: Any, form: Callable[[Any], str], missing: str = DASH) -> str:
    """`form(value)`; `missing` for None."""
    return missing if value is None else form(value)


def three_digits(value: float | None) -> str:
    """`1,234` for an integer, `0.123` or `1235` for a float, a dash for None."""
    if value is None:
        return DASH
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def two_digits(value: float) -> str:
    """`17`, `1.7`, `0.17`."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def format_factor(value: float) -> str:
    """`16.7×`: a factor with three digits."""
    return f"{value:,.0f}×" if value >= 99.5 else f"{value:.1f}×" if value >= 9.95 else f"{value:.2f}×"


def count(number: float) -> str:
    """`1,800`, `18`, `2.5`: a number of things, or a mean of such numbers."""
    return f"{number:,.0f}" if number >= 9.95 or number == int(number) else f"{number:.1f}"


def count_of(number: float, noun: str) -> str:
    """`18 steps`, `1 step`, `2.5 steps`."""
    text = count(number)
    return f"{text} {noun}{'' if text == '1' else 's'}"


def superscript(number: int) -> str:
    """`⁻³`: an exponent in plain text."""
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def shape_text(shape: list[int]) -> str:
    """`64 × 32`."""
    return " × ".join(map(str, shape))


def short_revision(revision: str) -> str:
    """The first ten digits of a commit or of a hash that begins with `sha256:`."""
    return revision.removeprefix("sha256:")[:10]
