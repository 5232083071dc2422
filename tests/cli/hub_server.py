"""A server of files as the Hugging Face hub is one: a list, redirects, parts of files, tags, and cut connections."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Files of a folder as USER/MODEL.

    Attributes
    ----------
    log : list of (method, path, Range or "")
    cut_after : list of int
        The next answers end after so many bytes, each once.
    token : str or None
        That the hub asks for; its store of files must not see it.
    ranges : bool
        Whether parts are given.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.log: list[tuple[str, str, str]] = []
        self.cut_after: list[int] = []
        self.token: str | None = None
        self.ranges = True
        self.sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def store_url(self) -> str:
        """Another host, as far as a client knows."""
        return f"http://localhost:{self.server_address[1]}/store"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves is none."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, *, has_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.log.append((self.command, path, self.headers.get("Range", "")))
        said = self.headers.get("Authorization")
        is_store = path.startswith("/store/")
        if is_store and said:
            return self._send(400, b"a token went to where it should not", has_body)
        if self.server.token and not is_store and said != f"Bearer {self.server.token}":
            return self._send(401, b"", has_body)
        if path.startswith("/api/models/"):
            return self._list(path.removeprefix("/api/models/"), has_body)
        match = re.fullmatch(r"/[^/]+/[^/]+/resolve/\w+/(.+)", path)
        file = self.server.folder / (match[1] if match else path.removeprefix("/store/"))
        if not file.is_file():
            return self._send(404, b"", has_body, {"X-Error-Code": "EntryNotFound"})
        tag = hashlib.sha256(file.read_bytes()).hexdigest()
        if match is not None:
            size = str(file.stat().st_size)
            more = {"Location": f"{self.server.store_url}/{match[1]}", "X-Repo-Commit": COMMIT}
            return self._send(302, b"", has_body, more | {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": size})
        self._file(file.read_bytes(), tag, has_body)

    def _list(self, name: str, has_body: bool) -> None:
        if not name.startswith("user/model"):
            return self._send(404, b"", has_body, {"X-Error-Code": "RepoNotFound"})
        files = [p for p in sorted(self.server.folder.rglob("*")) if p.is_file()]
        siblings = [{"rfilename": str(p.relative_to(self.server.folder)), "size": p.stat().st_size} for p in files]
        body = {"id": "user/model", "sha": COMMIT, "siblings": siblings}
        self._send(200, json.dumps(body).encode(), has_body, {"Content-Type": "application/json"})

    def _file(self, data: bytes, tag: str, has_body: bool) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or not self.server.ranges:
            return self._send(200, data, has_body, {"ETag": f'"{tag}"'})
        start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        where = {"Content-Range": f"bytes {start}-{end}/{len(data)}", "ETag": f'"{tag}"'}
        self._send(206, data[start : end + 1], has_body, where)

    def _send(self, status: int, data: bytes, has_body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not has_body:
            return
        if status == 206 and self.server.cut_after:
            data = data[: self.server.cut_after.pop(0)]
            self.close_connection = True
        self.server.sent += len(data) if status == 206 else 0
        self.wfile.write(data)


@contextmanager
def hub_server(folder: Path) -> Iterator[HubServer]:
    """One that runs."""
    server = HubServer(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
