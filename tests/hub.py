"""A hub on loopback: the few endpoints that huggingface_hub asks, files by `Range` as the store of large files has them.

`python -m tests.hub FOLDER --rate 125e6` serves a folder as org/model until it is ended, for trials and benchmarks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from socket import socket
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

SHA = "0123456789abcdef0123456789abcdef01234567"
OTHER_SHA = "89abcdef0123456789abcdef0123456789abcdef"
_LARGE = (".safetensors", ".gguf", "tokenizer.json", ".npy", ".bin")
_PIECE = 128 << 10


class Bucket:
    """A link of `rate` bytes a second that all connections share; a tenth of a second may come at once."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait(self, nbytes: int) -> None:
        """Wait until the link has carried `nbytes` more."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - 0.1) + nbytes / self.rate
            pause = self._free_at - now
        if pause > 0:
            time.sleep(pause)


@dataclass(frozen=True)
class Part:
    """The bytes of a file from `start` on, which are sent piece by piece."""

    path: Path
    start: int
    nbytes: int


Answer = tuple[int, dict[str, str], bytes | Part]
"""Status, headers and body."""


@dataclass
class Hub:
    """Repositories whose branch `main` and tag `v1` are at commit SHA: `folder` is org/model, `others` more by name.

    `has_store` sends those who ask for a large file on to another address, which refuses tokens; an address of the store
    is good for `store_uses` requests. `knows_ranges` is false for a server that always sends the whole file. Of the
    requests for files the first `failures` are answered with 503, the first `busy` with 429 and Retry-After; of those for
    ranges the first `cuts` end after half of the bytes, the first `shorts` promise and send half. `flipped` names a file
    of which one byte arrives changed, `moved_after` is the number of requests for files after which another commit answers.
    `tells` is what the Hub says of files: their hashes, only sizes, or nothing; files of more than `hashed_bytes` have a
    hash of zeros. `rate` is bytes a second.
    """

    folder: Path
    token: str | None = None
    url: str = ""
    others: Mapping[str, Path] = field(default_factory=dict)
    served: list[str] = field(default_factory=list)
    requests: int = 0
    sent_bytes: int = 0
    has_store: bool = False
    store_uses: int = 1 << 30
    knows_ranges: bool = True
    failures: int = 0
    busy: int = 0
    retry_after: str = "0"
    cuts: int = 0
    shorts: int = 0
    flipped: str = ""
    moved_after: int | None = None
    tells: str = "hashes"
    hashed_bytes: int = 1 << 40
    rate: float | None = None
    tokens_in_store: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[str, int] = {}
        self._signatures = count()
        self.bucket = Bucket(self.rate) if self.rate else None

    def answer(self, path: str, headers: Mapping[str, str]) -> Answer:
        """Status, headers and body for a request."""
        with self._lock:
            self.requests += 1
            return self._route(path, headers.get("Authorization"), headers.get("Range"))

    def note_sent(self, nbytes: int) -> None:
        """Count bytes of bodies."""
        with self._lock:
            self.sent_bytes += nbytes

    def takes(self, fault: str) -> bool:
        """Whether a fault is due; then there is one less."""
        left = getattr(self, fault)
        setattr(self, fault, max(left - 1, 0))
        return bool(left)

    def _route(  # noqa: PLR0911 - a table of routes
        self, path: str, authorization: str | None, span: str | None
    ) -> Answer:
        url = urlsplit(path)
        if path.startswith("/store/"):
            return self._stored(path, authorization, span)
        if self.token is not None and authorization != f"Bearer {self.token}":
            return 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, b"{}"
        parts = unquote(url.path).strip("/").split("/")
        if "datasets" in parts[:2]:  # asked for as a data set; the same files
            parts = ["api", "models", *parts[2:]] if parts[0] == "api" else parts[1:]
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        folder = {"org/model": self.folder, **self.others}.get(repo)
        if folder is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        match parts[4:] if parts[0] == "api" else parts[2:]:
            case [] | ["revision", ("main" | "v1" | "0123456789abcdef0123456789abcdef01234567")] if parts[0] == "api":
                return self._information(repo, folder, has_blobs="blobs" in parse_qs(url.query))
            case ["tree", *_] if parts[0] == "api":
                return 200, {}, json.dumps(self._tree(folder)).encode()
            case ["revision", _]:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            case ["resolve", _, *name] if (folder / "/".join(name)).is_file():
                return self._resolved(repo, folder, "/".join(name), span)
            case ["resolve", *_] if path.startswith("/datasets"):
                return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
            case _:
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def _stored(self, path: str, authorization: str | None, span: str | None) -> Answer:
        if authorization:
            self.tokens_in_store.append(authorization)
            return 400, {}, b"a token"
        self._uses[path] = self._uses.get(path, 0) + 1
        if self._uses[path] > self.store_uses:
            return 403, {}, b"the signature has expired"
        org, model, *name = unquote(urlsplit(path).path.removeprefix("/store/")).split("/")
        folder = {"org/model": self.folder, **self.others}[f"{org}/{model}"]
        return self._file(folder, "/".join(name), span)

    def _resolved(self, repo: str, folder: Path, name: str, span: str | None) -> Answer:
        moved = self.moved_after is not None and len(self.served) >= self.moved_after
        commit = OTHER_SHA if moved else SHA
        if self.has_store and name.endswith(_LARGE):
            store = (
                f"{self.url.replace('127.0.0.1', 'localhost')}/store/{repo}/{name}?signature={next(self._signatures)}"
            )
            return 302, {"Location": store, "X-Repo-Commit": commit}, b""
        status, headers, body = self._file(folder, name, span)
        return status, {**headers, "X-Repo-Commit": commit}, body

    def _names(self, folder: Path) -> list[str]:
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())

    def _information(self, repo: str, folder: Path, *, has_blobs: bool) -> tuple[int, dict[str, str], bytes]:
        siblings = [{"rfilename": name} for name in self._names(folder)]
        if has_blobs and self.tells != "nothing":
            siblings = [{"rfilename": name, **self._blob(folder / name)} for name in self._names(folder)]
        return 200, {}, json.dumps({"id": repo, "sha": SHA, "siblings": siblings}).encode()

    def _blob(self, path: Path) -> dict[str, Any]:
        size = path.stat().st_size
        if self.tells == "sizes":
            return {"size": size}
        sha256, blob = hashes(path, path.stat().st_mtime_ns) if size <= self.hashed_bytes else ("0" * 64, "0" * 40)
        lfs = {"sha256": sha256, "size": size, "pointerSize": 134}
        return {"size": size, "blobId": blob, **({"lfs": lfs} if path.name.endswith(_LARGE) else {})}

    def _tree(self, folder: Path) -> list[dict[str, object]]:
        blobs = {name: self._blob(folder / name) for name in self._names(folder)}
        return [
            {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": blob.get("blobId", "")}
            for name, blob in blobs.items()
        ]

    def _file(self, folder: Path, name: str, span: str | None) -> Answer:
        self.served.append(name)
        if self.takes("failures"):
            return 503, {}, b""
        if self.takes("busy"):
            return 429, {"Retry-After": self.retry_after}, b""
        path = folder / name
        size = path.stat().st_size
        tag = {"ETag": f'"{path.stat().st_mtime_ns:x}-{size:x}"'}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", span or "") if self.knows_ranges else None
        if match is None:
            return 200, tag, Part(path, 0, size)
        start, end = int(match[1]), min(int(match[2]), size - 1)
        if start > end:
            return 416, {"Content-Range": f"bytes */{size}"}, b""
        if self.takes("shorts"):
            end = (start + end) // 2
        return 206, {**tag, "Content-Range": f"bytes {start}-{end}/{size}"}, Part(path, start, end + 1 - start)


@lru_cache(maxsize=1000)
def hashes(path: Path, _time: int) -> tuple[str, str]:
    """SHA-256 of a file, and its name as a git blob."""
    sha256 = hashlib.sha256()
    blob = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())  # noqa: S324
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            sha256.update(data)
            blob.update(data)
    return sha256.hexdigest(), blob.hexdigest()


def send(hub: Hub, connection: socket, body: bytes | Part, *, is_range: bool) -> bool:
    """Send a body, at the link's pace and with the faults that are due; whether it was cut."""
    if isinstance(body, bytes):
        connection.sendall(body)
        hub.note_sent(len(body))
        return False
    is_cut = is_range and body.nbytes > 1 and hub.takes("cuts")
    position, end = body.start, body.start + (body.nbytes // 2 if is_cut else body.nbytes)
    with body.path.open("rb") as file:
        last = os.fstat(file.fileno()).st_size - 1
        while position < end:
            nbytes = min(end - position, _PIECE)
            if hub.bucket is not None:
                hub.bucket.wait(nbytes)
            if body.path.name == hub.flipped and position + nbytes > last:
                data = bytearray(os.pread(file.fileno(), nbytes, position))
                data[last - position] ^= 1
                connection.sendall(data)
            else:
                nbytes = os.sendfile(connection.fileno(), file.fileno(), position, nbytes)
            position += nbytes
            hub.note_sent(nbytes)
    return is_cut


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    """Answers requests for `hub`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path, self.headers)
            nbytes = body.nbytes if isinstance(body, Part) else len(body)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(nbytes)}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                with suppress(ConnectionError):  # who asked may have seen enough
                    self.wfile.flush()
                    self.close_connection |= send(hub, self.connection, body, is_range=status == 206)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.do_GET()

        do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


@contextmanager
def serve(folder: Path, token: str | None = None, port: int = 0, **options: Any) -> Iterator[Hub]:
    """Serve `folder` as the repository org/model; `options` are the Hub's."""
    hub = Hub(folder, token, **options)
    server = _Server(("127.0.0.1", port), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def as_the_hub(folder: Path, patch: pytest.MonkeyPatch, cache: Path, **options: Any) -> Iterator[Hub]:
    """Serve a folder and let huggingface_hub, in this process, take the server for the hub and `cache` for its cache."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        patch.delenv(name, raising=False)
    patch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr("qtool.retries.FIRST_PAUSE", 0.01)
    with serve(folder, **options) as hub:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        yield hub


def main() -> None:
    """Serve a folder until the process is ended; the first line of output is the address."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rate", type=float, help="bytes a second")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--token")
    parser.add_argument("--other", action="append", default=[], metavar="ORG/NAME=FOLDER")
    options = parser.parse_args()
    others = {name: Path(folder) for name, folder in (each.split("=", 1) for each in options.other)}
    for path in (each for folder in (options.folder, *others.values()) for each in folder.rglob("*") if each.is_file()):
        hashes(path, path.stat().st_mtime_ns)
    with serve(options.folder, options.token, options.port, rate=options.rate, others=others) as hub:
        sys.stdout.write(f"{hub.url}\n")
        sys.stdout.flush()
        threading.Event().wait()


if __name__ == "__main__":
    main()
