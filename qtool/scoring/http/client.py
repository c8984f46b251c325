"""JSON over HTTP to a scoring server, patiently.

Rule: what may pass (no connection, 429, 502 to 504) is tried again with growing pauses and is a NetworkError in the end; an
answer that is wrong is a ModelError at once. Both name the address and who asked. The api key is in no message.
"""

from __future__ import annotations

import json
import os
from functools import cached_property
from http import HTTPStatus
from threading import Event
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, urlsplit

from qtool.errors import ModelError, NetworkError, QtoolError, UsageError

if TYPE_CHECKING:
    import httpx

KEY_VARIABLE: Final = "QTOOL_API_KEY"
"""No other variable is read: a key must not travel to a server that it was not meant for."""

_PASSING: Final = (
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)
_NO_SUCH_PAGE: Final = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)
_LOCKED: Final = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 30.0
_SHOWN: Final = 300
_CONNECT_SECONDS: Final = 10.0


class HttpClient:
    """One server, asked from any number of threads until `stop` is set; a request may take `timeout` seconds."""

    def __init__(self, url: str, timeout: float, retries: int) -> None:
        self.url = _checked_url(url)
        self.stop = Event()
        self._timeout = timeout
        self._retries = retries

    @cached_property
    def _client(self) -> httpx.Client:
        import httpx

        key = os.environ.get(KEY_VARIABLE)
        return httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(self._timeout, connect=min(self._timeout, _CONNECT_SECONDS)),
            limits=httpx.Limits(max_connections=None),
        )

    def close(self) -> None:
        """Drop the connections; another request would open new ones."""
        self._client.close()
        del self._client

    def find(self, path: str) -> Any:
        """The JSON at `path`; None where the server has no such page, or one that is not JSON."""
        response = self._sent("GET", path, None, "qtool")
        if response.status_code in _LOCKED:
            raise self._failed(response, path, "qtool")
        try:
            return json.loads(response.text) if response.is_success else None
        except ValueError:
            return None

    def takes(self, path: str) -> bool:
        """Whether the server does something at `path`: it then finds fault with an empty question."""
        return self._sent("POST", path, {}, "qtool").status_code not in (*_NO_SUCH_PAGE, HTTPStatus.NOT_IMPLEMENTED)

    def ask(self, name: str, path: str, body: Any) -> Any:
        """The JSON answer to `body`, asked for `name`. Raises NetworkError or ModelError."""
        answer = self.ask_if_there(name, path, body)
        if answer is None:
            raise ModelError(
                f"{name}: {self.url} has no {path}.", "Is this the server's address, and the right engine?"
            )
        return answer

    def ask_if_there(self, name: str, path: str, body: Any) -> Any:
        """See `ask`; None where the server has no such page."""
        response = self._sent("POST", path, body, name)
        if response.status_code in _NO_SUCH_PAGE:
            return None
        if not response.is_success:
            raise self._failed(response, path, name)
        try:
            return json.loads(response.text)
        except ValueError:
            shown = _shown(response.text)
            raise ModelError(f"{name}: {self.url}{path} answers with something that is not JSON: {shown}") from None

    def _sent(self, method: str, path: str, body: Any, name: str) -> httpx.Response:
        import httpx

        # Not httpx's own encoder, which refuses lone surrogates only while sending.
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if body is not None else {}
        for attempt in range(self._retries + 1):
            is_last = attempt == self._retries or self.stop.is_set()
            try:
                response = self._client.request(method, self.url + path, content=content, headers=headers)
                if response.status_code not in _PASSING or is_last:
                    return response
                pause = _asked_pause(response)
            except httpx.TransportError as error:
                # A server that has hung for the whole timeout is not given another one.
                if is_last or isinstance(error, httpx.ReadTimeout):
                    raise self._unreached(name, path, error) from error
                pause = 0.0
            self.stop.wait(max(pause, min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE)))
        raise AssertionError  # the last attempt returns or raises

    def _unreached(self, name: str, path: str, error: httpx.TransportError) -> NetworkError:
        import httpx

        if isinstance(error, httpx.ReadTimeout):
            message = f"{name}: {self.url}{path} has not answered within {self._timeout:g} seconds."
            return NetworkError(message, "Is it stuck? A slow one may need a longer timeout or less at once.")
        return NetworkError(f"{name}: {self.url}{path} cannot be reached: {error}.", "Is the server running there?")

    def _failed(self, response: httpx.Response, path: str, name: str) -> QtoolError:
        status = response.status_code
        message = f"{name}: {self.url}{path} answers {status}: {_shown(_error_text(response.text))}"
        if status in _LOCKED:
            return NetworkError(message, f"Put the server's api key into the environment variable {KEY_VARIABLE}.")
        if status in _PASSING:
            return NetworkError(message, f"It was asked {self._retries + 1} times.")
        return ModelError(message)


def _checked_url(url: str) -> str:
    parts = _parts(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url!r} is no server's address.", "It begins with http:// or https://.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            "A server's address holds no user, password, query or fragment.", f"The api key goes into {KEY_VARIABLE}."
        )
    # Clients are often configured with OpenAI's base, which ends so.
    return url.rstrip("/").removesuffix("/v1")


def _parts(url: str) -> SplitResult:
    import httpx

    try:
        httpx.URL(url)  # otherwise refused while sending, by an exception of its own kind
        parts = urlsplit(url)
        _ = parts.port  # checked when it is asked for
    except (ValueError, httpx.InvalidURL) as error:
        # Without the address, which may hold a password.
        raise UsageError(f"That is no server's address: {error}.", "It is like http://localhost:8000.") from None
    return parts


def _asked_pause(response: httpx.Response) -> float:
    asked = response.headers.get("Retry-After", "")
    return min(float(asked), _LONGEST_PAUSE) if asked.isdecimal() else 0.0


def _error_text(text: str) -> str:
    """The sentence in an error of the shapes that engines send, or all of it."""
    try:
        error = json.loads(text)
    except ValueError:
        return text
    for key in ("error", "message", "detail"):
        if isinstance(error, dict) and key in error:
            error = error[key]
    return error if isinstance(error, str) else json.dumps(error, ensure_ascii=False)


def _shown(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN else f"{flat[:_SHOWN]}..."
