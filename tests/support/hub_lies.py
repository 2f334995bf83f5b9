"""Answers of a hub that lies: names that lead out of the cache, nonsense, and answers without end."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable
from typing import Any

from tests.support.hub_server import Answer, Handler, Lie

VICTIM = "../../../../victim.txt"  # seen from the folder of blobs in the cache, beside HF_HOME
WEEK = str(7 * 24 * 3600)
MEGABYTE = b" " * (1 << 20)


def with_header(name: str, value: str) -> Lie:
    """The answer with another value of a header; an empty one leaves it out."""
    return lambda handler, answer: dataclasses.replace(answer, headers={**answer.headers, name: value})


def with_status(status: int, **headers: str) -> Lie:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, answer: Answer(status, {"Content-Length": "0", **named}, b"")


def with_body(body: bytes, **headers: str) -> Lie:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, answer: Answer(200, {**answer.headers, "Content-Length": str(len(body)), **named}, body)


def with_json(change: Callable[[Any], Any]) -> Lie:
    """The answer with its JSON changed: `change` returns the new value, or changes the old one."""

    def lie(handler: Handler, answer: Answer) -> Answer:
        value = json.loads(answer.body)
        new = change(value)
        body = json.dumps(value if new is None else new).encode()
        return dataclasses.replace(answer, body=body, headers={**answer.headers, "Content-Length": str(len(body))})

    return lie


def with_file_name(name: str) -> Lie:
    """The list of files with one more."""

    def change(value: Any) -> None:
        entries = value if isinstance(value, list) else value["siblings"]
        entries.append({**entries[0], "rfilename": name, "path": name})

    return with_json(change)


def raw(send: Callable[[Handler, Callable[[bytes], None]], None]) -> Lie:
    """What `send` writes to the connection, instead of an answer."""

    def lie(handler: Handler, answer: Answer) -> None:
        send(handler, handler.wfile.write)

    return lie


def endless_body(status: int = 200, chunk: bytes = MEGABYTE, chunked: bool = False, **headers: str) -> Lie:
    """A body without end, at most four gigabytes, of no stated length."""

    def send(handler: Handler, write: Callable[[bytes], None]) -> None:
        head = [f"HTTP/1.1 {status} OK", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
        head.append("Transfer-Encoding: chunked" if chunked else "Connection: close")
        write("\r\n".join([*head, "", ""]).encode())
        piece = b"%x\r\n%s\r\n" % (len(chunk), chunk) if chunked else chunk
        for _ in range((4 << 30) // len(chunk)):
            if handler.hub.closing.is_set():
                break
            write(piece)

    return raw(send)


def stalled(before: bytes = b"", every: float = 60.0, piece: bytes = b"") -> Lie:
    """Sends `before`, then `piece` every so many seconds, without end."""

    def send(handler: Handler, write: Callable[[bytes], None]) -> None:
        write(before)
        while not handler.hub.closing.wait(every):
            write(piece)

    return raw(send)


def next_page(target: Callable[[Handler], str]) -> Lie:
    """The answer with a link to a next page."""
    return lambda handler, answer: dataclasses.replace(
        answer, headers={**answer.headers, "Link": f'<{target(handler)}>; rel="next"'}
    )


def new_page(handler: Handler) -> str:
    return f"{handler.hub.url}{handler.path.split('?')[0]}?cursor={len(handler.hub.log)}"


def to_other_host(handler: Handler) -> str:
    return f"{handler.hub.cdn}{handler.path}"


def redirect(target: Callable[[Handler], str]) -> Lie:
    return lambda handler, answer: Answer(302, {"Content-Length": "0", "Location": target(handler)}, b"")


def gzip_bomb(size: int = 1 << 30) -> bytes:
    """A few hundred kilobytes that decompress to a gigabyte of spaces."""
    block = gzip.compress(b" " * (1 << 24))
    return block * (size >> 24)


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
TREE_ENTRY = {"type": "file", "path": "a", "size": 1, "oid": "0" * 40}


def many_files(value: Any) -> Any:
    if isinstance(value, list):
        return [{**TREE_ENTRY, "path": f"{i}.bin"} for i in range(100_001)]
    value["siblings"] += [{"rfilename": f"{i}.bin"} for i in range(100_001)]
    return value


# name -> (kinds of requests, the lie, a pattern of the message; None where the answer is to be accepted)
LIES: dict[str, tuple[tuple[str, ...], Lie, str | None]] = {
    "etag-climbs": ((f"head {CONFIG}",), with_header("ETag", f'"{VICTIM}"'), "ETag"),
    "etag-of-weights-climbs": ((f"head {WEIGHTS}",), with_header("ETag", f'"{VICTIM}"'), "ETag"),
    "weak-etag-climbs": ((f"head {CONFIG}",), with_header("ETag", f'W/"{VICTIM}"'), "ETag"),
    "linked-etag-climbs": ((f"head {CONFIG}",), with_header("X-Linked-Etag", f'"{VICTIM}"'), "ETag"),
    "etag-absolute": ((f"head {CONFIG}",), with_header("ETag", "/tmp/headstart-victim"), "ETag"),
    "etag-two": ((f"head {CONFIG}",), with_header("ETag", '"a", "b"'), "ETag"),
    "etag-missing": ((f"head {CONFIG}",), with_header("ETag", ""), "no ETag"),
    "etag-weak-hash": ((f"head {CONFIG}",), with_header("ETag", f'W/"{"0a" * 20}"'), None),
    "commit-climbs": ((f"head {CONFIG}",), with_header("X-Repo-Commit", "../../../../victim"), "X-Repo-Commit"),
    "commit-word": ((f"head {CONFIG}",), with_header("X-Repo-Commit", "main"), "X-Repo-Commit"),
    "commit-missing": ((f"head {CONFIG}",), with_header("X-Repo-Commit", ""), "no ETag"),
    "commit-of-missing-file": (
        (f"head {CONFIG}",),
        with_status(404, X_Error_Code="EntryNotFound", X_Repo_Commit="../../../../victim"),
        "X-Repo-Commit",
    ),
    "size-negative": ((f"head {CONFIG}",), with_header("X-Linked-Size", "-5"), "size"),
    "size-word": ((f"head {CONFIG}",), with_header("X-Linked-Size", "many"), "size"),
    "size-enormous": ((f"head {CONFIG}",), with_header("X-Linked-Size", "9" * 40), "size"),
    "size-of-config-9-gb": ((f"head {CONFIG}",), with_header("X-Linked-Size", "9000000000"), "more than"),
    "redirect-to-file": ((f"head {CONFIG}", f"get {CONFIG}"), redirect(lambda h: "file:///etc/passwd"), "redirects"),
    "etag-climbs-with-location": (
        (f"head {CONFIG}",),
        lambda handler, answer: dataclasses.replace(
            answer, headers={**answer.headers, "ETag": f'"{VICTIM}"', "Location": handler.path}
        ),
        "ETag",
    ),
    "redirect-to-ftp": ((f"get {CONFIG}",), redirect(lambda h: "ftp://127.0.0.1/x"), "redirects"),
    "redirect-with-password": ((f"get {CONFIG}",), redirect(lambda h: "http://a:b@127.0.0.1/x"), "redirects"),
    "redirect-nowhere": ((f"get {CONFIG}",), with_status(302), "without an address"),
    "redirect-circle": (("info", f"get {CONFIG}"), redirect(lambda h: h.path), "circle"),
    "redirect-circle-of-head": ((f"head {CONFIG}",), redirect(lambda h: h.path), "circle"),
    "content-range-word": ((f"get {CONFIG}",), with_header("Content-Range", "bytes 0-1/x"), "Content-Range"),
    "page-links-to-itself": (("tree",), next_page(lambda h: f"{h.hub.url}{h.path}"), "no end"),
    "pages-without-end": (("tree",), next_page(new_page), "no end"),
    "page-on-other-host": (("tree",), next_page(to_other_host), "another host"),
    "info-page-links": (("info",), next_page(lambda h: f"{h.hub.url}{h.path}"), "no end"),
    "info-without-end": (("info", f"get {CONFIG}"), endless_body(), "more than"),
    "info-without-end-chunked": (("info", f"get {CONFIG}"), endless_body(chunked=True), "more than"),
    "tree-without-end": (("tree",), endless_body(), "more than"),
    "body-in-single-bytes": (("info",), endless_body(chunk=b" ", chunked=True), "pieces|no progress"),
    "error-without-end": ((f"head {CONFIG}", "info"), endless_body(404), "no such"),
    "error-403-without-end": (("info", f"head {CONFIG}"), endless_body(403), "restricted"),
    "head-without-end": (("*",), raw(lambda h, write: write(HEAD + b"X: " + MEGABYTE)), "reach|before its body"),
    "many-headers": (("*",), raw(lambda h, write: write(HEAD + b"a: b\r\n" * 200_000)), "reach|before its body"),
    "continue-without-end": (("*",), raw(lambda h, write: write(CONTINUE * 200_000)), "before its body|no progress"),
    "switching-protocols": (("*",), raw(lambda h, write: write(b"HTTP/1.1 101 Go\r\n\r\n")), "reach|before its body"),
    "no-http": (("*",), raw(lambda h, write: write(b"\x00\xff" * 500)), "reach|before its body"),
    "stalled": (("*",), stalled(), "no progress"),
    "stalled-info": (("info", f"get {CONFIG}"), stalled(HEAD + b"Content-Length: 100\r\n\r\n{"), "no progress"),
    "dripping-head": (("*",), stalled(b"HTTP/1.1 200 OK\r\nX-A: ", 0.1, b"a"), "no progress"),
    "dripping-body": (
        ("info", f"get {CONFIG}"), stalled(HEAD + b"Connection: close\r\n\r\n{", 0.1, b" "), "no progress"
    ),
    "dripping-chunk-size": (
        ("info", f"get {CONFIG}"), stalled(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1", 0.1, b"0"), "no progress"
    ),
    "busy-for-a-week": (("info", f"head {CONFIG}"), with_status(429, Retry_After=WEEK), "busy"),
    "busy-rate-limit": (
        ("info", f"head {CONFIG}"), with_status(429, RateLimit=f'"api";r=0;t={WEEK}'), "busy"
    ),
    "busy-negative": (("info", f"head {CONFIG}"), with_status(429, Retry_After="-5"), "429"),
    "busy-nonsense": (("info", f"head {CONFIG}"), with_status(503, Retry_After="\xb2"), "503"),
    "busy-long-number": (("info", f"head {CONFIG}"), with_status(429, RateLimit='"api";r=0;t=' + "9" * 5000), "429"),
    "gzip-bomb": (("info", "tree", f"get {CONFIG}"), with_body(gzip_bomb(), Content_Encoding="gzip"), "compressed"),
    "json-html": (("info", "tree"), with_body(b"<html>"), "not valid JSON"),
    "json-list": (("info",), with_json(lambda v: [v]), "does not describe"),
    "json-deep": (("info", "tree"), with_body(b"[" * 100_000), "not valid JSON"),
    "json-many-values": (("info", "tree"), with_body(b"[" + b"{}," * 9_000_000 + b"{}]"), "values"),
    "json-long-number": (("info",), with_body(b'{"sha": ' + b"9" * 100_000 + b"}"), "not valid JSON"),
    "json-many-files": (("info", "tree"), with_json(many_files), "files"),
    "sha-climbs": (("info",), with_json(lambda v: v.update(sha="../../../../victim")), "commit"),
    "sha-number": (("info",), with_json(lambda v: v.update(sha=7)), "commit"),
    "sha-missing": (("info",), with_json(lambda v: v.pop("sha") and None), "no commit"),
    "siblings-object": (("info",), with_json(lambda v: v.update(siblings={"a": 1})), "list of objects"),
    "name-climbs": (("info", "tree"), with_file_name(VICTIM), "lists a file"),
    "name-absolute": (("info", "tree"), with_file_name("/tmp/headstart-victim.json"), "lists a file"),
    "name-backslash": (("info", "tree"), with_file_name("..\\..\\victim.json"), "lists a file"),
    "name-nul": (("info", "tree"), with_file_name("a\x00.json"), "lists a file"),
    "name-surrogate": (("info", "tree"), with_file_name("a\udc80.json"), "not valid JSON"),
    "name-long": (("info", "tree"), with_file_name("a" * 300 + ".json"), "lists a file"),
    "size-of-file-is-text": (("info",), with_json(lambda v: v["siblings"][0].update(size="1")), "size of"),
    "hash-of-file-climbs": (("info",), with_json(lambda v: v["siblings"][0].update(blobId=VICTIM)), "hash of"),
    "lfs-without-hash": (("info",), with_json(lambda v: v["siblings"][0].update(lfs={"size": 1})), "hash or the size"),
    "tags-of-numbers": (("info",), with_json(lambda v: v.update(tags=[1, None, {}], cardData={"license": 3})), None),
    "card-as-text": (("info",), with_json(lambda v: v.update(cardData="mit", safetensors=5, createdAt=[])), None),
}  # fmt: skip
