"""Checks of what a hub answers, before huggingface_hub uses it: headers become names of files in its cache, and JSON
lists the files to download. What passes is passed on without anything that was not checked."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from zoo.checkpoints.files import is_kind, parse_json
from zoo.checkpoints.licenses import KEYS as LICENSE_KEYS
from zoo.errors import UserError
from zoo.limits import MAX_FILE_PATH, MAX_HUB_FILES, MAX_HUB_TAGS, MAX_HUB_VALUES
from zoo.words import one_line

HASH = re.compile(r"[0-9a-fA-F]{32}|[0-9a-fA-F]{40}|[0-9a-fA-F]{64}")  # md5 (some mirrors), git's sha1, sha256
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-fA-F]{64}")
SIZE = re.compile(r"[0-9]{1,18}")
SECONDS = re.compile(r"[0-9]{1,9}")
CONTENT_RANGE = re.compile(r"bytes [0-9]{1,18}-[0-9]{1,18}/[0-9]{1,18}")
RATE_LIMIT = re.compile(r'"\w{1,50}"; ?r=(?P<left>[0-9]{1,9}); ?t=(?P<seconds>[0-9]{1,9})', re.ASCII)
UNSAFE = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]|^[A-Za-z]:")  # control characters, Windows paths, no text

# Headers that huggingface_hub uses and that are checked here. All others are removed from an answer.
KEPT_HEADERS = frozenset(
    (
        "connection", "content-length", "content-range", "content-type", "etag", "link", "location", "ratelimit",
        "retry-after", "transfer-encoding", "x-error-code", "x-error-message", "x-linked-etag", "x-linked-size",
        "x-repo-commit",
    )
)  # fmt: skip
REPOSITORY_API = re.compile(r"/api/(?:models|datasets|spaces)/[^/]+(?:/[^/]+)?(?:/revision/[^/]+)?/?$")
TREE_API = re.compile(r"/api/(?:models|datasets|spaces)/[^/]+(?:/[^/]+)?/tree/[^/]+")


class BadAnswer(UserError):
    """An answer of a hub that cannot be used: it leads outside the cache, states nonsense, or is too large."""


def bad_answer(url: str, problem: str) -> BadAnswer:
    """The error for the answer to a request for `url`."""
    parts = urlsplit(url)
    asked = one_line(f"{parts.hostname}{parts.path}", 150)
    return BadAnswer(f"the answer of {asked} cannot be used: {problem}; try again later, or set another HF_ENDPOINT")


def check_path(path: str) -> None:
    """UserError where the path of a request, still quoted, names a revision that leads out of the cache's folder.

    The cache keeps the commit of a branch or tag in a file of that name.
    """
    for part in path.split("/"):
        name = unquote(part)
        if (part == ".." or "/" in name) and not is_safe_path(name):
            raise UserError(f"revision {name!r}: is not the name of a branch, tag or commit; correct it")


def is_safe_path(name: object) -> bool:
    """Whether a name from a hub is a relative path that stays in its folder, on any system, and can be written."""
    if not isinstance(name, str) or not name or len(name) > MAX_FILE_PATH or UNSAFE.search(name):
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in name.split("/"))


def check_file_headers(url: str, headers: Any, redirects: bool) -> int | None:
    """The size that the answer to a HEAD request for a file states. BadAnswer for unusable headers.

    huggingface_hub names the blob in its cache by the ETag, and the snapshot's folder by the commit.
    """
    etag = headers.get("x-linked-etag") or headers.get("etag")
    if etag is not None and not HASH.fullmatch(etag.lstrip("W/").strip('"')):
        raise bad_answer(url, f"its ETag {one_line(etag, 80)!r} is not a hash")
    size = headers.get("x-linked-size") or (None if redirects else headers.get("content-length"))
    if size is not None and not SIZE.fullmatch(size):
        raise bad_answer(url, f"it states the size {one_line(size, 80)!r}")
    return None if size is None else int(size)


def check_headers(url: str, headers: Any) -> None:
    """Checks the headers that an answer of any kind may have, and removes those that are not checked."""
    for name in [name for name in headers if name.lower() not in KEPT_HEADERS]:
        del headers[name]
    commit = headers.get("x-repo-commit")
    if commit is not None and not COMMIT.fullmatch(commit):
        raise bad_answer(url, f"its X-Repo-Commit {one_line(commit, 80)!r} is not a commit")
    found = headers.get("content-range")
    if found is not None and not CONTENT_RANGE.fullmatch(found):
        raise bad_answer(url, f"its Content-Range is {one_line(found, 80)!r}")
    for name in ("x-error-code", "x-error-message"):
        if name in headers:
            headers[name] = one_line(headers[name], 200).encode("ascii", "replace").decode()


def redirect_target(url: str, location: str) -> str:
    """The absolute URL to which an answer redirects. BadAnswer for one that is not http(s), or leaves https."""
    try:
        target = urljoin(url, location)
        parts = urlsplit(target)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None
        _ = parts.port
    except ValueError:
        usable = False
    if not usable or not target.isprintable():
        raise bad_answer(url, f"it redirects to {one_line(location, 80)!r}")
    if urlsplit(url).scheme == "https" and parts.scheme != "https":
        raise bad_answer(url, f"it redirects to an address without TLS, {one_line(target, 80)!r}")
    return target


def seconds_to_wait(headers: Any) -> int | None:
    """How long a hub asks to wait; None where it does not say. Headers that make no sense are removed."""
    limit = RATE_LIMIT.fullmatch(headers.get("ratelimit", ""))
    if "ratelimit" in headers and limit is None:
        del headers["ratelimit"]
    asked = headers.get("retry-after")
    if asked is not None and not SECONDS.fullmatch(asked):
        del headers["retry-after"]
        asked = None
    waits = [int(asked)] if asked is not None else []
    if limit is not None and limit["left"] == "0":
        waits.append(int(limit["seconds"]))
    return max(waits, default=None)


def checked_json(url: str, data: bytes) -> Any:
    """The JSON of an answer of a hub's API. Of a repository and of a list of files, only what was checked is kept."""
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > MAX_HUB_VALUES:
        raise bad_answer(url, f"it has {values} values, more than {MAX_HUB_VALUES}")
    try:
        value = parse_json(data, "its content")
    except UserError as error:
        raise bad_answer(url, str(error).partition(";")[0]) from error
    path = urlsplit(url).path
    if TREE_API.search(path):
        return [_checked_tree_entry(url, entry) for entry in _entries(url, value)]
    if REPOSITORY_API.search(path):
        return _checked_repository(url, value)
    return value


def _checked_repository(url: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad_answer(url, "it does not describe a repository")
    checked: dict[str, Any] = {"id": value["id"] if isinstance(value.get("id"), str) else "unnamed"}
    if "sha" in value:
        if not isinstance(value["sha"], str) or not COMMIT.fullmatch(value["sha"]):
            raise bad_answer(url, f"its commit is {one_line(repr(value['sha']), 80)}")
        checked["sha"] = value["sha"]
    if value.get("siblings") is not None:
        checked["siblings"] = [_checked_sibling(url, entry) for entry in _entries(url, value["siblings"])]
    tags = value.get("tags")
    if isinstance(tags, list):
        checked["tags"] = [tag for tag in tags if isinstance(tag, str) and len(tag) <= MAX_FILE_PATH][:MAX_HUB_TAGS]
    card = value.get("cardData")
    if isinstance(card, dict):  # only what says the licence
        checked["cardData"] = {key: card[key] for key in LICENSE_KEYS if is_kind(card.get(key), (str, [str]))}
    return checked


def _checked_sibling(url: str, entry: dict[str, Any]) -> dict[str, Any]:
    name = _file_name(url, entry.get("rfilename"))
    checked: dict[str, Any] = {"rfilename": name}
    checked |= {"size": _size(url, name, entry.get("size")), "blobId": _hash(url, name, entry.get("blobId"), HASH)}
    if entry.get("lfs"):
        checked["lfs"] = _checked_lfs(url, name, entry["lfs"], "sha256")
    return checked


def _checked_tree_entry(url: str, entry: dict[str, Any]) -> dict[str, Any]:
    name = _file_name(url, entry.get("path"))
    kind = entry.get("type")
    if kind not in ("file", "directory"):
        raise bad_answer(url, f"{name!r} is neither a file nor a folder")
    checked: dict[str, Any] = {"type": kind, "path": name, "oid": _hash(url, name, entry.get("oid"), HASH)}
    if checked["oid"] is None:
        raise bad_answer(url, f"the hash of {name!r} is missing")
    if kind == "file":
        checked["size"] = _size(url, name, entry.get("size"))
        if checked["size"] is None:
            raise bad_answer(url, f"the size of {name!r} is missing")
        if entry.get("lfs"):
            checked["lfs"] = _checked_lfs(url, name, entry["lfs"], "oid")
    return checked


def _checked_lfs(url: str, name: str, lfs: object, key: str) -> dict[str, Any]:
    if not isinstance(lfs, dict):
        raise bad_answer(url, f"the hash of {name!r} is {one_line(repr(lfs), 80)}")
    found, size = _hash(url, name, lfs.get(key), SHA256), _size(url, name, lfs.get("size"))
    if found is None or size is None:
        raise bad_answer(url, f"the hash or the size of {name!r} is missing")
    return {key: found, "size": size, "pointerSize": 0}


def _entries(url: str, value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise bad_answer(url, "its list of files is not a list of objects")
    if len(value) > MAX_HUB_FILES:
        raise bad_answer(url, f"it lists {len(value)} files, more than {MAX_HUB_FILES}")
    return value


def _file_name(url: str, name: object) -> str:
    if not isinstance(name, str) or not is_safe_path(name):
        raise bad_answer(url, f"it lists a file named {one_line(repr(name), 80)}")
    return name


def _size(url: str, name: str, size: object) -> int | None:
    if size is None:
        return None
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 63:
        raise bad_answer(url, f"the size of {name!r} is {one_line(repr(size), 80)}")
    return size


def _hash(url: str, name: str, found: object, pattern: re.Pattern[str]) -> str | None:
    if found is None:
        return None
    if not isinstance(found, str) or not pattern.fullmatch(found):
        raise bad_answer(url, f"the hash of {name!r} is {one_line(repr(found), 80)}")
    return found
