"""HTML pages from the templates beside this file. A page needs no other file: style and figures are inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class Column:
    """A column of a table. kind: "number" (right-aligned), "text" (one line) or "wide" (wraps)."""

    heading: str
    kind: str = "number"


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
class Table:
    columns: Sequence[Column]
    rows: list[Sequence[str | Cell]] = field(default_factory=list)


def text_columns(*headings: str) -> list[Column]:
    return [Column(heading, "text") for heading in headings]


def number_columns(*headings: str) -> list[Column]:
    return [Column(heading) for heading in headings]


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


__all__ = ["Cell", "Column", "Markup", "Table", "number_columns", "render", "text_columns"]
