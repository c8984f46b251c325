"""A repository on the Hub: what it holds, and its files by `Range` requests over huggingface_hub's session."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import quote

from typing_extensions import override

from qtool.errors import ModelError, NetworkError, QtoolError, UsageError
from qtool.retries import TRANSIENT_STATUSES, with_retries
from qtool.storage.byte_source import ByteSource

if TYPE_CHECKING:
    import httpx

_RETRIES: Final = 4
_TIMEOUT: Final = 30.0
_PAGE_SECONDS: Final = 120.0
"""For the page that lists a repository's files, retries included."""
_LONGEST_WAIT: Final = 300.0
"""A server that asks for more seconds than this before the next request is not waited for."""
_MAX_WHOLE: Final = 32 << 20
"""A file of a checkpoint that is larger contains weights."""
_PIECE: Final = 1 << 20
_EXPIRED: Final = frozenset({400, 401, 403, 404, 410})
"""What a store answers to a signed address that is no longer good."""

T = TypeVar("T")


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids requests."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


# Errors of huggingface_hub and httpx as errors that say what to do. No token is ever part of one: what is shown is the
# first line of a message, without the query of an address, which may be signed.


def explained(error: Exception, repo: str, revision: str | None) -> QtoolError:
    """A QtoolError for an error of huggingface_hub."""
    import httpx
    from huggingface_hub import errors

    at = f" at {revision}" if revision else ""
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        return _refused(error, repo, revision)
    if isinstance(error, errors.LocalEntryNotFoundError):
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        hint = "HF_HUB_OFFLINE is set: unset it, or download the model first." if offline else "Check the network."
        return NetworkError(f"{repo}{at} is not in the cache, and the Hub cannot be reached.", hint)
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"Invalid repository name {repo!r}.")
    if isinstance(error, httpx.TransportError):
        return NetworkError(f"Cannot read {repo}: {_first_line(error) or type(error).__name__}.", "Check the network.")
    if isinstance(error, OSError | errors.HfHubHTTPError | httpx.HTTPError):
        return NetworkError(f"Cannot download {repo}{at}: {_first_line(error)}.")
    return ModelError(f"Cannot download {repo}{at}: {type(error).__name__}: {_first_line(error)}.")


def _refused(error: Exception, repo: str, revision: str | None) -> NetworkError:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError
        return NetworkError(
            f"{repo} is private or gated, and no token was given that has access to it.",
            f"Accept its terms at {constants.ENDPOINT}/{repo}, and set HF_TOKEN or pass --token.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return NetworkError(f"{repo} has no revision {revision}.")
    return NetworkError(
        f"{repo} is not on the Hub, or it is private or gated.", "Check the name, and set HF_TOKEN or pass --token."
    )


def _first_line(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0].rstrip(".")
    return re.sub(r"(https?://[^\s'\"?]*)\?[^\s'\"]*", r"\1", first)


def _pause_after(error: Exception) -> float | None:
    """Seconds before the next attempt; None where that is pointless."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return 0.0 if isinstance(error, httpx.TransportError) else None
    if error.response is None or error.response.status_code not in TRANSIENT_STATUSES:
        return None
    wanted = _retry_after(error.response.headers)
    return wanted if wanted <= _LONGEST_WAIT else None


def _pause_unless_away(error: Exception) -> float | None:
    """The same, but not for a Hub that cannot be reached in the first place."""
    import httpx

    return None if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) else _pause_after(error)


def _retry_after(headers: httpx.Headers) -> float:
    """Seconds that a busy server asks for, by Retry-After (seconds or a date) or by the Hub's RateLimit."""
    asked = headers.get("Retry-After", "").strip()
    if asked.isdigit():
        return float(asked)
    if asked:
        try:
            return max((parsedate_to_datetime(asked) - datetime.now(timezone.utc)).total_seconds(), 0.0)
        except (ValueError, TypeError):
            return 0.0
    match = re.search(r";\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(match[1]) if match else 0.0


# What the Hub tells of each file. A hash by which the bytes can be checked is the SHA-256 of a large file, which Git LFS
# and Xet name it by, or the SHA-1 of any other as a git blob.


@dataclass(frozen=True)
class HubEntry:
    """One file: its size and a hash of its bytes, each None where the Hub does not tell it."""

    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def is_hashed(self) -> bool:
        """Whether its bytes can be checked."""
        return self.sha256 is not None or (self.git_sha1 is not None and self.size is not None)

    @property
    def identity(self) -> str | None:
        """Equal for files of equal bytes, in whichever repository."""
        return self.sha256 or self.git_sha1

    def digest(self) -> Any:
        """A hashlib object that the file's bytes are to be fed to."""
        if self.sha256 is not None:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.size}\0".encode())  # noqa: S324 - git's own name of a file

    def has(self, digest: Any) -> bool:
        """Whether the bytes that were fed to `digest` are the file's."""
        return bool(digest.hexdigest() == self.identity)


def entry_of(data: bytes) -> tuple[HubEntry, HubEntry]:
    """What the Hub would tell of a file of these bytes: as a large file and as a git blob."""
    blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()  # noqa: S324 - git's own name of a file
    return HubEntry(len(data), hashlib.sha256(data).hexdigest()), HubEntry(len(data), None, blob)


@dataclass(frozen=True)
class FileRange:
    """Bytes of a file, and the size of the whole file."""

    data: bytes
    size: int


class HubRepository:
    """The files of `repo` at the commit that `revision` points to; `fetched` counts the bytes received.

    Every address names that commit, so that a branch may move meanwhile. Whatever else betrays another content, a size, an
    ETag or a hash, is an error.
    """

    def __init__(self, repo: str, revision: str | None = None, token: str | None = None) -> None:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # a lazy name

        from qtool.transfer import hub_session, within

        hub_session()
        self.repo = repo
        self.fetched = 0
        self.asked_revision = revision
        self.token = token
        if is_offline():
            raise NetworkError(f"{repo} is on the Hub, and HF_HUB_OFFLINE is set.", "Unset it, or pass a local path.")
        api = HfApi(endpoint=constants.ENDPOINT, token=token)
        with within(_PAGE_SECONDS):
            info = self._retried(
                lambda: api.model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT),
                _pause_unless_away,
            )
        self.revision = str(info.sha)
        siblings = [sibling for sibling in info.siblings or () if _stays_inside(sibling.rfilename)]
        self.entries = {sibling.rfilename: _entry(sibling) for sibling in siblings}
        self.names = tuple(sorted(self.entries))
        self._base = f"{constants.ENDPOINT}/{repo}/resolve/{self.revision}"
        self._headers = {**build_hf_headers(token=token), "Accept-Encoding": "identity"}
        self._direct: dict[str, str] = {}
        self._seen: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def open(self, name: str, chunk: int) -> HubFile:
        """The file `name`, of which the first `chunk` bytes are fetched immediately."""
        return HubFile(self, name, chunk)

    def read_whole(self, name: str) -> bytes:
        """All of a small file, checked against the hash that the Hub tells."""
        data = self._retried(lambda: self._whole(name))
        entry = self.entries.get(name, HubEntry())
        if entry.is_hashed:
            digest = entry.digest()
            digest.update(data)
            self.require_hash(name, digest)
        return data

    def require_hash(self, name: str, digest: Any) -> None:
        """Raise ModelError unless `digest` was fed what the Hub says that the file holds."""
        if not self.entries[name].has(digest):
            raise ModelError(
                f"{name} of {self.repo} arrived with other bytes than its hash on the Hub says.",
                "Run the command again; if it fails again, the repository, or a mirror or proxy on the way, is damaged.",
            )

    def read_range(self, name: str, offset: int, nbytes: int) -> FileRange:
        """`nbytes` bytes of a file from `offset` on; fewer only at its end."""
        data = bytearray()
        size = self.receive(name, offset, nbytes, data.extend)
        return FileRange(bytes(data), size)

    def receive(self, name: str, offset: int, nbytes: int, take: Callable[[bytes], object]) -> int:
        """Pass `nbytes` bytes of a file from `offset` on to `take`, as they come; the size of the whole file.

        After a fault (a cut connection, a busy server, a short answer) it goes on behind the last byte that came.
        """
        done = size = 0

        def attempt() -> None:
            nonlocal done, size
            with self._answer(name, (offset + done, nbytes - done)) as (pieces, size):
                for piece in pieces:
                    take(piece)
                    done += len(piece)

        while True:
            before = done
            try:
                self._retried(attempt)
            except NetworkError:
                if done - before < _PIECE:
                    raise
            else:
                return size

    def _retried(self, request: Callable[[], T], pause_after: Callable[[Exception], float | None] | None = None) -> T:
        try:
            return with_retries(request, retries=_RETRIES, pause_after=pause_after or _pause_after)
        except QtoolError:
            raise
        except Exception as error:  # the errors of huggingface_hub share no base class below Exception
            raise explained(error, self.repo, self.asked_revision) from error

    def _whole(self, name: str) -> bytes:
        with self._answer(name, None) as (pieces, _):
            data = bytearray()
            for piece in pieces:
                data += piece
                if len(data) > _MAX_WHOLE:
                    raise ModelError(f"{name} of {self.repo} has more than the {_MAX_WHOLE:,} bytes that are expected.")
            return bytes(data)

    @contextmanager
    def _answer(self, name: str, span: tuple[int, int] | None) -> Iterator[tuple[Iterator[bytes], int]]:
        """The bytes of a file, or of `span` (offset, nbytes) of it, and the size of the whole file."""
        from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined] # as above

        direct = self._direct.get(name)
        # huggingface_hub's session leaves the token out where a redirect leads to another host.
        headers = self._headers if direct is None else {"Accept-Encoding": "identity"}
        if span is not None:
            headers = {**headers, "Range": f"bytes={span[0]}-{span[0] + span[1] - 1}"}
        address = direct or f"{self._base}/{quote(name)}"
        with get_session().stream("GET", address, headers=headers, timeout=_TIMEOUT, follow_redirects=True) as response:
            expired = direct is not None and response.status_code in _EXPIRED
            if not expired:
                if response.is_error and response.status_code != 416:
                    response.read()
                    hf_raise_for_status(response)
                self._require_unchanged(name, response)
                if response.history and response.url.host != response.history[0].url.host:
                    # A signed address in the store of large files: used directly from now on, it needs no token.
                    self._direct[name] = str(response.url)
                yield self._received(name, response, span)
                return
        self._direct.pop(name, None)
        with self._answer(name, span) as answer:
            yield answer

    def _require_unchanged(self, name: str, response: httpx.Response) -> None:
        """Raise NetworkError where another commit or another content answers than before."""
        first = response.history[0] if response.history else response
        facts = {
            ("commit", ""): first.headers.get("X-Repo-Commit"),
            (name, first.url.host): first.headers.get("X-Linked-Etag") or first.headers.get("ETag"),
            (name, response.url.host): response.headers.get("ETag"),
        }
        for key, value in facts.items():
            known = self.revision if key[0] == "commit" else self._seen.setdefault(key, value or "")
            if value and known and value != known:
                raise self.changed(name)

    def changed(self, name: str) -> NetworkError:
        """The error for a file that is no longer what it was."""
        return NetworkError(f"{name} of {self.repo} changed while it was read.", "Run the command again.")

    def _received(
        self, name: str, response: httpx.Response, span: tuple[int, int] | None
    ) -> tuple[Iterator[bytes], int]:
        declared = self.entries.get(name, HubEntry()).size
        length = int(response.headers.get("Content-Length", "-1"))
        if response.status_code == 416:  # the range begins behind the end of the file
            size, expected = _size_of(response, declared or 0), 0
        elif span is None:
            size, expected = length, length
            if length > _MAX_WHOLE:
                raise ModelError(f"{name} of {self.repo} has {length:,} bytes; expected at most {_MAX_WHOLE:,}.")
        else:
            if not _has_range(response, *span, length):
                raise NetworkError(
                    f"The server of {self.repo} does not support range requests.", "Download the model first."
                )
            size = _size_of(response, length)
            expected = max(min(span[1], size - span[0]), 0)
        if declared is not None and size not in (-1, declared):
            raise self.changed(name)
        return self._pieces(response, expected), size

    def _pieces(self, response: httpx.Response, expected: int) -> Iterator[bytes]:
        """The body up to `expected` bytes (-1: all); raises httpx's error for a cut connection where it is shorter."""
        import httpx

        left = expected
        is_longer = int(response.headers.get("Content-Length", "-1")) != expected
        if response.status_code != 416:
            for chunk in response.iter_raw():
                piece = chunk if left < 0 else chunk[:left]
                left -= len(piece) if left >= 0 else 0
                with self._lock:
                    self.fetched += len(piece)
                if piece:
                    yield piece
                if left == 0 and is_longer:  # else the end is read too, so that the connection serves the next request
                    break
        if left > 0:
            raise httpx.ReadError(f"the answer ended {left:,} bytes early")


class HubFile(ByteSource):
    """One file of a repository as a source of bytes."""

    def __init__(self, repository: HubRepository, name: str, chunk: int) -> None:
        head = repository.read_range(name, 0, chunk)
        self.name = f"hf://{repository.repo}/{name}"
        self.size = head.size
        self.chunk = chunk
        self._path = name
        self._head = head.data
        self._repository = repository

    @override
    def read(self, offset: int, nbytes: int) -> bytes:
        """Up to `nbytes` bytes from `offset` on; fewer only at the end."""
        end = min(offset + nbytes, self.size)
        if end <= len(self._head):
            return self._head[offset:end]
        return self._repository.read_range(self._path, offset, end - offset).data


def _entry(sibling: Any) -> HubEntry:
    if sibling.lfs is not None:
        return HubEntry(sibling.lfs.size, sibling.lfs.sha256)
    return HubEntry(sibling.size, None, sibling.blob_id)


def _stays_inside(name: str) -> bool:
    return not name.startswith("/") and ".." not in name.split("/")


def _has_range(response: httpx.Response, offset: int, nbytes: int, length: int) -> bool:
    """Whether the response is the requested range: by its Content-Range, or because the whole file is no larger."""
    if response.status_code == 206:
        return str(response.headers.get("Content-Range", "")).startswith(f"bytes {offset}-")
    return offset == 0 and 0 <= length <= nbytes


def _size_of(response: httpx.Response, default: int) -> int:
    """The size of the file, which is after the slash in Content-Range."""
    match = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else default
