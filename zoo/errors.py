"""The one kind of error that a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN = 20  # names that an error lists


class UserError(Exception):
    """What is wrong, where, and what to do about it, in one line. The command line prints it and exits with 2."""


class NotFinite(UserError):
    """A tensor holds NaN or infinity."""


def unknown(kind: str, given: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a table: says which name is meant, else the first few that would do."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names[:SHOWN]) or 'none'}{more}"
    return UserError(f"unknown {kind} {given!r}: {hint}")
