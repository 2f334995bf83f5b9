"""Talking to the hub: what to try again, and what to tell the user."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from zoo.errors import UserError

T = TypeVar("T")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)  # org/name or org/name@revision

TRANSIENT = (408, 429, 500, 502, 503, 504)
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further try, where the server names none
LONGEST_WAIT = 300.0


def with_retries(call: Callable[[], T], what: str) -> T:
    """Calls the hub; what passes by itself (too many requests, server errors, lost connections, short bodies) is tried
    again after the server's Retry-After or a growing wait, what the user can mend becomes a UserError.

    huggingface_hub retries by itself inside a download, and resumes a body that broke off, but neither its model_info
    nor the server errors at the start of a file.
    """
    waits = iter(WAITS)
    while True:
        try:
            return call()
        except Exception as error:
            wait = next(waits, None) if _transient(error) else None
            if wait is None:
                mendable = as_user_error(error, what)
                if mendable is None:
                    raise
                raise mendable from error
            time.sleep(min(_retry_after(error, wait), LONGEST_WAIT))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it: the hub's client wraps the reason in an error about its cache."""
    while error is not None:
        yield error
        error = error.__cause__  # type: ignore[assignment]


def _status(error: BaseException) -> int | None:
    responses = (getattr(e, "response", None) for e in _chain(error))
    return next((r.status_code for r in responses if r is not None), None)


def _transient(error: BaseException) -> bool:
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    if any(isinstance(e, OfflineModeIsEnabled) for e in _chain(error)):
        return False
    status = _status(error)
    if status is not None:
        return status in TRANSIENT
    return any(isinstance(e, HTTPError) or "Consistency check failed" in str(e) for e in _chain(error))


def _retry_after(error: BaseException, otherwise: float) -> float:
    for e in _chain(error):
        value = getattr(getattr(e, "response", None), "headers", {}).get("Retry-After", "")
        if value.isdigit():
            return float(value)
    return otherwise


def as_user_error(error: BaseException, what: str) -> UserError | None:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain = list(_chain(error))
    status = _status(error)
    hub = constants.ENDPOINT

    def has(kind: type | tuple[type, ...]) -> bool:
        return any(isinstance(e, kind) for e in chain)

    if any(getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for e in chain):
        return None  # `writing` has the words for it
    if constants.HF_HUB_OFFLINE and has((OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return UserError(f"{what}: is not in the local cache, and HF_HUB_OFFLINE is set; unset it, or fetch it online")
    if has(GatedRepoError) or status == 403:
        return UserError(f"{what}: access is restricted; ask for it on {hub} and log in with `hf auth login`")
    if has(RevisionNotFoundError):
        return UserError(f"{what}: the repository has no such revision; look at its branches and tags on {hub}")
    if has(RepositoryNotFoundError) or status in (401, 404):
        return UserError(f"{what}: no such model on {hub}, or a private one; check the id, or `hf auth login`")
    if has(HFValidationError):
        return UserError(f"{what}: is not a hub id; give org/name or org/name@revision")
    if status is not None:
        return UserError(f"{what}: {hub} answered {status} again and again; try again later")
    if has(HTTPError):
        return UserError(
            f"{what}: cannot reach {hub} ({type(chain[-1]).__name__}); check the network, or set HF_HUB_OFFLINE=1 "
            "to use the local cache"
        )
    if any("Consistency check failed" in str(e) for e in chain):
        return UserError(f"{what}: a download broke off again and again; try again later")
    if has((LocalEntryNotFoundError, EntryNotFoundError)):
        return UserError(f"{what}: cannot be fetched and is not in the local cache; check the network and try again")
    return None
