"""The bytes of a picture or video: a file, a `data:` URL, or an http(s) address.

Rule: bounded in bytes and time. A passing failure of a server is tried again a few times; a source is never read twice
to find out what it is.
"""

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
_GONE: Final = frozenset({404, 410})
_RETRIES: Final = 2
_STEP_SECONDS: Final = 20.0
"""Until a connection stands, and between one piece of an answer and the next."""
_SHOWN: Final = 80


def is_url(source: str) -> bool:
    """Whether `source` is an address and not a path."""
    return source.startswith(URL_SCHEMES)


def shown(source: str | Path) -> str:
    """A source as messages name it: `data:` URLs run to megabytes."""
    text = str(source)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def opened(source: str | Path, max_bytes: int, seconds: float) -> Path | BytesIO:
    """A file's path, or the bytes behind an address, of which there may be `max_bytes`, fetched within `seconds`.

    Raises UsageError where the source is at fault, NetworkError where the way to it is; the caller names the source.
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
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise UsageError("no such file") from error
    if size is None:
        raise UsageError("no such file")
    if size > max_bytes:
        raise UsageError(f"the file has {size:,} bytes; at most {max_bytes:,} are read")


def _decoded(url: str) -> bytes:
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise UsageError("only base64 data: URLs are read")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"broken base64 ({error})") from error


def _fetched(url: str, max_bytes: int, deadline: float) -> bytes:
    import httpx

    def pause_after(error: Exception) -> float | None:
        return 0.0 if _is_transient(error) and time.monotonic() <= deadline else None

    try:
        return with_retries(lambda: _downloaded(url, max_bytes, deadline), retries=_RETRIES, pause_after=pause_after)
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        raise _failure(error) from error
    except UnicodeError as error:  # a host with an empty label, or one of more than 63 characters
        raise UsageError(f"no address ({error})") from error
    except (ImportError, ValueError) as error:  # SOCKS without its package, a proxy that is no address
        raise SetupError(f"no HTTP client can be made ({error})", "Does HTTP_PROXY say what it should?") from error


def _downloaded(url: str, max_bytes: int, deadline: float) -> bytes:
    import httpx

    received = bytearray()
    with httpx.stream("GET", url, timeout=_STEP_SECONDS, follow_redirects=True) as response:
        response.raise_for_status()
        for piece in response.iter_bytes():
            received += piece
            if len(received) > max_bytes:
                raise UsageError(f"the server sends more than {max_bytes:,} bytes")
            if time.monotonic() > deadline:
                raise NetworkError(f"the server is too slow: {len(received):,} bytes until the time was up")
    return bytes(received)


def _is_transient(error: Exception) -> bool:
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in TRANSIENT_STATUSES
    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)


def _failure(error: httpx.HTTPError | httpx.InvalidURL | httpx.StreamError) -> UsageError | NetworkError:
    import httpx

    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
        return UsageError(f"no address ({error})")
    if not isinstance(error, httpx.HTTPStatusError):
        return NetworkError(str(error) or type(error).__name__, "Check the network.")
    status = error.response.status_code
    kind = UsageError if status in _GONE else NetworkError
    return kind(f"the server answers {status} {error.response.reason_phrase}")
