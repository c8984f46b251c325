"""Sockets with a request under way, and how to hang up on all of them.

Rule: a thread that waits for an answer is woken. Closing a socket does not do that on Linux, shutting it down does.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import suppress
from threading import Lock
from typing import Any, Final
from weakref import WeakSet

# Whoever connects, httpcore's `connection`, `proxy` or `socks`: TLS through a proxy takes the socket over into another one.
_CONNECTED: Final = (".connect_tcp.complete", ".start_tls.complete")


class Sockets:
    """Those of one client; `heard` is httpx's trace hook, which tells of each connection that is made."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._open: WeakSet[socket.socket] = WeakSet()
        self._is_dropped = False

    def heard(self, event: str, details: Mapping[str, Any]) -> None:
        """Remember the socket of a new connection, which was begun too late if all have been dropped."""
        if not event.endswith(_CONNECTED):
            return
        made = details["return_value"].get_extra_info("socket")
        with self._lock:
            self._open.add(made)
            if self._is_dropped:
                _hang_up(made)

    def drop(self) -> None:
        """Hang up, now and on whatever connects later."""
        with self._lock:
            self._is_dropped = True
            for made in self._open:
                _hang_up(made)


def _hang_up(made: socket.socket) -> None:
    with suppress(OSError):  # the other side was faster
        # Not an SSLSocket's own, which takes its state away under the thread that reads.
        socket.socket.shutdown(made, socket.SHUT_RDWR)
