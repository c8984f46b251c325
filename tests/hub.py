"""A hub on loopback: the few endpoints that huggingface_hub asks, and files by `Range` as the store of large files has."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repository, `org/model`, whose branch `main` and tag `v1` are at commit SHA.

    `has_store` sends those who ask for a file on to another address, which refuses tokens; `knows_ranges` is false for a
    server that always sends the whole file; the first `failures` requests for files are answered with 503.
    """

    folder: Path
    token: str | None = None
    url: str = ""
    served: list[str] = field(default_factory=list)
    requests: int = 0
    sent_bytes: int = 0
    has_store: bool = False
    knows_ranges: bool = True
    failures: int = 0

    def answer(self, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a request."""
        status, answered, body = self._route(path, headers.get("Authorization"), headers.get("Range"))
        self.requests += 1
        self.sent_bytes += len(body)
        return status, answered, body

    def _route(self, path: str, authorization: str | None, span: str | None) -> tuple[int, dict[str, str], bytes]:  # noqa: PLR0911 - a table of routes
        if path.startswith("/store/"):
            return (400, {}, b"a token") if authorization else self._file(unquote(path.removeprefix("/store/")), span)
        if self.token is not None and authorization != f"Bearer {self.token}":
            return 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, b"{}"
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if "datasets" in parts[:2]:  # asked for as a data set; the same files
            parts = ["api", "models", *parts[2:]] if parts[0] == "api" else parts[1:]
        match parts:
            case [
                "api",
                "models",
                "org",
                "model",
                "revision",
                ("main" | "v1" | "0123456789abcdef0123456789abcdef01234567"),
            ]:
                return self._information()
            case ["api", "models", "org", "model"]:
                return self._information()
            case ["api", "models", "org", "model", "tree", *_]:
                return 200, {}, json.dumps(self._tree()).encode()
            case ["api", "models", "org", "model", "revision", _]:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            case ["org", "model", "resolve", _, *name] if (self.folder / "/".join(name)).is_file():
                store = self.url.replace("127.0.0.1", "localhost") + "/store/" + "/".join(name)
                return (302, {"Location": store}, b"") if self.has_store else self._file("/".join(name), span)
            case ["org", "model", "resolve", *_] if path.startswith("/datasets"):
                return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
            case _:
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def _names(self) -> list[str]:
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())

    def _information(self) -> tuple[int, dict[str, str], bytes]:
        siblings = [{"rfilename": name} for name in self._names()]
        return 200, {}, json.dumps({"id": "org/model", "sha": SHA, "siblings": siblings}).encode()

    def _tree(self) -> list[dict[str, object]]:
        sizes = {name: (self.folder / name).stat().st_size for name in self._names()}
        return [
            {"type": "file", "path": name, "size": size, "oid": name.encode().hex()} for name, size in sizes.items()
        ]

    def _file(self, name: str, span: str | None) -> tuple[int, dict[str, str], bytes]:
        self.served.append(name)
        if self.failures:
            self.failures -= 1
            return 503, {}, b""
        path = self.folder / name
        size = path.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", span or "") if self.knows_ranges else None
        if match is None:
            content = path.read_bytes()
            tag = f'"{hashlib.sha1(content).hexdigest()}"'  # noqa: S324
            return 200, {"ETag": tag, "X-Repo-Commit": SHA}, content
        start, end = int(match[1]), min(int(match[2]), size - 1)
        if start > end:
            return 416, {"Content-Range": f"bytes */{size}"}, b""
        with path.open("rb") as file:
            file.seek(start)
            return 206, {"Content-Range": f"bytes {start}-{end}/{size}"}, file.read(end + 1 - start)


@contextmanager
def serve(folder: Path, token: str | None = None, **options: Any) -> Iterator[Hub]:
    """Serve `folder` as the repository org/model; `options` are the Hub's."""
    hub = Hub(folder, token, **options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path, self.headers)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                with suppress(ConnectionError):  # who asked may have seen enough
                    self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.do_GET()

        do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
