"""The bytes of a picture or video: a file, a `data:` URL, or an http(s) address, bounded in bytes and time.

A panel may be a stranger's: what it may name is in `MediaAccess`, and an address is asked on the public internet only.
"""

from __future__ import annotations

import base64
import binascii
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qtool.errors import NetworkError, SetupError, UsageError, reason
from qtool.escaping import shown
from qtool.retries import TRANSIENT_STATUSES, with_retries

if TYPE_CHECKING:
    from qtool.transfer import Answer

URL_SCHEMES: Final = ("data:", "http://", "https://")
_NOT_FOUND: Final = frozenset({404, 410})
_RETRIES: Final = 2
_STEP_SECONDS: Final = 20.0
"""To connect, and between two chunks of a response."""
_MAX_QUOTED: Final = 80


@dataclass(frozen=True)
class MediaAccess:
    """What a panel may name: files outside of its folder, addresses of this machine and its network."""

    outside_files: bool = False
    local_addresses: bool = False


DISTRUST: Final = MediaAccess()


class LocalAddress(str):
    """An http(s) address that may lead to this machine and its network, since the user said so."""

    __slots__ = ()


def allowed_file(path: Path, folder: Path, access: MediaAccess) -> Path:
    """The file `path`, without symbolic links, which must lie in `folder` unless `access` has it otherwise.

    Raises UsageError, to which the caller adds the name that the panel gave it.
    """
    try:
        if not path.is_file():
            raise UsageError("No such file.", "Relative paths start at the panel's folder.")
        if access.outside_files:
            return path
        real = path.resolve(strict=True)
        is_inside = real.is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # the name is too long, contains NUL, or links to itself
        raise UsageError("No such file.", "Relative paths start at the panel's folder.") from error
    if not is_inside:
        raise UsageError(
            "The file is outside of the panel's folder.",
            "If you trust the panel, pass --allow-outside-files (allow_outside_files=True in Python).",
        )
    return real


def is_url(source: str) -> bool:
    """Whether `source` is a URL and not a path."""
    return source.startswith(URL_SCHEMES)


def quoted(source: str | Path) -> str:
    """A source as messages name it: `data:` URLs may have megabytes, and of a long path the end says most."""
    text = str(source)
    if len(text) > _MAX_QUOTED and not text.startswith("data:"):
        text = f"{text[: _MAX_QUOTED // 2]}…{text[1 - _MAX_QUOTED // 2 :]}"
    return shown(text, _MAX_QUOTED)


def open_media(source: str | Path, max_bytes: int, seconds: float) -> Path | BytesIO:
    """The path of a file, or the content of a URL, of at most `max_bytes` and fetched within `seconds`.

    Raises UsageError for a bad source and NetworkError for a failed transfer; the caller adds the source's name.
    """
    text = str(source)
    if text.startswith("data:"):
        return BytesIO(_decoded(text, max_bytes))
    if text.startswith(("http://", "https://")):
        return BytesIO(_fetched(text, max_bytes, seconds, allow_local=isinstance(source, LocalAddress)))
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


def _decoded(url: str, max_bytes: int) -> bytes:
    header, _, payload = url.partition(",")
    if len(payload) // 4 * 3 > max_bytes:
        raise UsageError(f"The data: URL has more than {max_bytes:,} bytes.")
    if not header.endswith(";base64"):
        raise UsageError("The data: URL is not base64.")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"The data: URL is not valid base64: {error}.") from error


def _fetched(url: str, max_bytes: int, seconds: float, *, allow_local: bool) -> bytes:
    import httpx

    from qtool.transfer import ForbiddenAddressError, TooLargeError

    deadline = time.monotonic() + seconds

    def pause_after(error: Exception) -> float | None:
        return 0.0 if _is_transient(error) and time.monotonic() <= deadline else None

    def download() -> bytes:
        return _downloaded(url, max_bytes, deadline - time.monotonic(), allow_local=allow_local)

    try:
        return with_retries(download, retries=_RETRIES, pause_after=pause_after)
    except ForbiddenAddressError as error:
        raise UsageError(
            f"The address is not public: {error}.",
            "If you trust the panel, pass --allow-local-addresses (allow_local_addresses=True in Python).",
        ) from error
    except TooLargeError as error:
        raise UsageError(f"The server sends more than the limit of {max_bytes:,} bytes.") from error
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, _StatusError) as error:
        if time.monotonic() >= deadline:
            raise NetworkError(f"The server is too slow: it did not send all within {seconds:g} seconds.") from error
        raise _failure(error) from error
    except UnicodeError as error:  # a host with an empty label, or one of more than 63 characters
        raise UsageError(f"Invalid address: {error}.") from error
    except (ImportError, ValueError) as error:  # SOCKS without its package, a proxy that is no address
        raise SetupError(
            f"Cannot create an HTTP client: {error}.",
            "Check the environment variables HTTP_PROXY, HTTPS_PROXY and ALL_PROXY.",
        ) from error


def _downloaded(url: str, max_bytes: int, seconds: float, *, allow_local: bool) -> bytes:
    import httpx

    from qtool.transfer import IDENTITY, MAX_REDIRECTS, exchange, guarded

    client = httpx.Client(headers=IDENTITY, timeout=_STEP_SECONDS, follow_redirects=True, max_redirects=MAX_REDIRECTS)
    with guarded(client, allow_local=allow_local):
        answer = exchange(client, "GET", url, max_bytes=max_bytes, seconds=seconds)
    if not answer.is_success:
        raise _StatusError(answer)
    return answer.content


class _StatusError(Exception):
    """A status that is no success."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status_code)
        self.status = answer.status_code


def _is_transient(error: Exception) -> bool:
    import httpx

    from qtool.transfer import ForbiddenAddressError, TooLargeError

    if isinstance(error, _StatusError):
        return error.status in TRANSIENT_STATUSES
    final = (httpx.UnsupportedProtocol, ForbiddenAddressError, TooLargeError)
    return isinstance(error, httpx.TransportError) and not isinstance(error, final)


def _failure(error: Exception) -> UsageError | NetworkError:
    import httpx

    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
        return UsageError(f"Invalid address: {error}.")
    if not isinstance(error, _StatusError):
        return NetworkError(f"{reason(error)}.", "Check the network.")
    kind = UsageError if error.status in _NOT_FOUND else NetworkError
    return kind(f"The server answered {error.status}.")
