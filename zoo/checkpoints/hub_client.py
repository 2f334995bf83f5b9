"""The HTTP client of every call to a hub, those of transformers, diffusers and datasets included.

huggingface_hub makes all requests of a process with one client. While a session is open, that client keeps the
limits of `zoo.limits` on time and size, checks every answer before the library uses it (`hub_answers`), and sends the
user's token to the hub alone. Xet, whose transfers run outside of this client, is off meanwhile: its files come over
plain HTTP, with the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from huggingface_hub import constants, set_client_factory
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import _http, httpx

from zoo.checkpoints.hub_answers import (
    bad_answer,
    check_file_headers,
    check_headers,
    check_path,
    checked_json,
    redirect_target,
    seconds_to_wait,
)
from zoo.errors import UserError
from zoo.limits import (
    HUB_PROGRESS,
    HUB_TIMEOUT,
    MAX_ASKED_WAIT,
    MAX_FILE_TRANSFER,
    MAX_HUB_FILES,
    MAX_HUB_HEAD,
    MAX_HUB_JSON,
    MAX_HUB_PAGES,
    MAX_JSON,
    MAX_UNSTATED_FILE,
)
from zoo.words import one_line

EXCHANGE = "headstart.exchange"  # the key of a request's extensions that holds its Exchange
MIN_PIECE = 512  # bytes: pieces of a body must have as many on average, after the first MOST_SMALL_PIECES
MOST_SMALL_PIECES = 20_000


class HubStalled(OfflineModeIsEnabled):
    """A hub made no progress for the timeout. huggingface_hub then uses its cache, as it does when offline."""


@dataclass
class HubCall:
    """What one call, with all its requests and retries, has used of its limits. Its threads share it."""

    timeout: float
    deadline: float | None = None  # of a retry: when the first try began, plus the timeout; None after progress
    failure: int | None = None  # the status of the last answer that asks for a retry
    asked_wait: int = 0
    json_bytes: int = 0
    files: int = 0
    pages: int = 0
    next_pages: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)  # URL -> the size that a HEAD request stated
    received: Counter[str] = field(default_factory=Counter)  # URL -> bytes of its body so far

    def start(self) -> float:
        """The deadline of a request that begins now."""
        now = time.monotonic()
        if self.deadline is None or now > self.deadline + self.timeout:  # a failure long ago was not retried
            self.deadline = now + self.timeout
        return self.deadline

    def seconds_left(self) -> float:
        return self.timeout if self.deadline is None else max(0.0, self.deadline - time.monotonic())


@dataclass
class Exchange:
    """One request and its answer."""

    call: HubCall
    url: str  # of the first request, where this one follows a redirect
    is_metadata: bool  # an answer of the hub's API, else a file
    deadline: float
    head: int | None = 0  # bytes before the body so far; None once the body has begun
    unaccounted: int = 0  # bytes of the body since the last progress

    def socket_timeout(self, asked: float | None) -> float:
        """Seconds that an operation of the socket may take. HubStalled where none are left."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise self.stalled()
        return left if asked is None else min(left, asked)

    def stalled(self) -> HubStalled:
        """The error at the deadline."""
        status = "" if self.call.failure is None else f" and answered {self.call.failure}"
        return HubStalled(f"no progress for {self.call.timeout:g} seconds{status}")

    def count(self, size: int) -> None:
        """Counts bytes from the socket. BadAnswer where too many come before the body."""
        if self.head is not None:
            self.head += size
            if self.head > MAX_HUB_HEAD:
                raise bad_answer(self.url, f"it has more than {MAX_HUB_HEAD} bytes before its body")
            return
        self.unaccounted += size
        if self.unaccounted >= HUB_PROGRESS:
            self.unaccounted = 0
            self.deadline = time.monotonic() + self.call.timeout
            self.call.deadline = None

    def complete(self) -> None:
        """The answer is here, and is not one that asks for a retry."""
        self.call.deadline = self.call.failure = None


class WatchedStream:
    """A connection whose operations end at the deadline of the request that uses it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._exchange: Exchange | None = _current.exchange

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        exchange = self._exchange
        if exchange is None:
            return self._inner.read(max_bytes, timeout=timeout)
        with _stalled_at_deadline(exchange):
            data = self._inner.read(max_bytes, timeout=exchange.socket_timeout(timeout))
        exchange.count(len(data))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._exchange = _current.exchange  # a connection that is kept serves one request after the other
        if self._exchange is not None:
            timeout = self._exchange.socket_timeout(timeout)
        self._inner.write(buffer, timeout=timeout)

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> Any:
        if _current.exchange is not None:
            timeout = _current.exchange.socket_timeout(timeout)
        return WatchedStream(self._inner.start_tls(ssl_context, server_hostname, timeout))

    def close(self) -> None:
        self._inner.close()

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class WatchedBackend:
    """What opens the connections of a client."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, **options: Any) -> WatchedStream:
        exchange = _current.exchange
        if exchange is None:
            return WatchedStream(self._inner.connect_tcp(host, port, timeout=timeout, **options))
        with _stalled_at_deadline(exchange):
            return WatchedStream(
                self._inner.connect_tcp(host, port, timeout=exchange.socket_timeout(timeout), **options)
            )

    def connect_unix_socket(self, path: str, timeout: float | None = None, **options: Any) -> WatchedStream:
        return WatchedStream(self._inner.connect_unix_socket(path, timeout=timeout, **options))

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


class CheckedBody(httpx.SyncByteStream):
    """The body of a file, which may not be larger than the file is stated to be."""

    def __init__(self, stream: Any, exchange: Exchange, most: int) -> None:
        self._stream, self._exchange, self._most = stream, exchange, most

    def __iter__(self) -> Iterator[bytes]:
        exchange = self._exchange
        received = exchange.call.received
        for piece in _pieces(self._stream, exchange.url, self._most):
            received[exchange.url] += len(piece)
            if received[exchange.url] > MAX_FILE_TRANSFER * self._most + MAX_HUB_HEAD:
                raise bad_answer(exchange.url, f"it breaks off again and again, after {received[exchange.url]} bytes")
            yield piece
        exchange.complete()

    def close(self) -> None:
        self._stream.close()


class _Current(threading.local):
    exchange: Exchange | None = None  # of the request that this thread makes


_current = _Current()
_lock = threading.Lock()
_calls: list[HubCall] = []  # open sessions, the innermost last
_saved: dict[str, Any] = {}  # settings of huggingface_hub before the first session


@contextlib.contextmanager
def open_session(timeout: float | None = None) -> Iterator[HubCall]:
    """Checks and bounds all requests to hubs while it is open. An inner session has limits of its own.

    timeout: seconds without progress; without it that of the outer session, else HUB_TIMEOUT.
    """
    with _lock:
        call = HubCall(timeout or (_calls[-1].timeout if _calls else HUB_TIMEOUT))
        if not _calls:
            _install()
            _saved["xet"], constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
        _calls.append(call)
    try:
        yield call
    finally:
        with _lock:
            _calls.remove(call)
            if not _calls:
                constants.HF_HUB_DISABLE_XET = _saved.pop("xet")


def _install() -> None:
    """Makes huggingface_hub's client ours, on top of the one that the user may have set."""
    previous = _http._GLOBAL_CLIENT_FACTORY
    if not getattr(previous, "checks_answers", False):

        def factory() -> httpx.Client:
            return _watched(previous())

        factory.checks_answers = True  # type: ignore[attr-defined]
        set_client_factory(factory)


def _watched(client: httpx.Client) -> httpx.Client:
    """The client with our checks. httpx has no public way to bound the time of an answer's head: see WatchedStream."""
    client.event_hooks["request"].append(_before_request)
    client.event_hooks["response"].append(_after_head)
    for transport in {client._transport, *client._mounts.values()} - {None}:
        pool = getattr(transport, "_pool", None)
        if pool is not None:
            pool._network_backend = WatchedBackend(pool._network_backend)
    return client


def _before_request(request: httpx.Request) -> None:
    """Prepares a request, and each that follows a redirect."""
    first: Exchange | None = request.extensions.pop(EXCHANGE, None)
    _current.exchange = None
    if not _calls:
        return
    url, call = str(request.url), _calls[-1]
    is_hub = _is_hub(url)
    if not is_hub:
        request.headers.pop("authorization", None)
    request.headers["Accept-Encoding"] = "identity"  # so that sizes are those of the content
    if first is None:
        if is_hub:
            check_path(request.url.raw_path.partition(b"?")[0].decode("ascii"))
        exchange = Exchange(call, url, is_hub and _is_api(url), call.start())
    else:
        exchange = Exchange(call, first.url, first.is_metadata, first.deadline)
    exchange.socket_timeout(None)
    asked = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        kind: min(asked.get(kind) or call.timeout, call.timeout) for kind in ("connect", "read", "write", "pool")
    }
    request.extensions[EXCHANGE] = _current.exchange = exchange


def _after_head(response: httpx.Response) -> None:
    """Checks an answer when its headers are here and its body is not."""
    exchange: Exchange | None = response.request.extensions.get(EXCHANGE)
    if exchange is None:
        return
    exchange.head = None
    headers, url = response.headers, str(response.request.url)
    has_content = response.request.method != "HEAD" and response.status_code < 300
    if has_content and headers.get("content-encoding", "identity").lower() != "identity":
        raise bad_answer(url, "it is compressed, which was not asked for")
    check_headers(url, headers)
    if not response.has_redirect_location:
        headers.pop("location", None)  # huggingface_hub would use it, whatever the status
    if response.status_code < 200:
        raise bad_answer(url, f"its status is {response.status_code}")
    if response.status_code >= 300:
        if response.request.method != "HEAD":
            _drop_body(response)
        _check_status(response, exchange)
    if response.request.method == "HEAD":
        if response.status_code < 400:
            _keep_size(response, exchange)
    elif response.status_code < 300:
        _check_links(response, exchange)
        if exchange.is_metadata:
            _replace_body(response, exchange)
        else:
            _bound_body(response, exchange)
            return
    if response.status_code < 500 and response.status_code not in (408, 429):
        exchange.complete()


def _check_status(response: httpx.Response, exchange: Exchange) -> None:
    """Checks where a redirect leads, and how long a busy hub asks to wait."""
    url, call = str(response.request.url), exchange.call
    if response.status_code < 400:
        if not response.has_redirect_location:
            raise bad_answer(url, f"its status is {response.status_code}, without an address to go to")
        redirect_target(url, response.headers["location"])
        return
    asked = seconds_to_wait(response.headers)
    call.failure = response.status_code
    if asked is None or response.status_code not in (429, 503):
        response.headers.pop("retry-after", None)
        return
    call.asked_wait += asked
    if call.asked_wait > MAX_ASKED_WAIT:
        raise UserError(f"{_host(url)}: is busy and asks to wait {asked} seconds; try again then")
    call.deadline = call.start() + asked


def _keep_size(response: httpx.Response, exchange: Exchange) -> None:
    """Keeps the size that the answer to a HEAD request states, for the request that follows."""
    url, location = str(response.request.url), response.headers.get("location")
    target = None if location is None else urljoin(url, location)
    if target is not None and _is_hub(target):
        return  # huggingface_hub follows it, and uses the answer there
    size = check_file_headers(url, response.headers, target is not None)
    if size is not None:
        exchange.call.sizes[url] = size
        if target is not None:
            try:
                exchange.call.sizes[str(httpx.URL(target))] = size
            except httpx.InvalidURL as error:
                raise bad_answer(url, f"it redirects to {one_line(target, 80)!r}") from error


def _check_links(response: httpx.Response, exchange: Exchange) -> None:
    """Removes links other than the one to the next page. BadAnswer for a page that leads elsewhere or nowhere."""
    url, call = str(response.request.url), exchange.call
    try:
        target = response.links.get("next", {}).get("url")
    except Exception as error:
        raise bad_answer(url, "its Link cannot be read") from error
    response.headers.pop("link", None)
    if target is None or not exchange.is_metadata:
        return
    target = redirect_target(url, target)
    call.pages += 1
    if target == url or target in call.next_pages or call.pages > MAX_HUB_PAGES:
        raise bad_answer(url, "its pages have no end")
    if not _is_hub(target):
        raise bad_answer(url, f"its next page is on another host, {_host(target)}")
    call.next_pages.add(target)
    response.headers["link"] = f'<{target}>; rel="next"'


def _replace_body(response: httpx.Response, exchange: Exchange) -> None:
    """Reads an answer of the API and puts its checked content in its place."""
    url, call = str(response.request.url), exchange.call
    stream: Any = response.stream
    data = bytearray()
    try:
        for piece in _pieces(stream, url, MAX_HUB_JSON - call.json_bytes):
            data += piece
    finally:
        stream.close()
    call.json_bytes += len(data)
    value = checked_json(url, bytes(data))
    listed = value.get("siblings") or () if isinstance(value, dict) else value
    call.files += len(listed) if isinstance(listed, list) else 0
    if call.files > MAX_HUB_FILES:
        raise bad_answer(url, f"it lists {call.files} files, more than {MAX_HUB_FILES}")
    content = json.dumps(value).encode()
    response.stream = httpx.ByteStream(content)
    response.headers.pop("transfer-encoding", None)
    response.headers["content-length"] = str(len(content))


def _bound_body(response: httpx.Response, exchange: Exchange) -> None:
    """Bounds the body of a file by the size that is stated. UserError where it does not fit on the disk."""
    request, url = response.request, exchange.url
    stated, length = exchange.call.sizes.get(url), response.headers.get("content-length")
    most = int(length) if length is not None else MAX_UNSTATED_FILE
    if stated is not None:
        if length is not None and most > stated:
            raise bad_answer(url, f"it has {most} bytes, where {stated} were stated")
        most = stated
    elif "range" in request.headers:
        first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
        if first.isdigit() and last.isdigit() and most > int(last) - int(first) + 1:
            raise bad_answer(url, f"it has {most} bytes, where a part of the file was asked for")
    path = urlsplit(url).path
    if path.endswith(".json") and most > MAX_JSON and "/datasets/" not in path:
        raise bad_answer(url, f"its {most} bytes are more than the {MAX_JSON} that are read of a JSON file")
    _check_disk(url, most)
    response.stream = CheckedBody(response.stream, exchange, most)


def _check_disk(url: str, size: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    folder = next((f for f in (cache, *cache.parents) if f.exists()), None)
    if folder is not None and shutil.disk_usage(folder).free < size:
        raise UserError(
            f"{urlsplit(url).path}: has {size} bytes, more than are free in {cache}; free some, or set HF_HUB_CACHE"
        )


def _pieces(stream: Iterable[bytes], url: str, most: int) -> Iterator[bytes]:
    """The pieces of a body. BadAnswer where it has more than `most` bytes, or pieces of a few bytes each."""
    received = 0
    for count, piece in enumerate(stream):
        received += len(piece)
        if received > most:
            raise bad_answer(url, f"it has more than {max(most, 0)} bytes")
        if count > MOST_SMALL_PIECES + received // MIN_PIECE:
            raise bad_answer(url, "it comes in pieces of a few bytes")
        yield piece


def _drop_body(response: httpx.Response) -> None:
    """Replaces the body of an error or a redirect by nothing, unread."""
    stream: Any = response.stream
    stream.close()
    response.stream = httpx.ByteStream(b"")
    for name in ("content-length", "transfer-encoding"):
        response.headers.pop(name, None)


@contextlib.contextmanager
def _stalled_at_deadline(exchange: Exchange) -> Iterator[None]:
    """Turns the error of a socket at the deadline into HubStalled. An earlier one is left to be retried."""
    try:
        yield
    except Exception as error:
        if time.monotonic() >= exchange.deadline and not isinstance(error, HubStalled):
            raise exchange.stalled() from error
        raise


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _is_hub(url: str) -> bool:
    """Whether a URL is of the user's hub or of huggingface.co, to which a mirror may lead."""
    return _origin(url) in {_origin(hub) for hub in (constants.ENDPOINT, "https://huggingface.co", "https://hf.co")}


def _is_api(url: str) -> bool:
    """Whether a URL of a hub is one of its API, which answers JSON."""
    base = urlsplit(constants.ENDPOINT).path.rstrip("/") if _origin(url) == _origin(constants.ENDPOINT) else ""
    return urlsplit(url).path.startswith(f"{base}/api/")


def _host(url: str) -> str:
    return urlsplit(url).hostname or url
