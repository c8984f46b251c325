"""The bytes of a picture or video: a file, a `data:` URL, or an http(s) address, bounded in bytes and time."""

from __future__ import annotations

import base64
import binascii
import time
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qtool.errors import NetworkError, SetupError, UsageError
from qtool.retries import TRANSIENT_STATUSES, with_retries

if TYPE_CHECKING:
    import httpx

URL_SCHEMES: Final = ("data:", "http://", "https://")
_NOT_FOUND: Final = frozenset({404, 410})
_RETRIES: Final = 2
_STEP_SECONDS: Final = 20.0
"""To connect, and between two chunks of a response."""
_MAX_QUOTED: Final = 80


def is_url(source: str) -> bool:
    """Whether `source` is a URL and not a path."""
    return source.startswith(URL_SCHEMES)


def quoted(source: str | Path) -> str:
    """A source as messages name it: `data:` URLs may have megabytes."""
    text = str(source)
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."


def open_media(source: str | Path, max_bytes: int, seconds: float) -> Path | BytesIO:
    """The path of a file, or the content of a URL, of at most `max_bytes` and fetched within `seconds`.

    Raises UsageError for a bad source and NetworkError for a failed transfer; the caller adds the source's name.
    """
    text = str(source)
    if text.startswith("data:"):
        return BytesIO(_decoded(text))
    if text.startswith(("http://", "https://")):
        return BytesIO(_fetched(text, max_bytes, time.monotonic() + seconds))
    path = Path(source)
    _check_file(path, max_bytes)
    return path


def _check_file(path: Path, max_bytes: int) -> None:
    try:
        size = path.stat().st_size if path.is_file() else None
    except (OSError, ValueError) as error:  # the name is too long or contains NUL
        raise UsageError("No such file.") from error
    if size is None:
        raise UsageError("No such file.")
    if size > max_bytes:
        raise UsageError(f"The file has {size:,} bytes; the limit is {max_bytes:,}.")


def _decoded(url: str) -> bytes:
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise UsageError("The data: URL is not base64.")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"The data: URL is not valid base64: {error}.") from error


def _fetched(url: str, max_bytes: int, deadline: float) -> bytes:
    import httpx

    def pause_after(error: Exception) -> float | None:
        return 0.0 if _is_transient(error) and time.monotonic() <= deadline else None

    try:
        return with_retries(lambda: _downloaded(url, max_bytes, deadline), retries=_RETRIES, pause_after=pause_after)
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        raise _failure(error) from error
    except UnicodeError as error:  # a host with an empty label, or one of more than 63 characters
        raise UsageError(f"Invalid address: {error}.") from error
    except (ImportError, ValueError) as error:  # SOCKS without its package, a proxy that is no address
        raise SetupError(
            f"Cannot create an HTTP client: {error}.",
            "Check the environment variables HTTP_PROXY, HTTPS_PROXY and ALL_PROXY.",
        ) from error


def _downloaded(url: str, max_bytes: int, deadline: float) -> bytes:
    import httpx

    received = bytearray()
    with httpx.stream("GET", url, timeout=_STEP_SECONDS, follow_redirects=True) as response:
        response.raise_for_status()
        for chunk in response.iter_bytes():
            received += chunk
            if len(received) > max_bytes:
                raise UsageError(f"The server sends more than the limit of {max_bytes:,} bytes.")
            if time.monotonic() > deadline:
                raise NetworkError(f"The server is too slow: it sent {len(received):,} bytes within the time limit.")
    return bytes(received)


def _is_transient(error: Exception) -> bool:
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in TRANSIENT_STATUSES
    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)


def _failure(error: httpx.HTTPError | httpx.InvalidURL | httpx.StreamError) -> UsageError | NetworkError:
    import httpx

    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
        return UsageError(f"Invalid address: {error}.")
    if not isinstance(error, httpx.HTTPStatusError):
        return NetworkError(f"{error or type(error).__name__}.", "Check the network.")
    status = error.response.status_code
    kind = UsageError if status in _NOT_FOUND else NetworkError
    return kind(f"The server answered {status} {error.response.reason_phrase}.")
