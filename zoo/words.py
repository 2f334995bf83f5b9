"""Lists and sizes as text, for messages and pages."""

from __future__ import annotations

from collections.abc import Iterable


def shortened_list(items: Iterable[str], most: int = 6) -> str:
    """'a, b, c', cut after `most` items: 'a, b and 4 more'."""
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
