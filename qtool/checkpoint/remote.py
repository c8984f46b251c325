"""A repository on the hub whose files are read in part: `Range` requests over one kept-alive session.

Rule: what was not asked for is not transferred. A server that would send a whole file instead is refused, a passing
failure is tried again a few times, and every other one is a NetworkError.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import quote

from qtool.checkpoint.source import explained
from qtool.errors import ModelError, NetworkError, QtoolError

if TYPE_CHECKING:
    import httpx

_PAUSES: Final = (0.5, 1.0)
"""Seconds between one try and the next."""
_PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_TIMEOUT: Final = 30.0
_MAX_WHOLE: Final = 32 << 20
"""No file of a checkpoint but its weights is larger."""

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Bytes of a file and how many it has in all."""

    data: bytes
    size: int


class HubRepository:
    """The files of `repo` at the commit that `revision` points to; `fetched` counts the bytes of their contents."""

    def __init__(self, repo: str, revision: str | None = None, token: str | None = None) -> None:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # a lazy name

        self.repo = repo
        self.fetched = 0
        self._asked_revision = revision
        if constants.is_offline_mode():
            raise NetworkError(f"{repo} lies on the hub, and HF_HUB_OFFLINE is set.", "Unset it or pass a local path.")
        api = HfApi(endpoint=constants.ENDPOINT, token=token)
        info = self._patiently(lambda: api.model_info(repo, revision=revision, timeout=_TIMEOUT))
        self.revision = str(info.sha)
        self.names = tuple(sorted(s.rfilename for s in info.siblings or () if _stays_inside(s.rfilename)))
        self._base = f"{constants.ENDPOINT}/{repo}/resolve/{self.revision}"
        self._headers = {**build_hf_headers(token=token), "Accept-Encoding": "identity"}
        self._direct: dict[str, str] = {}

    def open(self, name: str, chunk: int) -> HubFile:
        """The file `name`, of which the first `chunk` bytes are fetched at once."""
        return HubFile(self, name, chunk)

    def read_whole(self, name: str) -> bytes:
        """All of a small file."""
        return self._patiently(lambda: self._request(name, None)).data

    def read_part(self, name: str, offset: int, nbytes: int) -> Part:
        """`nbytes` bytes of a file from `offset` on; fewer only at its end."""
        return self._patiently(lambda: self._request(name, (offset, nbytes)))

    def _patiently(self, request: Callable[[], T], tries: int = 0) -> T:
        try:
            return request()
        except QtoolError:
            raise
        except Exception as error:  # the hub's errors share no base class below Exception
            if tries == len(_PAUSES) or not _is_passing(error):
                raise self._failure(error) from error
        time.sleep(_PAUSES[tries])
        return self._patiently(request, tries + 1)

    def _failure(self, error: Exception) -> QtoolError:
        import httpx

        if isinstance(error, httpx.TransportError):
            return NetworkError(
                f"{self.repo} could not be read: {error or type(error).__name__}.", "Check the network."
            )
        return explained(error, self.repo, self._asked_revision)

    def _request(self, name: str, span: tuple[int, int] | None) -> Part:
        from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined] # as above

        headers = self._headers if name not in self._direct else {"Accept-Encoding": "identity"}
        if span is not None:
            headers = {**headers, "Range": f"bytes={span[0]}-{span[0] + span[1] - 1}"}
        address = self._direct.get(name, f"{self._base}/{quote(name)}")
        with get_session().stream("GET", address, headers=headers, timeout=_TIMEOUT, follow_redirects=True) as response:
            if response.status_code == 416:  # the file ends before what was asked for
                return Part(b"", _size_of(response, 0))
            if response.is_error:
                response.read()
                hf_raise_for_status(response)
            self._remember(name, response)
            return self._received(name, response, span)

    def _remember(self, name: str, response: httpx.Response) -> None:
        """Ask the store of large files directly from now on: its signed address needs no token."""
        if response.history and response.url.host != response.history[0].url.host:
            self._direct[name] = str(response.url)

    def _received(self, name: str, response: httpx.Response, span: tuple[int, int] | None) -> Part:
        offset, limit = span or (0, _MAX_WHOLE)
        length = int(response.headers.get("Content-Length", "-1"))
        if span is None and length > limit:
            raise ModelError(f"{name} of {self.repo} is too large to be what its name says: {length:,} bytes.")
        if span is not None and not _is_answered(response, offset, length, limit):
            raise NetworkError(f"The server of {self.repo} does not answer range requests.", "Fetch the model first.")
        data = _read_at_most(response, limit)
        size = _size_of(response, len(data))
        if span is not None and len(data) < min(limit, size - offset):
            raise NetworkError(f"The server of {self.repo} answered with less of {name} than was asked for.")
        self.fetched += len(data)
        return Part(data, size)


class HubFile:
    """One file of a repository as a source of bytes."""

    def __init__(self, repository: HubRepository, name: str, chunk: int) -> None:
        head = repository.read_part(name, 0, chunk)
        self.name = f"hf://{repository.repo}/{name}"
        self.size = head.size
        self.chunk = chunk
        self._path = name
        self._head = head.data
        self._repository = repository

    def read(self, offset: int, nbytes: int) -> bytes:
        """Up to `nbytes` bytes from `offset` on; fewer only at the end."""
        end = min(offset + nbytes, self.size)
        if end <= len(self._head):
            return self._head[offset:end]
        return self._repository.read_part(self._path, offset, end - offset).data


def _stays_inside(name: str) -> bool:
    return not name.startswith("/") and ".." not in name.split("/")


def _is_passing(error: Exception) -> bool:
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in _PASSING
    return isinstance(error, httpx.TransportError)


def _is_answered(response: httpx.Response, offset: int, length: int, limit: int) -> bool:
    """Whether the answer is the part that was asked for: by its own word, or a whole file that is no larger."""
    if response.status_code == 206:
        return str(response.headers.get("Content-Range", "")).startswith(f"bytes {offset}-")
    return offset == 0 and 0 <= length <= limit


def _size_of(response: httpx.Response, default: int) -> int:
    """The size of the file: behind the slash of Content-Range."""
    match = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else default


def _read_at_most(response: httpx.Response, limit: int) -> bytes:
    parts = []
    left = limit
    for part in response.iter_raw():
        parts.append(part[:left])
        left -= len(parts[-1])
        if left == 0:
            break
    return b"".join(parts)
