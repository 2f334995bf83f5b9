"""Text of a model card that comes from elsewhere (names, licences, commands), written as Markdown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from zoo.words import one_line

MAX_TEXT = 10_000  # characters of a text on one line
ARXIV = re.compile(r"\d{4}\.\d{4,5}(v\d+)?")
DOI = re.compile(r"doi:(10\.\d{4,9}/[^\s<>()\[\]]+)")
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9_.-]+(?<!\.md)")  # owner/name on GitHub
ABSOLUTE_PATH = re.compile(r"(^|[=,])(?:~[^/\\,=]*[/\\]|/|[A-Za-z]:[/\\]|\\\\)([^,=]*)")


def escape_markdown(text: object) -> str:
    """A text on one line whose characters mean nothing in Markdown and HTML, also in the cell of a table."""
    line = _line(text)
    escaped = re.sub(r"([\\`*\[\]|~])", r"\\\1", line)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code_span(text: object) -> str:
    """A text on one line, set as code."""
    line = _line(text)
    fence = "`" * (_longest_run(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def code_block(text: str) -> str:
    """Lines of text, set as code. Lone surrogates, which a UTF-8 file cannot hold, are escaped."""
    text = text.encode("utf-8", "backslashreplace").decode()
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}\n{text}\n{fence}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    rule = f"|{'---|' * len(header)}"
    return "\n".join(rule if n == 1 else f"| {' | '.join(line)} |" for n, line in enumerate(lines))


def reference_links(reference: str) -> str:
    """The sources of a method, with links: arXiv ids, repositories on GitHub and DOIs. Other text stays as it is."""
    return "".join(_reference_link(part) for part in re.split(r"([,;] )", reference))


def without_folders(text: str) -> str:
    """An option in which absolute paths are cut to their last part.

    A card is published. The folders of the machine that made it are no use to its readers, and name its user.
    """
    return ABSOLUTE_PATH.sub(lambda found: found[1] + (re.split(r"[/\\]", found[2].rstrip("/\\"))[-1] or "/"), text)


def command_without_folders(command: str) -> str:
    """A command line without folders. It stays as it is where it names no absolute path."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    short = [without_folders(word) for word in words]
    return command if short == words else shlex.join(short)


def _reference_link(part: str) -> str:
    if ARXIV.fullmatch(part):
        return f"[arXiv:{part}](https://arxiv.org/abs/{part})"
    if found := DOI.fullmatch(part):
        return f"[{part}](https://doi.org/{found[1]})"
    return f"[{part}](https://github.com/{part})" if REPOSITORY.fullmatch(part) else part


def _line(text: object) -> str:
    return one_line(" ".join(str(text).split()), MAX_TEXT)


def _longest_run(text: str) -> int:
    """The length of the longest run of backticks."""
    return max((len(run) for run in re.findall("`+", text)), default=0)
