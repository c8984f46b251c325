"""JSON over HTTP to a scoring server: bounds, retries, errors that name the request, and concurrent requests."""

from __future__ import annotations

import json
import os
import re
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

from qtool.errors import ModelError, NetworkError, QtoolError, SetupError, UsageError, reason
from qtool.escaping import shown
from qtool.jsonfile import JsonError, json_value
from qtool.redaction import API_KEY, keep_secret, redacted
from qtool.retries import LONGEST_PAUSE, with_retries

if TYPE_CHECKING:
    import httpx

    from qtool.transfer import Answer

# Open connections, so that all of them can be shut down at once. A thread that waits for a response is woken only by
# shutting its socket down; on Linux, closing the socket does not wake it.

# Emitted by httpcore's `connection`, `proxy` and `socks`. TLS through a proxy wraps the socket in a new one.
_CONNECTED: Final = (".connect_tcp.complete", ".start_tls.complete")


class Sockets:
    """The sockets of one client."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._open: WeakSet[socket.socket] = WeakSet()
        self._is_shut_down = False

    def trace(self, event: str, details: Mapping[str, Any]) -> None:
        """The trace hook of httpx: keep the socket of a new connection, or shut it down after `shut_down`."""
        if not event.endswith(_CONNECTED):
            return
        connection = details["return_value"].get_extra_info("socket")
        with self._lock:
            self._open.add(connection)
            if self._is_shut_down:
                _shut_down(connection)

    def shut_down(self) -> None:
        """Shut down all open connections, and every later one as soon as it is made."""
        with self._lock:
            self._is_shut_down = True
            for connection in self._open:
                _shut_down(connection)


def _shut_down(connection: socket.socket) -> None:
    with suppress(OSError):  # the server has closed it already
        # The method of socket.socket: SSLSocket's own drops TLS state that the reading thread still uses.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


# The client. A transient failure (no connection, 429, 502 to 504) is retried and then a NetworkError, as is an answer
# that never ends; an invalid one is a ModelError at once. Every message names the address and the request; nothing that
# leaves this module holds the API key, which some servers send back.

# Unlike a hub's, a scoring server's 500 is its answer to a request that it cannot process: repeating it is pointless.
_TRANSIENT: Final = (
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)
_NO_ENDPOINT: Final = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)
_LOCKED: Final = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_MAX_QUOTED: Final = 300
_CONNECT_SECONDS: Final = 10.0
_MAX_PAGE: Final = 1 << 20
"""Bytes of a page about the server: llama-server's /props holds a chat template."""
_MAX_ANSWER: Final = 4 << 20
"""Of an answer to questions: a vector of 8,192 numbers has 200 kB, the ids of 262,144 tokens 2 MB."""


class HttpClient:
    """One server, used from any number of threads.

    A request may take `timeout` seconds in all, however lively its answer arrives. It is repeated up to `retries` times, but not once `stop` is set.
    """

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

        from qtool.transfer import IDENTITY, guarded

        key = _api_key()
        try:
            client = httpx.Client(
                headers={**IDENTITY, **({"Authorization": f"Bearer {key}"} if key else {})},
                timeout=httpx.Timeout(self._timeout, connect=min(self._timeout, _CONNECT_SECONDS)),
                limits=httpx.Limits(max_connections=None),
            )
        except (OSError, ValueError, ImportError, httpx.InvalidURL) as error:
            raise SetupError(
                f"Cannot create an HTTP client: {error}.",
                "Check the environment variables HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE.",
            ) from error
        return guarded(client)

    def close(self) -> None:
        """Drop the connections, those of running requests too; later requests raise UsageError."""
        self._is_closed = True
        self.stop.set()
        self._sockets.shut_down()
        if "_client" in self.__dict__:
            self._client.close()

    def get_json(self, path: str) -> Any:
        """The JSON at `path`; None where there is no such endpoint or its answer is not JSON. Raises NetworkError."""
        answer = self._send("GET", path, None, max_bytes=_MAX_PAGE)
        if answer.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR and answer.status_code != HTTPStatus.NOT_IMPLEMENTED:
            hint = "Check that the server is healthy and has loaded its model."
            raise NetworkError(self._status(answer, path), hint)
        if answer.status_code in _LOCKED:
            raise self._status_error(answer, path)
        try:
            return _parsed(answer) if answer.is_success else None
        except JsonError:
            return None

    def has_endpoint(self, path: str) -> bool:
        """Whether the server accepts POST at `path`: it then rejects an empty body, or fails on it with 500.

        Raises NetworkError.
        """
        status = self._send("POST", path, {}).status_code
        return status not in (*_NO_ENDPOINT, HTTPStatus.NOT_IMPLEMENTED)

    def post(self, subject: str, paths: str | Sequence[str], body: Any) -> Any:
        """The JSON answer to `body` from the first of `paths` that exists. Raises NetworkError or ModelError.

        `subject` is the pair or item that error messages begin with; it is empty for requests of qtool's own.
        """
        refusals = []
        for path in (paths,) if isinstance(paths, str) else paths:
            answer = self._send("POST", path, body, subject)
            if answer.status_code not in _NO_ENDPOINT:
                return self._value(answer, path, subject)
            refusals.append(self._status(answer, path))
        raise ModelError(
            f"{_prefix(subject)}{' '.join(refusals)}", "Check the address, the engine and the name of the served model."
        )

    def post_if_supported(self, subject: str, path: str, body: Any) -> Any:
        """Like `post`, but None where the server has no such endpoint."""
        answer = self._send("POST", path, body, subject)
        return None if answer.status_code in _NO_ENDPOINT else self._value(answer, path, subject)

    def _value(self, answer: Answer, path: str, subject: str) -> Any:
        if not answer.is_success:
            raise self._status_error(answer, path, subject)
        try:
            return _parsed(answer)
        except JsonError:
            quoted = _quoted(answer.text)
            raise ModelError(f"{_prefix(subject)}The answer of {self.url}{path} is not JSON: {quoted}") from None

    def _send(self, method: str, path: str, body: Any, subject: str = "", *, max_bytes: int = _MAX_ANSWER) -> Answer:
        """An answer with a status that is not transient.

        Raises NetworkError where there is none after all retries, or a redirect; ModelError where it cannot be decoded.
        """
        import httpx

        # Not httpx's own encoder, which refuses lone surrogates only while sending.
        content = None if body is None else json.dumps(body).encode()
        attempts = 0

        def attempt() -> Answer:
            nonlocal attempts
            attempts += 1
            return self._attempt(method, path, content, max_bytes)

        try:
            answer = with_retries(attempt, retries=self._retries, pause_after=_pause_after, wait=self.stop.wait)
        except _TransientError as error:
            times = "once" if attempts == 1 else f"{attempts} times"
            message = f"{_prefix(subject)}{self._status(error.answer, path)}"
            raise NetworkError(message, f"The request was sent {times}.") from None
        except httpx.RequestError as error:
            raise self._request_error(subject, path, error) from _without_secrets(error)
        if HTTPStatus.MULTIPLE_CHOICES <= answer.status_code < HTTPStatus.BAD_REQUEST:
            place = _quoted(answer.headers.get("Location", "")) or "no address"
            raise NetworkError(
                f"{_prefix(subject)}{self.url}{path} answered {answer.status_code}: it leads to {place}.",
                "Pass that address; the API key is sent only to the server that you name.",
            )
        return answer

    def _attempt(self, method: str, path: str, content: bytes | None, max_bytes: int) -> Answer:
        """The answer. Raises _TransientError where its status is transient."""
        from qtool.transfer import exchange

        if self._is_closed:
            raise UsageError(f"The connections to {self.url} are closed.", "Open the scorer again.")
        headers = {} if content is None else {"Content-Type": "application/json"}
        answer = exchange(
            self._client,
            method,
            self.url + path,
            max_bytes=max_bytes,
            seconds=self._timeout,
            content=content,
            headers=headers,
            extensions={"trace": self._sockets.trace},
        )
        if answer.status_code in _TRANSIENT:
            raise _TransientError(answer)
        return answer

    def _request_error(self, subject: str, path: str, error: httpx.RequestError) -> QtoolError:
        import httpx

        from qtool.transfer import TooLargeError

        endpoint = f"{self.url}{path}"
        if isinstance(error, httpx.DecodingError):
            return ModelError(f"{_prefix(subject)}The answer of {endpoint} cannot be decoded: {error}.")
        if isinstance(error, TooLargeError):
            return NetworkError(
                f"{_prefix(subject)}The answer of {endpoint} is too large: {error}.", "Check the address."
            )
        if isinstance(error, httpx.RemoteProtocolError) and not _is_disconnection(error):
            return NetworkError(
                f"{_prefix(subject)}The answer of {endpoint} is not valid HTTP: {error}.", "Check the address."
            )
        if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
            message = f"{_prefix(subject)}{endpoint} did not answer within {self._timeout:g} seconds."
            return NetworkError(
                message, "Check that it is not stuck; a slow one needs a longer timeout or less concurrency."
            )
        if isinstance(error, httpx.LocalProtocolError):
            return NetworkError(f"{_prefix(subject)}The request to {endpoint} is not valid HTTP.", "Check the API key.")
        message = f"{_prefix(subject)}Cannot reach {endpoint}: {reason(error)}."
        return NetworkError(message, "Check that the server is running.")

    def _status_error(self, answer: Answer, path: str, subject: str = "") -> QtoolError:
        message = f"{_prefix(subject)}{self._status(answer, path)}"
        if answer.status_code in _LOCKED:
            return NetworkError(message, f"Set the environment variable {API_KEY} to the server's API key.")
        return ModelError(message)

    def _status(self, answer: Answer, path: str) -> str:
        text = _quoted(_error_text(answer.text)) or "no explanation"
        return f"{self.url}{path} answered {answer.status_code}: {text}{'' if text.endswith('.') else '.'}"


class _TransientError(Exception):
    """A status that may be another one soon."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status_code)
        self.answer = answer


def _parsed(answer: Answer) -> Any:
    """The JSON of an answer without the API key, wherever the server put it. Raises JsonError."""
    return redacted(json_value(answer.content, allow_nan=True))


def _prefix(subject: str) -> str:
    return f"{subject}: " if subject else ""


def _api_key() -> str:
    # A key copied from a file may end in a newline; httpx would quote the header, and the key in it, in its error.
    key = os.environ.get(API_KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(
            f"The API key in the environment variable {API_KEY} cannot be sent.",
            "It must consist of printable ASCII characters; check that nothing else was copied with it.",
        )
    keep_secret(key)  # the variable may be set to another one while this client lives
    return key


def _pause_after(error: Exception) -> float | None:
    """The least number of seconds before another attempt; None where it is pointless."""
    import httpx

    from qtool.transfer import TooLargeError

    if isinstance(error, _TransientError):
        requested = error.answer.headers.get("Retry-After", "")
        return min(float(requested), LONGEST_PAUSE) if re.fullmatch(r"[0-9]{1,9}", requested) else 0.0
    # A server that did not answer within the whole timeout is not given another one.
    final = (httpx.ReadTimeout, httpx.WriteTimeout, httpx.LocalProtocolError, httpx.DecodingError, TooLargeError)
    if isinstance(error, httpx.RemoteProtocolError) and not _is_disconnection(error):
        return None
    return None if isinstance(error, final) or not isinstance(error, httpx.RequestError) else 0.0


def _is_disconnection(error: httpx.RemoteProtocolError) -> bool:
    """Whether the server hung up, and not sent what is no HTTP: httpx has one class for both."""
    return "disconnected" in str(error) or "closed" in str(error)


def _without_secrets(error: httpx.RequestError) -> httpx.RequestError | None:
    """The error as a cause, which QTOOL_DEBUG shows; h11's errors quote headers, and one of them holds the API key."""
    import httpx

    return None if isinstance(error, httpx.LocalProtocolError) else error


def _checked_url(url: str) -> str:
    parts = _split_url(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"Invalid server address {url!r}.", "Write it as http://HOST:PORT or https://HOST.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            "A server address must not contain a user, password, query or fragment.",
            f"Set the environment variable {API_KEY} to the API key.",
        )
    # Clients are often configured with OpenAI's base address, which ends in /v1.
    return url.rstrip("/").removesuffix("/v1")


def _split_url(url: str) -> SplitResult:
    import httpx

    try:
        httpx.URL(url)  # refuses more than urlsplit does, and would do so only while sending
        parts = urlsplit(url)
        _ = parts.port  # checked on access
    except (ValueError, httpx.InvalidURL) as error:
        # Without the address, which may hold a password.
        raise UsageError(f"Invalid server address: {error}.", "Write it as http://HOST:PORT or https://HOST.") from None
    return parts


def _error_text(text: str) -> str:
    """The message inside a JSON error of the shapes that engines send; all of `text` where there is none."""
    try:
        error = json_value(text, allow_nan=True)
    except JsonError:
        return text
    for key in ("error", "message", "detail"):
        if isinstance(error, dict) and key in error:
            error = error[key]
    return error if isinstance(error, str) else json.dumps(error, ensure_ascii=False)


def _quoted(text: str) -> str:
    return shown(" ".join(text.split()), _MAX_QUOTED)


# Concurrent requests. After an error no new request is sent; the answers of those under way are still reported.

QuestionT = TypeVar("QuestionT")
AnswerT = TypeVar("AnswerT")


def ask_all(
    batches: Sequence[Sequence[QuestionT]],
    ask: Callable[[Sequence[QuestionT]], Sequence[AnswerT | QtoolError]],
    on_answer: Callable[[QuestionT, AnswerT], None],
    *,
    concurrency: int,
    stop: Event,
) -> None:
    """Call `ask` on each batch in `concurrency` threads, and `on_answer` in this one; raises the first error returned.

    `stop` is set once no further request is wanted. It stays set only if this function is interrupted, when requests
    may still be running.
    """

    def ask_unless_stopped(batch: Sequence[QuestionT]) -> Sequence[AnswerT | QtoolError]:
        # Cancelling a future would not wake `as_completed`, so a batch that is no longer wanted returns no answers.
        return [] if stop.is_set() else ask(batch)

    pool = ThreadPoolExecutor(concurrency)
    failed: QtoolError | None = None
    try:
        running = {pool.submit(ask_unless_stopped, batch): batch for batch in batches}
        for future in as_completed(running):
            for question, answer in zip(running[future], future.result(), strict=False):
                if isinstance(answer, QtoolError):
                    failed = failed or answer
                    stop.set()
                else:
                    on_answer(question, answer)
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
    stop.clear()  # no request is running: the next call may retry again
    if failed is not None:
        raise failed
