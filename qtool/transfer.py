"""HTTP exchanges that end: bounded in bytes, also decompressed, and in seconds as a whole; and addresses that may be asked.

httpx bounds each read, so a server that sends a byte at a time, or headers without end, would keep it for ever. Here the
connections of a client themselves know when the exchange must be over, which holds for the status line, the headers
and redirects, too. The same place resolves names: what was checked is what is connected to.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import local
from typing import TYPE_CHECKING, Any, Final

import httpcore
import httpx
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable

IDENTITY: Final[Mapping[str, str]] = {"Accept-Encoding": "identity"}
"""Asks for bodies as they are; one that is compressed all the same is expanded within its bound."""
MAX_REDIRECTS: Final = 5
MAX_ERROR_BYTES: Final = 64 << 10
"""Of an error's body, the rest of which is not read."""
_CHUNK: Final = 64 << 10


class TooLargeError(httpx.TransportError):
    """An answer has more bytes than are wanted of its kind."""


class ForbiddenAddressError(httpx.TransportError):
    """A host name leads to an address that must not be asked."""


@dataclass(frozen=True)
class Answer:
    """A response, received as a whole. `content` is what its bytes mean; of an error's, only the beginning."""

    status_code: int
    headers: httpx.Headers
    content: bytes

    @property
    def text(self) -> str:
        """The body as UTF-8, the encoding of JSON."""
        return self.content.decode("utf-8", "replace")

    @property
    def is_success(self) -> bool:
        """Whether the status is one of 200 to 299."""
        return 200 <= self.status_code < 300


def exchange(client: httpx.Client, method: str, url: str, *, max_bytes: int, seconds: float, **request: Any) -> Answer:
    """The whole answer to one request by a `guarded` client, at most `max_bytes` of it and within `seconds`.

    Raises httpx's errors: TooLargeError, ReadTimeout after the deadline, DecodingError where it cannot be expanded.
    """
    with within(seconds), client.stream(method, url, **request) as response:
        is_error = response.status_code >= 300
        limit = min(max_bytes, MAX_ERROR_BYTES) if is_error else max_bytes
        return Answer(response.status_code, response.headers, _body(response, limit, is_cut=is_error))


def _body(response: httpx.Response, limit: int, *, is_cut: bool) -> bytes:
    received = bytearray()
    for chunk in _expanded(response):
        received += chunk[: limit + 1 - len(received)]
        if len(received) > limit:
            if is_cut:
                return bytes(received[:limit])
            raise TooLargeError(f"more than {limit:,} bytes", request=response.request)
    return bytes(received)


def _expanded(response: httpx.Response) -> Iterator[bytes]:
    """The body in pieces of at most 64 KiB, however much a few compressed bytes expand to."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        yield from response.iter_raw(_CHUNK)
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise httpx.DecodingError(f"its encoding {encoding!r} was not asked for", request=response.request)
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, as its header says
    try:
        for chunk in response.iter_raw(_CHUNK):
            rest = chunk
            while rest and not decoder.eof:
                yield decoder.decompress(rest, _CHUNK)
                rest = decoder.unconsumed_tail
    except zlib.error as error:
        raise httpx.DecodingError(str(error), request=response.request) from error


# Deadlines: of the thread that sends the request, since httpx hands it to no other.

_thread: Final = local()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """All reading and writing of guarded connections in this block must end within `seconds`."""
    before = getattr(_thread, "deadline", None)
    deadline = time.monotonic() + seconds
    _thread.deadline = deadline if before is None else min(before, deadline)
    try:
        yield
    finally:
        _thread.deadline = before


def _left(timeout: float | None, error_class: type[Exception]) -> float | None:
    """What is left of the deadline, or `timeout` if that is less. Raises `error_class` after the deadline."""
    deadline = getattr(_thread, "deadline", None)
    if deadline is None:
        return timeout
    left = deadline - time.monotonic()
    if left <= 0:
        raise error_class("The deadline has passed.")
    return float(left if timeout is None else min(timeout, left))


_SLOW_SECONDS: Final = 60.0
_SLOW_BYTES: Final = 60_000
"""Received in so many seconds of waiting, it is a server that keeps one waiting; a download may last for hours."""


class _Stream(httpcore.NetworkStream):
    """A connection that heeds the deadline, and is given up where next to nothing arrives."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream
        self._waited = 0.0
        self._received = 0

    @override
    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        began = time.monotonic()
        data = self._stream.read(max_bytes, _left(timeout, httpcore.ReadTimeout))
        self._waited += time.monotonic() - began
        self._received += len(data)
        if self._waited > _SLOW_SECONDS:
            if self._received < _SLOW_BYTES:
                raise httpcore.ReadTimeout("The server sends less than a kilobyte a second.")
            self._waited = self._received = 0
        return data

    @override
    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _CHUNK):
            self._stream.write(buffer[start : start + _CHUNK], _left(timeout, httpcore.WriteTimeout))

    @override
    def close(self) -> None:
        self._stream.close()

    @override
    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        left = _left(timeout, httpcore.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left))

    @override
    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore.NetworkBackend):
    """Connects as `backend` does, to the addresses that `choose` allows of a host's, with streams that heed the deadline."""

    def __init__(self, backend: httpcore.NetworkBackend, choose: Callable[[str, int], list[str]] | None) -> None:
        self._backend = backend
        self._choose = choose

    @override
    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        *others, last = self._choose(host, port) if self._choose else [host]
        for address in others:
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return self._connected(address, port, timeout, local_address, socket_options)
        return self._connected(last, port, timeout, local_address, socket_options)

    def _connected(self, address: str, port: int, timeout: float | None, *more: Any) -> _Stream:
        left = _left(timeout, httpcore.ConnectTimeout)
        return _Stream(self._backend.connect_tcp(address, port, left, *more))

    @override
    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._backend.connect_unix_socket(path, timeout, socket_options))

    @override
    def sleep(self, seconds: float) -> None:
        self._backend.sleep(seconds)


def guarded(client: httpx.Client, *, allow_local: bool = True) -> httpx.Client:
    """`client`, whose connections from now on heed `within`; without `allow_local`, they lead to public addresses only.

    A proxy of the user's own may lie anywhere; what it is asked to connect to is checked as far as this machine can
    tell.
    """
    # httpx has no public way to pass a network backend to the transports that it makes for the proxies of the
    # environment; a test holds these names to the installed httpx and httpcore.
    for transport in (client._transport, *client._mounts.values()):  # noqa: SLF001
        pool: Any = getattr(transport, "_pool", None)
        if pool is None or isinstance(pool._network_backend, _Backend):  # noqa: SLF001
            continue
        is_direct = type(pool) is httpcore.ConnectionPool  # the pools of proxies are subclasses
        choose = public_addresses if is_direct and not allow_local else None
        pool._network_backend = _Backend(pool._network_backend, choose)  # noqa: SLF001
    if not allow_local:
        client.event_hooks["request"].append(lambda request: _check_proxied(client, request.url))
        client.event_hooks = client.event_hooks
    return client


def _check_proxied(client: httpx.Client, url: httpx.URL) -> None:
    """Raise ForbiddenAddressError where a proxy would be asked for a host that is not public."""
    if client._transport_for_url(url) is client._transport:  # noqa: SLF001 - the connection itself is checked
        return
    with suppress(httpcore.ConnectError):  # a name that only the proxy knows: its rules apply
        public_addresses(url.host, url.port or 443)


# The Hub. huggingface_hub reads pages and errors whole, whatever their size; downloads go to the disk.

_MAX_HUB_PAGE: Final = 64 << 20
"""A list of the files of the largest repositories has some megabytes."""


def hub_session() -> httpx.Client:
    """huggingface_hub's own client, for all that uses it: its connections heed `within`, and pages are bounded."""
    from huggingface_hub import get_session

    client: httpx.Client = guarded(get_session())
    hooks = client.event_hooks
    if _bound_page not in hooks["response"]:
        client.event_hooks = {
            "request": [*hooks["request"], _ask_uncompressed],
            "response": [*hooks["response"], _bound_page],
        }
    return client


def _is_page(request: httpx.Request) -> bool:
    return request.url.path.startswith("/api/")


def _ask_uncompressed(request: httpx.Request) -> None:
    if _is_page(request):
        request.headers.update(IDENTITY)


def _bound_page(response: httpx.Response) -> None:
    if not (_is_page(response.request) or response.is_error):
        return
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise httpx.DecodingError("the page is compressed unasked", request=response.request)
    limit = MAX_ERROR_BYTES if response.is_error else _MAX_HUB_PAGE
    response.stream = _BoundedStream(response.stream, limit)


class _BoundedStream(httpx.SyncByteStream):
    """A body that raises TooLargeError after `limit` bytes."""

    def __init__(self, stream: Any, limit: int) -> None:
        self._stream = stream
        self._limit = limit

    @override
    def __iter__(self) -> Iterator[bytes]:
        left = self._limit
        for chunk in self._stream:
            left -= len(chunk)
            if left < 0:
                raise TooLargeError(f"more than {self._limit:,} bytes")
            yield chunk

    @override
    def close(self) -> None:
        self._stream.close()


# Addresses. A name can lead anywhere, to this machine too, and to another place the next time it is asked for.

_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")


def public_addresses(host: str, port: int) -> list[str]:
    """The addresses of `host` on the public internet. Raises ForbiddenAddressError where it has none but others."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise httpcore.ConnectError(str(error)) from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    public = [address for address in addresses if is_public(address)]
    if not public:
        raise ForbiddenAddressError(host if host in addresses else f"{host}, which is {addresses[0]}")
    return public


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet: none of this machine, its network, or a reserved range."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if int(ip) >> 32 == 0:  # ::a.b.c.d, which some systems connect to as a.b.c.d
            return False
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)
