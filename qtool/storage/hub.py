"""Where a checkpoint comes from: a folder, a built-in demo model, or the Hub, downloaded whole or read by range."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import quote

from qtool import resources
from qtool.errors import ModelError, NetworkError, QtoolError, UsageError
from qtool.retries import TRANSIENT_STATUSES, with_retries
from qtool.storage.checkpoint import INDEX, MAX_HEADER, SIDECAR_PATTERNS, SINGLE

if TYPE_CHECKING:
    import httpx

# Resolving: whatever the form of a model, the rest of qtool gets a folder.

_SCHEME: Final = "hf://"
_FILES: Final = (".gguf", ".safetensors", ".json", ".jsonl")
_WANTED: Final = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "hf_quant_config.json",
    "qtool.json",
    *(pattern.replace("**/", "") for pattern in SIDECAR_PATTERNS),  # the Hub's `*` matches slashes too
)


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk. `revision` is the commit of a Hub repository, None for a folder."""

    directory: Path
    origin: str
    revision: str | None = None


def resolve(model: str, revision: str | None = None, token: str | None = None) -> Source:
    """The checkpoint `model`: a folder, a built-in demo model, `org/name` or `hf://org/name@revision`."""
    if not model.startswith(_SCHEME) and Path(model).is_dir():
        if revision is not None:
            raise UsageError(
                f"{model} is a local folder; --revision applies to Hub repositories only.",
                "Remove --revision, or write hf://org/name.",
            )
        return Source(Path(model), Path(model).resolve().name)
    if model in resources.demo_models():
        return Source(resources.demo_model(model), model)
    repo, revision = _repository(model, revision)
    directory = _download(repo, revision, token)
    return Source(directory, f"{_SCHEME}{repo}", directory.name)


def _repository(model: str, revision: str | None) -> tuple[str, str | None]:
    repo, _, in_name = model.removeprefix(_SCHEME).partition("@")
    if in_name and revision not in (None, in_name):
        raise UsageError(f"{model} and --revision {revision} name different revisions.", "Remove one of them.")
    parts = repo.split("/")
    if len(parts) != 2 or not all(parts) or is_path(model):
        raise UsageError(
            f"Not a local folder or a Hub repository: {model!r}.", "Pass a folder, org/name or hf://org/name@revision."
        )
    return repo, in_name or revision


def is_path(target: str) -> bool:
    """Whether a target that does not exist locally is a mistyped path: it cannot be an `org/name` on the Hub."""
    if target.startswith(_SCHEME):
        return False
    path = Path(target)
    is_local = target.startswith((".", "~", "/")) or (len(path.parts) > 1 and Path(path.parts[0]).exists())
    return is_local or path.suffix in _FILES or target.count("/") != 1


def _download(repo: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download

    from qtool.transfer import hub_session

    hub_session()
    try:
        return Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=list(_WANTED)))
    except Exception as error:  # the errors of huggingface_hub share no base class below Exception
        raise explained(error, repo, revision) from error


def explained(error: Exception, repo: str, revision: str | None) -> QtoolError:
    """A QtoolError for an error of huggingface_hub."""
    from huggingface_hub import errors

    at = f" at {revision}" if revision else ""
    if isinstance(error, errors.GatedRepoError | errors.RepositoryNotFoundError):
        return NetworkError(
            f"{repo} is not on the Hub, or it is private or gated.", "Check the name, and set HF_TOKEN or pass --token."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return NetworkError(f"{repo} has no revision {revision}.")
    if isinstance(error, errors.LocalEntryNotFoundError):
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        hint = "HF_HUB_OFFLINE is set: unset it, or download the model first." if offline else "Check the network."
        return NetworkError(f"{repo}{at} is not in the cache, and the Hub cannot be reached.", hint)
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"Invalid repository name {repo!r}.")
    if isinstance(error, OSError | errors.HfHubHTTPError):
        return NetworkError(f"Cannot download {repo}{at}: {_first_line(error)}.")
    return ModelError(f"Cannot download {repo}{at}: {type(error).__name__}: {_first_line(error)}.")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


# Reading by range: `Range` requests over one session. A server that ignores the range and would send a whole weight
# file is refused.

_RETRIES: Final = 2
_TIMEOUT: Final = 30.0
_PAGE_SECONDS: Final = 120.0
"""For the page that lists a repository's files, retries included."""
_MAX_WHOLE: Final = 32 << 20
"""A file of a checkpoint that is larger contains weights."""

T = TypeVar("T")


@dataclass(frozen=True)
class FileRange:
    """Bytes of a file, and the size of the whole file."""

    data: bytes
    size: int


class HubRepository:
    """The files of `repo` at the commit that `revision` points to; `fetched` counts the bytes received."""

    def __init__(self, repo: str, revision: str | None = None, token: str | None = None) -> None:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # a lazy name

        from qtool.transfer import hub_session, within

        hub_session()
        self.repo = repo
        self.fetched = 0
        self._revision_option = revision
        if constants.is_offline_mode():
            raise NetworkError(f"{repo} is on the Hub, and HF_HUB_OFFLINE is set.", "Unset it, or pass a local path.")
        api = HfApi(endpoint=constants.ENDPOINT, token=token)
        with within(_PAGE_SECONDS):
            info = self._retried(lambda: api.model_info(repo, revision=revision, timeout=_TIMEOUT))
        self.revision = str(info.sha)
        self.names = tuple(sorted(s.rfilename for s in info.siblings or () if _stays_inside(s.rfilename)))
        self._base = f"{constants.ENDPOINT}/{repo}/resolve/{self.revision}"
        self._headers = {**build_hf_headers(token=token), "Accept-Encoding": "identity"}
        self._direct: dict[str, str] = {}

    def open(self, name: str, chunk: int) -> HubFile:
        """The file `name`, of which the first `chunk` bytes are fetched immediately."""
        return HubFile(self, name, chunk)

    def read_whole(self, name: str) -> bytes:
        """All of a small file."""
        return self._retried(lambda: self._request(name, None)).data

    def read_range(self, name: str, offset: int, nbytes: int) -> FileRange:
        """`nbytes` bytes of a file from `offset` on; fewer only at its end."""
        return self._retried(lambda: self._request(name, (offset, nbytes)))

    def _retried(self, request: Callable[[], T]) -> T:
        try:
            return with_retries(request, retries=_RETRIES, pause_after=_pause_after)
        except QtoolError:
            raise
        except Exception as error:  # the errors of huggingface_hub share no base class below Exception
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> QtoolError:
        import httpx

        if isinstance(error, httpx.TransportError):
            return NetworkError(f"Cannot read {self.repo}: {error or type(error).__name__}.", "Check the network.")
        return explained(error, self.repo, self._revision_option)

    def _request(self, name: str, span: tuple[int, int] | None) -> FileRange:
        from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined] # as above

        headers = self._headers if name not in self._direct else {"Accept-Encoding": "identity"}
        if span is not None:
            headers = {**headers, "Range": f"bytes={span[0]}-{span[0] + span[1] - 1}"}
        address = self._direct.get(name, f"{self._base}/{quote(name)}")
        with get_session().stream("GET", address, headers=headers, timeout=_TIMEOUT, follow_redirects=True) as response:
            if response.status_code == 416:  # the range begins behind the end of the file
                return FileRange(b"", _size_of(response, 0))
            if response.is_error:
                response.read()
                hf_raise_for_status(response)
            if response.history and response.url.host != response.history[0].url.host:
                # A signed address in the store of large files: used directly from now on, it needs no token.
                self._direct[name] = str(response.url)
            return self._received(name, response, span)

    def _received(self, name: str, response: httpx.Response, span: tuple[int, int] | None) -> FileRange:
        offset, limit = span or (0, _MAX_WHOLE)
        length = int(response.headers.get("Content-Length", "-1"))
        if span is None and length > limit:
            raise ModelError(f"{name} of {self.repo} has {length:,} bytes; expected at most {limit:,}.")
        if span is not None and not _has_range(response, offset, length, limit):
            raise NetworkError(
                f"The server of {self.repo} does not support range requests.", "Download the model first."
            )
        data = _read_at_most(response, limit)
        size = _size_of(response, len(data))
        if span is not None and len(data) < min(limit, size - offset):
            raise NetworkError(
                f"The server of {self.repo} sent {len(data):,} bytes of {name}; expected {min(limit, size - offset):,}."
            )
        self.fetched += len(data)
        return FileRange(data, size)


class HubFile:
    """One file of a repository as a source of bytes."""

    def __init__(self, repository: HubRepository, name: str, chunk: int) -> None:
        head = repository.read_range(name, 0, chunk)
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
        return self._repository.read_range(self._path, offset, end - offset).data


def _stays_inside(name: str) -> bool:
    return not name.startswith("/") and ".." not in name.split("/")


def _pause_after(error: Exception) -> float | None:
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        is_transient = error.response is not None and error.response.status_code in TRANSIENT_STATUSES
    else:
        is_transient = isinstance(error, httpx.TransportError)
    return 0.0 if is_transient else None


def _has_range(response: httpx.Response, offset: int, length: int, limit: int) -> bool:
    """Whether the response is the requested range: by its Content-Range, or because the whole file is no larger."""
    if response.status_code == 206:
        return str(response.headers.get("Content-Range", "")).startswith(f"bytes {offset}-")
    return offset == 0 and 0 <= length <= limit


def _size_of(response: httpx.Response, default: int) -> int:
    """The size of the file, which is after the slash in Content-Range."""
    match = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else default


def _read_at_most(response: httpx.Response, limit: int) -> bytes:
    chunks = []
    left = limit
    for chunk in response.iter_raw():
        chunks.append(chunk[:left])
        left -= len(chunks[-1])
        if left == 0:
            break
    return b"".join(chunks)


# A checkpoint on the Hub as a folder of headers: the small files whole, of each weight file only the header. The rest
# is a hole in a sparse file of the right size, so that the reader of local checkpoints can check headers, sizes and
# index.

_SMALL_FILES: Final = (
    "config.json",
    INDEX,
    "hf_quant_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "modules.json",
    "config_sentence_transformers.json",
    "[0-9]_*/config.json",
)
_CHUNK: Final = 256 << 10
"""Larger than the header of a 2B model, so that one request suffices."""


def mirror_headers(repository: HubRepository, folder: Path) -> None:
    """Write everything but the weights of `repository`'s checkpoint into the empty `folder`."""
    for name in repository.names:
        if any(fnmatchcase(name, pattern) for pattern in _SMALL_FILES):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(repository.read_whole(name))
    for name in _weight_files(repository, folder):
        _mirror_header(repository, name, folder / name)


def _weight_files(repository: HubRepository, folder: Path) -> Iterable[str]:
    """The weight files that exist; the reader checks that the index names no others."""
    names = {SINGLE}
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_bytes()).get("weight_map", {})
            names = {str(name) for name in weight_map.values()}
        except (ValueError, AttributeError):
            names = set()  # the reader reports what is wrong with it
    return sorted(name for name in names.intersection(repository.names) if Path(name).name == name)


def _mirror_header(repository: HubRepository, name: str, path: Path) -> None:
    source = repository.open(name, _CHUNK)
    prefix = source.read(0, 8)
    length = int.from_bytes(prefix, "little")
    with path.open("wb") as file:
        file.truncate(source.size)
        file.write(source.read(0, 8 + length) if length <= MAX_HEADER else prefix)
