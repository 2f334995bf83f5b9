"""The one kind of error that a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What is wrong, where, and what to do about it, in one line. The command line prints it and exits with 2."""


class NotFinite(UserError):
    """A tensor holds NaN or infinity."""


def unknown(kind: str, given: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a table: says which names would do, the nearest first."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none'}"
    return UserError(f"unknown {kind} {given!r}: {hint}")
