"""HTML pages from the templates beside this file. A page needs no other file: style and figures are inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from headstart.report.numbers import three_digits


@dataclass(frozen=True)
class Cell:
    """A cell that is more than text."""

    text: str
    best: bool = False  # set in bold
    dot: str = ""  # colour of a dot before the text
    link: str = ""  # target within the page
    chip: bool = False  # the text is a verdict, set in a coloured frame
    code: bool = False


@dataclass(frozen=True)
class Column:
    """A column of a table. value: what an entry shows in it, or the key of the number that it shows.
    kind: "number" (right-aligned), "text" (one line) or "wide" (wraps)."""

    heading: str
    value: str | Callable[[Any], str | Cell]
    kind: str = "number"

    def cell(self, entry: Any) -> str | Cell:
        return three_digits(entry.get(self.value)) if isinstance(self.value, str) else self.value(entry)


@dataclass(frozen=True)
class Table:
    """One row for each entry."""

    columns: Sequence[Column]
    entries: Sequence[Any]


def render(template: str, **values: Any) -> str:
    """The page that a template makes of `values`. Every value is escaped but `Markup`."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("headstart.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.tests["cell"] = lambda value: isinstance(value, Cell)
    return environment
