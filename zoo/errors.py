"""Errors that the user can solve."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from zoo.limits import MAX_MESSAGE, MAX_NAMES_COMPARED
from zoo.words import one_line, shortened_list

MOST_NAMES = 20  # listed in an error


class UserError(Exception):
    """An error that the user can solve. Its text is one line: what is wrong, where, what to do.

    The command line prints it and exits with code 2. Names and values in the text may come from an untrusted file:
    control characters are escaped, and a long text loses its middle.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, MAX_MESSAGE))


class NotFinite(UserError):
    """A tensor holds NaN or infinity."""


def unknown(kind: str, given: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among the known ones. It suggests the closest name, else lists the first few."""
    names = sorted(known)
    few = len(names) <= MAX_NAMES_COMPARED and len(given) <= MAX_MESSAGE
    close = difflib.get_close_matches(given, names, n=1) if few else []
    hint = f"did you mean {close[0]!r}?" if close else f"known: {shortened_list(names, MOST_NAMES) or 'none'}"
    return UserError(f"unknown {kind} {given!r}: {hint}")
