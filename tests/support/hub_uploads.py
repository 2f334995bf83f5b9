"""A hub on the loopback interface that takes uploads: repositories are created, files arrive in commits."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse


class _Uploads(BaseHTTPRequestHandler):
    """Keeps the files of commits in the `files` that a subclass names."""

    files: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send(404, {}, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = urlparse(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/repos/create":
            name = json.loads(body)
            owner = f"{name['organization']}/" if name.get("organization") else ""
            self._send(200, {"url": f"http://{self.headers['Host']}/{owner}{name['name']}"})
        elif "/preupload/" in path:
            about = {"uploadMode": "regular", "shouldIgnore": False}
            self._send(200, {"files": [{"path": f["path"], **about} for f in json.loads(body)["files"]]})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            commit = {"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/1", "commitOid": "1" * 40}
            self._send(200, commit)
        else:  # validation of cards
            self._send(200, {})

    def _send(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve_uploads() -> Iterator[tuple[str, dict[str, bytes]]]:
    """(the address of a hub, the files that were uploaded to it)."""
    files: dict[str, bytes] = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), type("BoundUploads", (_Uploads,), {"files": files})) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", files
        finally:
            server.shutdown()
