"""Lists and sizes as text, for messages and pages."""

from __future__ import annotations

from collections.abc import Iterable


def shortened_list(items: Iterable[str], most: int = 6) -> str:
    """'a, b, c', cut after `most` items: 'a, b and 4 more'."""
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def one_line(text: str, most: int) -> str:
    """The text as one printable line of at most `most` characters; a longer one loses its middle.

    Control characters, line breaks and lone surrogates are escaped, so that a terminal and a UTF-8 file can show it.
    """
    if len(text) > most:
        end = most // 3
        text = f"{text[: most - end - 3]} … {text[-end:]}"
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return printable if len(printable) <= most else one_line(printable, most)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut after 120 characters, or the error's class where it has no text."""
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
