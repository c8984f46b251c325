"""A server on loopback that means ill: each mode is one way of answering any request, as raw bytes on the socket."""

from __future__ import annotations

import base64
import gzip
import html
import itertools
import json
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from urllib.parse import quote, unquote

CANARY = "sk-canary-4f1d9A/7b+2e=c08"
"""A key with characters that JSON, HTML, URLs and base64 each write in their own way."""

Mode = Callable[[str, str], Iterator[bytes]]
"""From the path and the Authorization of a request to the pieces of the answer; an empty piece is a pause."""

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
PIECE = b"[" * (1 << 16)
CHUNK = b"10000\r\n" + PIECE + b"\r\n"


def answer(body: str | bytes, status: str = "200 OK", *headers: str) -> bytes:
    """A whole answer that is valid HTTP."""
    content = body.encode("utf-8", "surrogateescape") if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(content)}", "Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + content


def always(content: bytes) -> Mode:
    return lambda *_: iter([content])


def drip(start: bytes, dripped: bytes) -> Mode:
    """`start`, then `dripped` byte by byte for ever, each sooner than any read times out."""

    def mode(*_: str) -> Iterator[bytes]:
        yield start
        for each in itertools.cycle(dripped):
            yield bytes([each])
            yield b""

    return mode


def forever(start: bytes, more: bytes) -> Mode:
    """`start`, then `more` again and again, as fast as it is read."""
    return lambda *_: itertools.chain([start], itertools.repeat(more))


@cache
def bomb(wbits: int) -> bytes:
    """A gigabyte of spaces in a megabyte; blocks that were flushed in full may be repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    first, other = (packer.compress(b" " * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + other * 1023


def redirect(path: str, _: str) -> Iterator[bytes]:
    yield answer("", "302 Found", f"Location: {path}")


ENDLESS: dict[str, Mode] = {
    "body by the byte": drip(OK + b"Content-Length: 100000000\r\n\r\n", b" "),
    "body by the byte in chunks": drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "headers by the byte": drip(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
    "status line by the byte": drip(b"HTTP/1.1 200 ", b"O"),
    "nothing at all": drip(b"", b""),
    "nothing after the headers": lambda *_: itertools.chain([OK + b"Content-Length: 9\r\n\r\n"], itertools.repeat(b"")),
    "body without end": forever(OK + b"Transfer-Encoding: chunked\r\n\r\n", CHUNK),
    "body until closed": forever(OK + b"\r\n", PIECE),
    "length of a petabyte": forever(OK + b"Content-Length: 1000000000000000\r\n\r\n", PIECE),
    "headers without end": forever(b"HTTP/1.1 200 OK\r\n", b"X-A: " + b"b" * 4000 + b"\r\n"),
    "one header without end": forever(b"HTTP/1.1 200 OK\r\nX-A: ", PIECE),
    "status line without end": forever(b"HTTP/1.1 200 ", PIECE),
    "interim answers without end": forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "error without end": forever(b"HTTP/1.1 500 No\r\n\r\n", PIECE),
    "refusal without end": forever(b"HTTP/1.1 401 No\r\n\r\n", PIECE),
    "absence without end": forever(b"HTTP/1.1 503 No\r\n\r\n", PIECE),
    "gzip bomb": lambda *_: iter([answer(bomb(31), "200 OK", "Content-Encoding: gzip")]),
    "deflate bomb": lambda *_: iter([answer(bomb(15), "200 OK", "Content-Encoding: deflate")]),
    "gzip bomb as an error": lambda *_: iter([answer(bomb(31), "500 No", "Content-Encoding: gzip")]),
    "redirects without end": redirect,
}
"""What has no end, or none soon: exit 5 within the deadline, and in little memory."""

WRONG: dict[str, Mode] = {
    "no HTTP": always(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100),
    "a greeting": always(b"220 mail.example.org ESMTP\r\n"),
    "hangs up": lambda *_: iter([]),
    "a negative length": always(OK + b"Content-Length: -5\r\n\r\n{}"),
    "two lengths": always(OK + b"Content-Length: 5\r\nContent-Length: 2\r\n\r\n{}"),
    "a wrong chunk": always(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}"),
    "less than promised": always(OK + b"Content-Length: 50\r\n\r\n{}"),
    "brotli unasked": always(answer(b"\x0b\x02\x80{}\x03", "200 OK", "Content-Encoding: br")),
    "zstd unasked": always(answer(b"\x28\xb5\x2f\xfd", "200 OK", "Content-Encoding: zstd")),
    "gzip within gzip": always(answer(gzip.compress(gzip.compress(b"{}")), "200 OK", "Content-Encoding: gzip, gzip")),
    "torn gzip": always(answer(gzip.compress(b"{}")[:-9], "200 OK", "Content-Encoding: gzip")),
    "a redirect elsewhere": always(answer("", "307 No", "Location: http://169.254.169.254/latest")),
    "a redirect to nowhere": always(answer("", "301 No")),
    "status 999": always(b"HTTP/1.1 999 What\r\n\r\n"),
    "deep JSON": always(answer("[" * 200_000 + "]" * 200_000)),
    "a number of many digits": always(answer('{"results": [{"index": 0, "score": ' + "9" * 9000 + "}]}")),
    "a number too large": always(answer('{"results": [{"index": 0, "score": 1e999}]}')),
    "an index of many digits": always(answer('{"results": [{"index": ' + "9" * 300 + ', "score": 0.5}]}')),
    "infinity": always(answer('{"results": [{"index": 0, "score": Infinity}], "data": [{"embedding": [Infinity]}]}')),
    "no number": always(answer('{"results": [{"index": 0, "score": "0.5"}], "data": [{"embedding": ["1"]}]}')),
    "no UTF-8": always(answer(b'{"results": "\xff\xfe"}')),
    "UTF-16": always(answer('{"results": []}'.encode("utf-16"))),
    "half a character": always(answer('{"error": "\\ud800"}', "400 No")),
    "nothing": always(answer("")),
    "null": always(answer("null")),
    "a list": always(answer("[1, [2]]")),
    "types exchanged": always(
        answer(
            json.dumps(
                {"version": 5, "model_id": {}, "model_type": 7, "data": 5, "results": {}, "tokens": ["x"], "id": []}
            )
        )
    ),
}
"""What ends, and is no answer: exit 3 or 5, or an engine that is not recognised."""

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31m\u202eevil\u2066\u200b\x9b31m\x00\x08\r\nerror: all is well\u2028"
SHOWN: dict[str, Mode] = {
    "escapes in an error": always(answer(json.dumps({"error": {"message": ESCAPES}}), "400 No")),
    "escapes in a page": always(answer(f"<html>{ESCAPES}</html>", "500 No")),
    "escapes in the reason": always(answer("{}", "500 \x1b[2J\x1b]0;owned\x07")),
    "escapes in an address": always(answer("", "302 No", "Location: http://x/\x1b[2J")),
    "escapes in names": always(answer(json.dumps({"version": ESCAPES, "data": [{"id": ESCAPES}, {"id": "b"}]}))),
    "a megabyte in one line": always(answer(json.dumps({"error": {"message": "x" * (1 << 20)}}), "400 No")),
    "a megabyte as a name": always(answer(json.dumps({"data": [{"id": "x" * 900_000}, {"id": "b"}]}))),
}
"""What a terminal would obey, or be drowned in."""


def _echo(write: Callable[[str], bytes]) -> Mode:
    def mode(_: str, authorization: str) -> Iterator[bytes]:
        yield write(authorization or f"Bearer {CANARY}")

    return mode


def _key(authorization: str) -> str:
    return authorization.partition(" ")[2]


ECHOES: dict[str, Mode] = {
    "text": _echo(lambda sent: answer(f"you sent {sent}", "400 No")),
    "JSON": _echo(lambda sent: answer(json.dumps({"error": {"message": f"bad key {sent}"}}), "401 No")),
    "escaped JSON": _echo(
        lambda sent: answer('{"error": "' + "".join(f"\\u{ord(c):04x}" for c in sent) + '"}', "403 No")
    ),
    "JSON within JSON": _echo(lambda sent: answer(json.dumps({"error": json.dumps({"key": sent})}), "400 No")),
    "slashes escaped": _echo(lambda sent: answer('{"error": "' + sent.replace("/", "\\/") + '"}', "500 No")),
    "HTML": _echo(lambda sent: answer(f"<p>{html.escape(sent)}</p>", "500 No")),
    "HTML by number": _echo(lambda sent: answer("".join(f"&#{ord(c)};" for c in sent), "500 No")),
    "URL": _echo(lambda sent: answer(f"/login?key={quote(sent, safe='')}", "500 No")),
    "URL twice": _echo(lambda sent: answer(quote(quote(sent, safe=""), safe=""), "500 No")),
    "base64": _echo(lambda sent: answer(base64.b64encode(_key(sent).encode()), "400 No")),
    "basic authentication": _echo(lambda sent: answer(base64.b64encode(f"user:{_key(sent)}".encode()), "400 No")),
    "hexadecimal": _echo(lambda sent: answer(sent.encode().hex(), "400 No")),
    "upper case": _echo(lambda sent: answer(sent.upper(), "400 No")),
    "cut at the limit": _echo(lambda sent: answer("x" * (300 - 15) + " " + sent, "400 No")),
    "cut by the server": _echo(lambda sent: answer(f"bad key {sent[: len(sent) - 6]}...", "400 No")),
    "reason": _echo(lambda sent: answer("{}", f"500 {sent}")),
    "redirect": _echo(lambda sent: answer("", "302 No", f"Location: /?key={quote(sent)}")),
    "no HTTP": _echo(lambda sent: f"you sent {sent}\r\n\r\n".encode()),
    "a header": _echo(lambda sent: answer("{}", "400 No", f"WWW-Authenticate: Bearer realm={sent}")),
    "a broken header": _echo(lambda sent: f"HTTP/1.1 200 OK\r\n{sent} no colon\r\n\r\n".encode()),
    "no JSON": _echo(lambda sent: answer(f"{{'key': '{sent}'}}")),
    "names": _echo(lambda sent: answer(json.dumps({"version": sent, "data": [{"id": sent}, {"id": "other"}]}))),
    "an unknown format": _echo(lambda sent: answer(json.dumps({"results": [{"index": sent, "score": sent}]}))),
}
"""The key that was sent, sent back."""


@contextmanager
def serving_raw(mode: Mode, *, host: str = "127.0.0.1", port: int = 0, pause: float = 0.02) -> Iterator[str]:
    """The address of a server that answers each request by `mode`."""
    closing = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(5)
            request = b""
            while b"\r\n\r\n" not in request and (more := connection.recv(1 << 16)):
                request += more
            head = request.partition(b"\r\n\r\n")[0].decode("latin-1")
            lines = head.split("\r\n")
            sent = next((line[15:].strip() for line in lines if line.lower().startswith("authorization:")), "")
            for piece in mode(lines[0].split(" ")[1] if " " in lines[0] else "/", sent):
                if closing.is_set():
                    return
                connection.sendall(piece) if piece else closing.wait(pause)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):  # what was not read would reset the connection before the answer arrives
                pass

    listener = socket.create_server((host, port), backlog=64)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{listener.getsockname()[1]}"
    finally:
        closing.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def leaks(text: str, secret: str = CANARY) -> list[str]:
    """What of the secret stands in a text, in any form; written without the code that is tested."""
    forms = {"plain": secret, "hex": secret.encode().hex()}
    for name, before in (("base64", ""), ("base64 1", "a"), ("base64 2", "ab")):
        forms[name] = base64.b64encode((before + secret).encode()).decode()[4:-4]
    found = []
    for escaped in (text, text.replace("\\", "")):
        unescaped = html.unescape(escaped)
        for _ in range(3):
            with suppress(UnicodeError):
                unescaped = unquote(unescaped)
        for variant in (escaped, unescaped):
            lowered = variant.lower()
            for name, form in forms.items():
                parts = {form[at : at + 9].lower() for at in range(len(form) - 8)}
                found += [f"{name}: {part}" for part in parts if part in lowered]
    with suppress(ValueError):
        spelled = "".join(f"\\u{ord(c):04x}" for c in secret[:6])
        found += ["spelled out"] if spelled in text.lower() else []
    return found
