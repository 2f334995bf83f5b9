"""Templates: one base, escaped values, tables, packaged files."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

import headstart.report
from headstart.report.html import Cell, Column, Table, _environment

ROOT = Path(__file__).parents[3]
REPORT = Path(headstart.report.__file__).parent
TEMPLATES = sorted((REPORT / "templates").iterdir())


def test_every_page_extends_the_one_base_template() -> None:
    pages = [path for path in TEMPLATES if "{% block content %}" in path.read_text() and path.name != "base.html.j2"]
    assert [path.name for path in pages] == ["analysis.html.j2", "comparison.html.j2"]
    for path in TEMPLATES:
        text = path.read_text()
        assert ('{% extends "base.html.j2" %}' in text) == (path in pages)
        assert ("<html" in text) == (path.name == "base.html.j2")


def test_there_is_one_table_of_verdicts() -> None:
    assert sum("by chance alone</th>" in path.read_text() for path in TEMPLATES) == 1


def test_no_template_switches_escaping_off_and_no_module_writes_html() -> None:
    for path in TEMPLATES:
        assert "safe" not in path.read_text() and "autoescape" not in path.read_text()
    for path in REPORT.glob("*.py"):
        assert not any(tag in path.read_text() for tag in ("</", "<td", "<div", "<span"))


def test_templates_are_package_data() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    for path in TEMPLATES:
        assert any(fnmatch(f"templates/{path.name}", pattern) for pattern in patterns)


def test_a_table_has_a_row_for_each_entry() -> None:
    columns = [
        Column("name", lambda e: e["name"], "text"),
        Column("loss", "loss"),
        Column("verdict", lambda e: Cell(e["verdict"], chip=True), "text"),
    ]
    entries = [{"name": "<a>", "loss": 0.12345, "verdict": "beyond chance"}, {"name": "b", "verdict": "x"}]
    macros = _environment().get_template("macros.html.j2").module
    html = str(macros.data_table(Table(columns, entries)))  # type: ignore[attr-defined]
    assert html.count("<tr>") == 3 and html.count("<td") == 6
    assert '<th class="number">loss</th>' in html and '<td class="number">0.123</td>' in html
    assert '<td class="text">&lt;a&gt;</td>' in html and "–" in html
    assert '<span class="chip beyond-chance">beyond chance</span>' in html


@pytest.mark.parametrize(
    ("cell", "html"),
    [
        (Cell("<b>", code=True), "<code>&lt;b&gt;</code>"),
        (Cell("<b>", link="donor-0"), '<a href="#donor-0">&lt;b&gt;</a>'),
        (Cell("<b>", dot="#123456"), '<span class="dot" style="background:#123456"></span>&lt;b&gt;'),
        (Cell('"><b>', chip=True), '<span class="chip &#34;&gt;&lt;b&gt;">&#34;&gt;&lt;b&gt;</span>'),
    ],
)
def test_cells_are_escaped(cell: Cell, html: str) -> None:
    macros = _environment().get_template("macros.html.j2").module
    assert html in str(macros.cell_content(cell))  # type: ignore[attr-defined]
