from __future__ import annotations

import socket

import pytest

from qtool.scoring.http.client import Sockets


class Stream:
    """As httpcore hands them to a trace hook."""

    def __init__(self, made: socket.socket) -> None:
        self._made = made

    def get_extra_info(self, name: str) -> socket.socket | None:
        return self._made if name == "socket" else None


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(
    "event",
    [
        "connection.connect_tcp.complete",
        "connection.start_tls.complete",
        "proxy.start_tls.complete",
        "socks.connect_tcp.complete",
        "socks.start_tls.complete",
    ],
)
def test_every_connection_is_hung_up_on_also_one_through_a_proxy(event: str, *, is_late: bool) -> None:
    sockets = Sockets()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(5)
        if is_late:
            sockets.shut_down()
        sockets.trace(event, {"return_value": Stream(ours)})
        sockets.shut_down()
        assert theirs.recv(1) == b""
