"""A small server that speaks the part of the hub's HTTP API that downloads use, with faults and lies on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import constants, hf_api


@dataclass
class Answer:
    """An answer before it is sent."""

    status: int
    headers: dict[str, str]
    body: bytes


# Changes an honest answer, or sends something else through the handler and returns None.
Lie = Callable[["Handler", Answer], Answer | None]


@dataclass
class Repo:
    """Files of one commit. `faults`: kind of request (info, tree, head, get) + " " + file -> what to do wrong with the
    next requests of that kind, in order: 429, 503, drop (hang up), truncate, short, corrupt. `lies`: the same kinds, or
    "*" for all -> what is done to every answer of that kind."""

    files: dict[str, bytes]
    license: str | None = "mit"
    branches: dict[str, str] = field(default_factory=dict)  # branch -> commit
    redirect: bool = False
    faults: dict[str, list[str]] = field(default_factory=dict)
    gated: bool = False
    lies: dict[str, Lie] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(n.encode() + d for n, d in sorted(self.files.items()))).hexdigest()

    def lfs(self, name: str) -> bool:
        return name.endswith((".safetensors", ".bin", ".gguf"))

    def oid(self, name: str) -> str:
        data = self.files[name]
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Hub:
    url: str
    repos: dict[str, Repo]
    log: list[str] = field(default_factory=list)  # "METHOD path" of every request
    tokens: list[tuple[str, str]] = field(default_factory=list)  # (Host, Authorization) of every request with a token
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def cdn(self) -> str:
        """The same server under another host name: the hub redirects large files to a host that is not its own."""
        return self.url.replace("127.0.0.1", "localhost")


class Handler(BaseHTTPRequestHandler):
    """Answers for the `hub` that a subclass names."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a head and its body are two writes: each answer would take 40 milliseconds

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = urlparse(self.path).path  # still quoted: a branch may hold a slash
        self.hub.log.append(f"{self.command} {path}")
        self.lie: Lie | None = None
        if token := self.headers.get("Authorization"):
            self.hub.tokens.append((self.headers["Host"], token))
        if match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.about(match[1], unquote(match[2] or "main"), "info")
        elif match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/(.+)", path):
            self.about(match[1], unquote(match[2]), "tree")
        elif match := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(*map(unquote, match.groups()))
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self.body(self.hub.repos[match[1]], match[2])
        else:
            self.send(404, {"X-Error-Code": "RepoNotFound"})

    def find(self, name: str, revision: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self.send(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif repo.gated:
            self.send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            return None
        elif revision not in ("main", repo.commit, *repo.branches):
            self.send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Revision not found"})
            return None
        return repo

    def about(self, name: str, revision: str, kind: str) -> None:
        repo = self.find(name, revision)
        if repo is None or self.fault(repo, kind):
            return
        self.lie = repo.lies.get(kind, repo.lies.get("*"))
        if kind == "tree":
            value: object = [
                {"type": "file", "path": n, "size": len(d), "oid": repo.oid(n)} | self.pointer(repo, n, "oid")
                for n, d in repo.files.items()
            ]
        else:
            siblings = [
                {"rfilename": n, "size": len(d), "blobId": repo.oid(n)} | self.pointer(repo, n, "sha256")
                for n, d in repo.files.items()
            ]
            value = {"id": name, "modelId": name, "sha": repo.commit, "siblings": siblings, "tags": []}
            value["cardData"] = {"license": repo.license} if repo.license else {}
        self.send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def pointer(self, repo: Repo, name: str, key: str) -> dict[str, object]:
        data = repo.files[name]
        lfs = {key: hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return {"lfs": lfs} if repo.lfs(name) else {}

    def file(self, name: str, revision: str, file: str) -> None:
        repo = self.find(name, revision)
        if repo is None:
            return
        about = {"X-Repo-Commit": repo.commit}
        self.lie = repo.lies.get(f"{self.command.lower()} {file}", repo.lies.get("*"))
        if file not in repo.files:
            self.send(404, about | {"X-Error-Code": "EntryNotFound"})
            return
        data = repo.files[file]
        etag = hashlib.sha256(data).hexdigest() if repo.lfs(file) else repo.oid(file)
        if repo.redirect and repo.lfs(file):
            about |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{etag}"'}
            self.send(302, about | {"Location": f"{self.hub.cdn}/cdn/{name}/{file}"})
        elif self.command == "HEAD":
            if not self.fault(repo, f"head {file}"):
                self.send(200, about | {"ETag": f'"{etag}"', "Content-Length": str(len(data))})
        else:
            self.body(repo, file, about | {"ETag": f'"{etag}"'})

    def body(self, repo: Repo, file: str, headers: dict[str, str] | None = None) -> None:
        self.lie = repo.lies.get(f"get {file}", repo.lies.get("*"))
        data, status, headers = repo.files[file], 200, dict(headers or {})
        if ranged := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(ranged[1]), min(int(ranged[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        fault = self.fault(repo, f"get {file}")
        if fault == "truncate":  # promises all, sends half, hangs up
            self.send(status, headers | {"Content-Length": str(len(data))}, data[: len(data) // 2])
            self.close_connection = True
        elif fault == "short":  # promises nothing, sends half
            self.send(status, headers | {"Connection": "close", "Content-Length": ""}, data[: len(data) // 2])
            self.close_connection = True
        elif fault == "corrupt":
            self.send(status, headers, data[:-1] + bytes([data[-1] ^ 1]))
        elif not fault:
            self.send(status, headers, data)

    def fault(self, repo: Repo, kind: str) -> str | None:
        """Takes the next fault of this kind; a status is answered here."""
        queue = repo.faults.get(kind, [])
        fault = queue.pop(0) if queue else None
        if fault == "drop":
            self.close_connection = True
        elif fault is not None and fault.isdigit():
            self.send(int(fault), {"Retry-After": "0"})
        return fault

    def send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        answer: Answer | None = Answer(status, {"Content-Length": str(len(body))} | headers, body)
        if self.lie is not None:
            answer = self.lie(self, answer)  # type: ignore[arg-type]
        if answer is None:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client hangs up in the middle of a lie
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().finish()


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on a free port of the loopback interface."""
    hub = Hub("", {})
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield hub
        finally:
            hub.closing.set()
            server.shutdown()


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str, home: Path) -> None:
    """Does in this process what HF_ENDPOINT and HF_HOME do in one that starts: they are read at import."""
    for name in (*os.environ, "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if name.lower().endswith("_proxy") or name.endswith("_TOKEN"):
            monkeypatch.delenv(name, raising=False)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    values = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(home / "hub")}
    for name, value in (values | {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_TELEMETRY": True}).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", address)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
