"""Calls to the Hugging Face hub: which errors to retry, and which to report to the user."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from zoo.errors import UserError

T = TypeVar("T")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)  # org/name or org/name@revision

TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each retry, where the server names none
LONGEST_WAIT = 300.0  # seconds


def with_retries(call: Callable[[], T], what: str) -> T:
    """The result of `call`, which talks to the hub about `what`.

    Temporary errors (too many requests, server errors, lost connections, incomplete bodies) are retried after the
    server's Retry-After or a growing wait. Errors that the user can solve become UserErrors. huggingface_hub retries
    and resumes inside a download by itself, but not in model_info and not at the start of a file.
    """
    waits = iter(WAITS)
    while True:
        try:
            return call()
        except Exception as error:
            wait = next(waits, None) if _is_temporary(error) else None
            if wait is None:
                user_error = as_user_error(error, what)
                if user_error is None:
                    raise
                raise user_error from error
            time.sleep(min(_retry_after(error, wait), LONGEST_WAIT))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes: the hub's client wraps the reason in an error about its cache."""
    while error is not None:
        yield error
        error = error.__cause__  # type: ignore[assignment]


def _status(error: BaseException) -> int | None:
    """The HTTP status of the hub's answer."""
    responses = (getattr(e, "response", None) for e in _causes(error))
    return next((r.status_code for r in responses if r is not None), None)


def _is_temporary(error: BaseException) -> bool:
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    if any(isinstance(e, OfflineModeIsEnabled) for e in _causes(error)):
        return False
    status = _status(error)
    if status is not None:
        return status in TRANSIENT_STATUSES
    return any(isinstance(e, HTTPError) or "Consistency check failed" in str(e) for e in _causes(error))


def _retry_after(error: BaseException, otherwise: float) -> float:
    """Seconds until the next try."""
    for e in _causes(error):
        value = getattr(getattr(e, "response", None), "headers", {}).get("Retry-After", "")
        if value.isdigit():
            return float(value)
    return otherwise


def as_user_error(error: BaseException, what: str) -> UserError | None:
    """The UserError for a hub error that the user can solve, None for any other."""
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

    causes = list(_causes(error))
    status = _status(error)
    hub = constants.ENDPOINT

    def has(kind: type | tuple[type, ...]) -> bool:
        return any(isinstance(e, kind) for e in causes)

    if any(getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for e in causes):
        return None  # `disk_errors` reports it
    if constants.HF_HUB_OFFLINE and has((OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return UserError(f"{what}: is not in the local cache, and HF_HUB_OFFLINE is set; unset it")
    if has(GatedRepoError) or status == 403:
        return UserError(f"{what}: access is restricted; request it on {hub} and log in with `hf auth login`")
    if has(RevisionNotFoundError):
        return UserError(f"{what}: the repository has no such revision; look at its branches and tags on {hub}")
    if has(RepositoryNotFoundError) or status in (401, 404):
        return UserError(f"{what}: no such model on {hub}, or it is private; check the id, or run `hf auth login`")
    if has(HFValidationError):
        return UserError(f"{what}: is not a hub id; give org/name or org/name@revision")
    if status is not None:
        return UserError(f"{what}: {hub} answered {status} repeatedly; try again later")
    if has(HTTPError):
        return UserError(
            f"{what}: cannot reach {hub} ({type(causes[-1]).__name__}); check the network, or set HF_HUB_OFFLINE=1 "
            "to use the local cache"
        )
    if any("Consistency check failed" in str(e) for e in causes):
        return UserError(f"{what}: the download was interrupted repeatedly; try again later")
    if has((LocalEntryNotFoundError, EntryNotFoundError)):
        return UserError(f"{what}: cannot be downloaded and is not in the local cache; check the network and try again")
    return None
