"""Calls to the Hugging Face hub: which errors to retry, and which to report to the user.

Every call to a hub goes through `with_retries`, or runs in a `hub_session`. Both check the answers (`hub_client`).
"""

from __future__ import annotations

import contextlib
import errno
import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

from zoo.errors import UserError
from zoo.limits import HUB_TIMEOUT
from zoo.words import first_line

if TYPE_CHECKING:
    from zoo.checkpoints.hub_client import HubCall

T = TypeVar("T")

# org/name or org/name@revision
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@(?!\S*\.\.)\w[\w./-]*)?", re.ASCII)

TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each retry, where the server names none


def with_retries(call: Callable[[], T], what: str) -> T:
    """The result of `call`, which does nothing but talk to a hub about `what`.

    Temporary errors (too many requests, server errors, lost connections, incomplete bodies) are retried after the
    server's Retry-After or a growing wait, until there was no progress for the timeout of `hub_session`. All other
    errors become UserErrors. huggingface_hub retries and resumes inside a download by itself, but not in model_info
    and not at the start of a file.
    """
    waits, last = iter(WAITS), None
    with hub_session() as session:
        while True:
            try:
                return call()
            except Exception as error:
                stalled = last is not None and _is_stalled(error)
                last = last if stalled else error  # the reason why there was no progress
                wait = None if stalled or not _is_temporary(error) else next(waits, None)
                if wait is None or session.seconds_left() == 0:
                    user_error = as_user_error(last or error, what)
                    if user_error is None:
                        raise
                    raise user_error from error
                time.sleep(min(_retry_after(error, wait), session.seconds_left()))


@contextlib.contextmanager
def hub_session(timeout: float | None = None) -> Iterator[HubCall]:
    """Checks and bounds all requests to hubs while it is open, those of transformers, diffusers and datasets included.

    timeout: seconds without progress after which a hub is given up; without it that of the session around this one,
    else HUB_TIMEOUT. Raises UserError for one that is not a positive number.
    """
    if timeout is not None and not 0 < timeout < float("inf"):
        raise UserError(f"--timeout {timeout:g}: give a number of seconds above 0, such as {HUB_TIMEOUT:g}")
    from zoo.checkpoints import hub_client

    with hub_client.open_session(timeout) as session:
        yield session


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes: the hub's client wraps the reason in an error about its cache."""
    seen: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in seen:
        yield found
        seen.append(found)
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _is_stalled(error: BaseException) -> bool:
    from zoo.checkpoints.hub_client import HubStalled

    return any(isinstance(e, HubStalled) for e in _causes(error))


def _status(error: BaseException) -> int | None:
    """The HTTP status of the hub's answer."""
    responses = (getattr(e, "response", None) for e in _causes(error))
    return next((r.status_code for r in responses if r is not None), None)


def _url(error: BaseException) -> str:
    """The URL of the request that failed, empty where there was none."""
    response = getattr(error, "response", None)
    return "" if response is None else str(response.request.url)


def _is_temporary(error: BaseException) -> bool:
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    final = (OfflineModeIsEnabled, UserError, httpx.TooManyRedirects)
    if any(isinstance(e, final) for e in _causes(error)):
        return False
    status = _status(error)
    if status is not None:
        return status in TRANSIENT_STATUSES
    return any(isinstance(e, HTTPError) or "Consistency check failed" in str(e) for e in _causes(error))


def _retry_after(error: BaseException, otherwise: float) -> float:
    """Seconds until the next try. `hub_client` has checked what the server asks for."""
    for e in _causes(error):
        value = getattr(getattr(e, "response", None), "headers", {}).get("Retry-After", "")
        if value.isdigit():
            return float(value)
    return otherwise


def as_user_error(error: BaseException, what: str) -> UserError | None:
    """The UserError for an error of a call to the hub about `what`; None for a full disk, which `disk_errors` reports.

    what: the model or data set, with its revision where one was asked for.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import httpx

    causes = list(_causes(error))
    hub = constants.ENDPOINT
    if any(getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for e in causes):
        return None
    known = next((e for e in causes if isinstance(e, UserError)), None)
    if known is not None:
        return known if str(known).startswith(what) else UserError(f"{what}: {known}")
    found = _refusal(causes, what) or _failure(causes, what)
    if found is not None:
        return UserError(found)
    if any(isinstance(e, httpx.TooManyRedirects) for e in causes):
        return UserError(f"{what}: {hub} redirects in a circle; try again later, or set another HF_ENDPOINT")
    if isinstance(error, OSError) and error.filename is not None:
        return UserError(
            f"{what}: cannot be stored in {constants.HF_HUB_CACHE} ({error.strerror}: {error.filename}); check it, or "
            "set HF_HUB_CACHE"
        )
    reason = f"{type(error).__name__}: {first_line(error)}"
    return UserError(f"{what}: the answers of {hub} cannot be used ({reason}); try again later, or set HF_ENDPOINT")


def _refusal(causes: list[BaseException], what: str) -> str | None:
    """The message for a request that the hub refuses, which it would do again."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub, status = constants.ENDPOINT, _status(causes[0])

    def has(*kinds: type) -> bool:
        return any(isinstance(e, kinds) for e in causes)

    if constants.HF_HUB_OFFLINE and has(OfflineModeIsEnabled, LocalEntryNotFoundError):
        return f"{what}: is not in the local cache, and HF_HUB_OFFLINE is set; unset it"
    if has(GatedRepoError) or status == 403:
        return f"{what}: access is restricted; request it on {hub} and log in with `hf auth login`"
    if has(RevisionNotFoundError):
        return f"{what}: the repository has no such revision; look at its branches and tags on {hub}"
    missing = next((e for e in causes if isinstance(e, RemoteEntryNotFoundError)), None)
    if missing is not None:
        return _missing_file(str(missing.response.request.url), what)
    if has(RepositoryNotFoundError) or status in (401, 404):
        kind = "data set" if any("/datasets/" in _url(e) for e in causes) else "model"
        return f"{what}: no such {kind} on {hub}, or it is private; check the id, or run `hf auth login`"
    if has(HFValidationError):
        return f"{what}: is not a hub id; give org/name or org/name@revision"
    return None


def _missing_file(url: str, what: str) -> str:
    """The message for a file that a repository has not: which file, and at which commit or branch."""
    _, _, rest = urlsplit(url).path.partition("/resolve/")
    revision, _, file = (unquote(part) for part in rest.partition("/"))
    return f"{what}: the hub has no file {file!r} at revision {revision}; choose another revision or repository"


def _failure(causes: list[BaseException], what: str) -> str | None:
    """The message for a hub that does not answer, or not with what was asked for."""
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, FileMetadataError, HTTPError, LocalEntryNotFoundError

    from zoo.checkpoints.hub_client import HubStalled

    hub, status = constants.ENDPOINT, _status(causes[0])
    if any(isinstance(e, HubStalled) for e in causes):
        reason = next(str(e) for e in causes if isinstance(e, HubStalled))
        return f"{what}: {hub} made {reason}; try again later, or give a longer --timeout"
    if status is not None:
        return f"{what}: {hub} answered {status} repeatedly; try again later"
    if any(isinstance(e, FileMetadataError) for e in causes):
        return f"{what}: the answer of {hub} has no ETag or no X-Repo-Commit; check the network, or set HF_ENDPOINT"
    if any(isinstance(e, HTTPError) for e in causes):
        return (
            f"{what}: cannot reach {hub} ({type(causes[-1]).__name__}); check the network, or set HF_HUB_OFFLINE=1 "
            "to use the local cache"
        )
    if any("Consistency check failed" in str(e) for e in causes):
        return f"{what}: the download was interrupted repeatedly; try again later"
    if any(isinstance(e, (LocalEntryNotFoundError, EntryNotFoundError)) for e in causes):
        return f"{what}: cannot be downloaded and is not in the local cache; check the network and try again"
    return None
