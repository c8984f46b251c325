"""JSON over HTTP to a scoring server, patiently, many requests at a time."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import cached_property
from http import HTTPStatus
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import SplitResult, urlsplit
from weakref import WeakSet

from qtool.errors import ModelError, NetworkError, QtoolError, SetupError, UsageError
from qtool.retries import LONGEST_PAUSE, with_retries

if TYPE_CHECKING:
    import httpx

# Sockets with a request under way, and how to hang up on all of them. A thread that waits for an answer is woken.
# Closing a socket does not do that on Linux, shutting it down does.


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


# JSON over HTTP to a scoring server, patiently. What may pass (no connection, 429, 502 to 504) is tried again with
# growing pauses and is a NetworkError in the end; an answer that is wrong is a ModelError at once. Both name the
# address and what was asked for. The api key is in no message. What a server has is concluded only from answers of
# one that is well.


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
_SHOWN: Final = 300
_CONNECT_SECONDS: Final = 10.0


class HttpClient:
    """One server, asked from any number of threads; a request may take `timeout` seconds, and is not repeated once `stop` is set."""

    def __init__(self, url: str, timeout: float, retries: int) -> None:
        self.url = _checked_url(url)
        self.stop = Event()
        self._timeout = timeout
        self._retries = retries
        self._sockets = Sockets()
        self._is_closed = False

    @cached_property
    def _client(self) -> httpx.Client:
        import httpx

        key = _api_key()
        try:
            return httpx.Client(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(self._timeout, connect=min(self._timeout, _CONNECT_SECONDS)),
                limits=httpx.Limits(max_connections=None),
            )
        except (OSError, ValueError, ImportError, httpx.InvalidURL) as error:
            raise SetupError(
                f"No HTTP client can be made: {error}",
                "Do HTTP_PROXY, ALL_PROXY, SSL_CERT_FILE and the like say what they should?",
            ) from error

    def close(self) -> None:
        """Drop the connections, under requests too; another request is refused."""
        self._is_closed = True
        self.stop.set()
        self._sockets.drop()
        if "_client" in self.__dict__:
            self._client.close()

    def find(self, path: str) -> Any:
        """The JSON at `path`; None where the server has no such page, or one that is not JSON. Raises NetworkError."""
        response = self._sent("GET", path, None)
        if response.is_server_error and response.status_code != HTTPStatus.NOT_IMPLEMENTED:
            hint = "Is the server well, and has it loaded its model?"
            raise NetworkError(self._said(response, path), hint)
        if response.status_code in _LOCKED:
            raise self._failed(response, path)
        try:
            return json.loads(response.text) if response.is_success else None
        except ValueError:
            return None

    def takes(self, path: str) -> bool:
        """Whether the server does something at `path`: it then finds fault with an empty question, or stumbles over it (500).

        Raises NetworkError.
        """
        status = self._sent("POST", path, {}).status_code
        return status not in (*_NO_SUCH_PAGE, HTTPStatus.NOT_IMPLEMENTED)

    def ask(self, name: str, paths: str | Sequence[str], body: Any) -> Any:
        """The JSON answer to `body`, asked for `name`, of the first page that is there. Raises NetworkError or ModelError."""
        refusals = []
        for path in (paths,) if isinstance(paths, str) else paths:
            response = self._sent("POST", path, body, name)
            if response.status_code not in _NO_SUCH_PAGE:
                return self._answer(response, path, name)
            refusals.append(self._said(response, path))
        raise ModelError(
            f"{_asked_for(name)}{'; '.join(refusals)}",
            "Is this the server's address, the right engine, and a model that it serves?",
        )

    def ask_if_there(self, name: str, path: str, body: Any) -> Any:
        """See `ask`; None where the server has no such page."""
        response = self._sent("POST", path, body, name)
        return None if response.status_code in _NO_SUCH_PAGE else self._answer(response, path, name)

    def _answer(self, response: httpx.Response, path: str, name: str) -> Any:
        if not response.is_success:
            raise self._failed(response, path, name)
        try:
            return json.loads(response.text)
        except ValueError:
            shown = _shown(response.text)
            raise ModelError(
                f"{_asked_for(name)}{self.url}{path} answers with something that is not JSON: {shown}"
            ) from None

    def _sent(self, method: str, path: str, body: Any, name: str = "") -> httpx.Response:
        """An answer that does not pass. Raises NetworkError where there is none in the end, ModelError where it is broken."""
        import httpx

        # Not httpx's own encoder, which refuses lone surrogates only while sending.
        content = None if body is None else json.dumps(body).encode()
        attempts = 0

        def attempt() -> httpx.Response:
            nonlocal attempts
            attempts += 1
            return self._attempt(method, path, content)

        try:
            return with_retries(attempt, retries=self._retries, pause_after=_pause_after, wait=self.stop.wait)
        except httpx.HTTPStatusError as error:
            times = "once" if attempts == 1 else f"{attempts} times"
            message = f"{_asked_for(name)}{self._said(error.response, path)}"
            raise NetworkError(message, f"It was asked {times}.") from None
        except httpx.RequestError as error:
            raise self._unreached(name, path, error) from _without_secrets(error)

    def _attempt(self, method: str, path: str, content: bytes | None) -> httpx.Response:
        """The answer; raises httpx.HTTPStatusError where it says that the server is busy."""
        import httpx

        if self._is_closed:
            raise UsageError(f"{self.url} is asked after its connections were closed.")
        headers = {} if content is None else {"Content-Type": "application/json"}
        extensions = {"trace": self._sockets.heard}
        response = self._client.request(
            method, self.url + path, content=content, headers=headers, extensions=extensions
        )
        if response.status_code in _PASSING:
            raise httpx.HTTPStatusError("busy", request=response.request, response=response)
        return response

    def _unreached(self, name: str, path: str, error: httpx.RequestError) -> QtoolError:
        import httpx

        page = f"{_asked_for(name)}{self.url}{path}"
        if isinstance(error, httpx.DecodingError):
            return ModelError(f"{page} answers with something that cannot be decoded: {error}.")
        if isinstance(error, httpx.ReadTimeout):
            message = f"{page} has not answered within {self._timeout:g} seconds."
            return NetworkError(message, "Is it stuck? A slow one may need a longer timeout or less at once.")
        if isinstance(error, httpx.LocalProtocolError):
            return NetworkError(f"{page} cannot be asked: the request would break HTTP's rules.")
        return NetworkError(f"{page} cannot be reached: {error}.", "Is the server running there?")

    def _failed(self, response: httpx.Response, path: str, name: str = "") -> QtoolError:
        message = f"{_asked_for(name)}{self._said(response, path)}"
        if response.status_code in _LOCKED:
            return NetworkError(message, f"Put the server's api key into the environment variable {KEY_VARIABLE}.")
        return ModelError(message)

    def _said(self, response: httpx.Response, path: str) -> str:
        return f"{self.url}{path} answers {response.status_code}: {_shown(_error_text(response.text))}"


def _asked_for(name: str) -> str:
    """How a message about a request begins; what nobody but qtool wants to know has no name."""
    return f"{name}: " if name else ""


def _api_key() -> str:
    # A line's end comes along from a file; httpx would show it, and the key with it, in its complaint.
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(
            f"The api key in the environment variable {KEY_VARIABLE} cannot be sent.",
            "It must consist of printable ASCII characters: is it copied as a whole, and nothing else with it?",
        )
    return key


def _pause_after(error: Exception) -> float | None:
    """The least number of seconds after which another attempt may go better; None where it will not."""
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        asked = error.response.headers.get("Retry-After", "")
        return min(float(asked), LONGEST_PAUSE) if asked.isdecimal() else 0.0
    # A server that has hung for the whole timeout is not given another one.
    is_final = isinstance(error, (httpx.ReadTimeout, httpx.LocalProtocolError, httpx.DecodingError))
    return None if is_final or not isinstance(error, httpx.RequestError) else 0.0


def _without_secrets(error: httpx.RequestError) -> httpx.RequestError | None:
    """The error as a cause, which QTOOL_DEBUG shows; h11's complaints quote headers, and the api key is in one."""
    import httpx

    return None if isinstance(error, httpx.LocalProtocolError) else error


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


# Many questions to one server at a time. Answers are told by the thread that asked for them, as they come; after an
# error no new question is sent, but what is under way is waited for and told.


QuestionT = TypeVar("QuestionT")
AnswerT = TypeVar("AnswerT")


def ask_all(
    batches: Sequence[Sequence[QuestionT]],
    ask: Callable[[Sequence[QuestionT]], Sequence[AnswerT | QtoolError]],
    tell: Callable[[QuestionT, AnswerT], None],
    workers: int,
    stop: Event,
) -> None:
    """Ask each batch and tell each answer; raises the first error that stands in place of one.

    `stop` is set as soon as no more is wanted, and stays so only if something may still be under way.
    """
    pool = ThreadPoolExecutor(workers)
    failed: QtoolError | None = None
    try:
        waiting = {pool.submit(_unless(stop, ask), batch): batch for batch in batches}
        for future in as_completed(waiting):
            for question, answer in zip(waiting[future], future.result(), strict=False):
                if isinstance(answer, QtoolError):
                    failed = failed or answer
                    stop.set()
                else:
                    tell(question, answer)
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
    stop.clear()  # all have answered, and what is asked next is asked patiently again
    if failed is not None:
        raise failed


def _unless(
    stop: Event, ask: Callable[[Sequence[QuestionT]], Sequence[AnswerT | QtoolError]]
) -> Callable[[Sequence[QuestionT]], Sequence[AnswerT | QtoolError]]:
    # Cancelling a future does not wake `as_completed`, so a batch that is not wanted any more has no answers instead.
    return lambda batch: [] if stop.is_set() else ask(batch)
