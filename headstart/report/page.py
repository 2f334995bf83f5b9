"""Pages that need nothing else: one style, tables, lists, figures inside. Every helper escapes what it is given, but
the cells of tables, which are HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from headstart.report import plot_style as plots

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --card: #f6f8fa; --page: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #30363d; --card: #161b22; --page: #0d1117; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1rem; font-weight: 600; color: var(--soft); margin: 0 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; }
.headline { font-size: clamp(1.3rem, 3.2vw, 1.8rem); line-height: 1.3; font-weight: 650; margin: 0 0 .75rem;
  text-wrap: balance; }
.lead, .note { color: var(--soft); margin: .25rem 0 1rem; }
.note { font-size: .9rem; }
figure { margin: 1rem 0; }
svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .45rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: .83rem; vertical-align: bottom; white-space: pre-line; }
.text { text-align: left; }
.wide { text-align: left; white-space: normal; min-width: 16rem; }
td.best { font-weight: 700; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.25rem; line-height: 1.3; }
.card span { color: var(--soft); font-size: .83rem; }
ul { padding-left: 1.2rem; }
li { margin: .3rem 0; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; overflow-x: auto;
  font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def document(title: str, body: str) -> str:
    """A whole page; `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def figure(drawn: Any, label: str) -> str:
    """A matplotlib figure as inline SVG; nothing for None."""
    return "" if drawn is None else f"<figure>{plots.inline_svg(drawn, label)}</figure>"


def table(head: Sequence[tuple[str, str]], rows: Iterable[Sequence[tuple[str, str]]]) -> str:
    """Cells are (class, text): "" for numbers, "text", "wide" or "best". The heads are plain text, the others HTML."""
    top = "".join(f'<th class="{kind}">{escape(text)}</th>' for kind, text in head)
    body = "\n".join("<tr>" + "".join(f'<td class="{k}">{t}</td>' for k, t in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def bullets(lines: Iterable[str]) -> str:
    return "<ul>" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def cards(items: Iterable[tuple[str, str]]) -> str:
    """(number, what it is) as small boxes in a row."""
    inner = "".join(f'<div class="card"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in items)
    return f'<div class="cards">{inner}</div>'


def or_dash(value: Any, form: Any, otherwise: str = "–") -> str:
    return otherwise if value is None else escape(form(value))
