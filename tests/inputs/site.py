"""A web site on loopback with the habits of bad ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """`/NUMBER` answers with that status, `/endless` never stops, `/hangs` sends a byte and then nothing.

    `/away/…` sends one on to the rest of the path; the first `failures` requests are answered with 503.
    """

    pages: Mapping[str, bytes]
    failures: int = 0
    url: str = ""
    asked: list[str] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)


class _Handler(BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        self.site.asked.append(self.path)
        with suppress(ConnectionError):  # who asked may have seen enough
            self._answer()

    def _answer(self) -> None:
        if self.site.failures:
            self.site.failures -= 1
            self._head(503)
        elif self.path in ("/endless", "/hangs"):
            self._head(200)
            self._drip()
        elif self.path.startswith("/away/"):
            self._head(302, self.path.removeprefix("/away"))
        elif self.path in self.site.pages:
            self._head(200)
            self.wfile.write(self.site.pages[self.path])
        else:
            self._head(int(self.path[1:]) if self.path[1:].isdigit() else 404)

    def _head(self, status: int, location: str | None = None) -> None:
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.end_headers()

    def _drip(self) -> None:
        self.wfile.write(b"x")
        while not self.site.closing.wait(0.01):
            if self.path == "/endless":
                self.wfile.write(b"x" * 4096)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@contextmanager
def serve(pages: Mapping[str, bytes], failures: int = 0) -> Iterator[Site]:
    site = Site(pages, failures)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": site}))
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield site
    finally:
        site.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
