"""Real servers on the loopback interface that answer as a test says: well, wrongly, late or not at all."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from qtool.inputs.items import Item, Pair


@dataclass
class Reply:
    """What goes over the wire; `hang_up` closes the connection before a byte of it."""

    body: Any = None
    status: int = 200
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    hang_up: bool = False

    @property
    def content(self) -> bytes:
        return self.body.encode() if isinstance(self.body, str) else json.dumps(self.body).encode()


@dataclass
class LoopbackServer:
    """`asked` lists every request as (path, headers, body)."""

    url: str
    asked: list[tuple[str, Any, Any]] = field(default_factory=list)

    def bodies(self, path: str) -> list[Any]:
        """What was asked at `path`, but for the empty question that finds out whether it is there."""
        return [body for asked, _, body in self.asked if asked == path and body]


@contextmanager
def serving(answer: Callable[[str, Any], Any]) -> Iterator[LoopbackServer]:
    """A server; `answer(path, body)` gives a Reply, or what its JSON says, or None for 404."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Otherwise headers and body are two packets, and the second waits 40 ms for the first one's receipt.
        wbufsize = -1

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            with lock:
                server.asked.append((self.path, dict(self.headers), body))
            reply = answer(self.path, body)
            if not isinstance(reply, Reply):
                reply = Reply({"error": {"message": "Not Found"}}, 404) if reply is None else Reply(reply)
            if reply.hang_up:
                self.close_connection = True
                return
            self.send_response(reply.status)
            for name, value in {"Content-Type": reply.content_type, **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)

        do_POST = do_HEAD = do_GET  # noqa: N815 - http.server's names

        def log_message(self, *_: object) -> None:
            """Nothing on standard error."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server = LoopbackServer(f"http://127.0.0.1:{httpd.server_port}")
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def jina(rank: Callable[[str, list[str]], Any]) -> Callable[[str, Any], Any]:
    """The answers of a Jina-shaped server, of which `rank(query, documents)` gives the results."""

    def answer(path: str, body: Any) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "some-reranker"}]}
        if path != "/rerank":
            return None
        return rank(body["query"], body["documents"]) if body else Reply({"message": "empty"}, 422)

    return answer


def results(*scores: Any) -> Any:
    """Scores in the order of the documents, sent best first as servers do."""
    entries = [{"index": index, "relevance_score": score} for index, score in enumerate(scores)]
    return {"results": entries[::-1]}


HTML = Reply("<html><body>Welcome to nginx</body></html>", content_type="text/html")


def many(count):
    return [Pair(Item(f"q{place}", (f"q{place}",)), Item("d", ("d",))) for place in range(count)]
