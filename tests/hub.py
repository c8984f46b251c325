"""A hub on loopback: the few endpoints that huggingface_hub asks when it takes a snapshot."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repository, `org/model`, whose branch `main` and tag `v1` are at commit SHA."""

    folder: Path
    token: str | None = None
    url: str = ""
    served: list[str] = field(default_factory=list)

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:  # noqa: PLR0911 - a table of routes
        """Status, headers and body for a request."""
        if self.token is not None and authorization != f"Bearer {self.token}":
            return 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, b"{}"
        parts = unquote(urlsplit(path).path).strip("/").split("/")
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
                return self._file("/".join(name))
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

    def _file(self, name: str) -> tuple[int, dict[str, str], bytes]:
        content = (self.folder / name).read_bytes()
        self.served.append(name)
        return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA}, content  # noqa: S324


@contextmanager
def serve(folder: Path, token: str | None = None) -> Iterator[Hub]:
    """Serve `folder` as the repository org/model."""
    hub = Hub(folder, token)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path, self.headers.get("Authorization"))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

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
