"""Where an artefact lies: a folder of this disk or a repository on the hub, seen alike.

Rule: the rest of the inspection asks for names, headers and a few bytes, and never learns which of the two it is.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import unquote

from qtool import resources
from qtool.errors import UsageError
from qtool.storage.gguf import ByteSource, FileBytes
from qtool.storage.hub import HubRepository, is_path, mirror_headers

ByteSpan = tuple[int, int]
"""Offset and number of bytes."""

_SCHEME: Final = "hf://"
_DEPTH: Final = 2
"""Files in folders below the first are some other artefact's."""
_HEADER_CHUNK: Final = 2 << 20
_GAP: Final = 256 << 10  # what lies between two parts is fetched with them if it is less
_MAX_REQUESTS: Final = 16
_HUB_ADDRESS: Final = re.compile(r"([^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(.+))?")


class ArtefactLocation(Protocol):
    """A folder, or one file of it."""

    @property
    def revision(self) -> str | None:
        """The commit of a repository on the hub."""

    @property
    def selected(self) -> str | None:
        """The one file that is asked for, None where all are."""

    @property
    def names(self) -> Sequence[str]:
        """Paths of the files, with slashes."""

    @property
    def fetched(self) -> int:
        """Bytes that came over the network."""

    @property
    def is_local(self) -> bool:
        """Whether a few rows of weights may be read: from the hub they would have to be fetched, and only headers are."""

    def path_of(self, name: str) -> str:
        """How to write a file's place on a command line; of the folder itself with the empty name."""

    def open(self, name: str) -> AbstractContextManager[ByteSource]:
        """A file to read a header from."""

    def read_spans(self, name: str, spans: Sequence[ByteSpan]) -> list[bytes] | None:
        """The bytes of each span; None where that would take too many requests."""

    def checkpoint(self) -> AbstractContextManager[Path]:
        """A folder on this disk with the headers and configuration of the safetensors checkpoint."""


class LocalLocation:
    """A folder of this disk."""

    revision: str | None = None
    fetched: int = 0
    is_local: bool = True

    def __init__(self, folder: Path, selected: str | None = None) -> None:
        self._folder = folder
        self.selected = selected
        found = (path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file())
        self.names = sorted(path.relative_to(folder).as_posix() for path in found)

    def path_of(self, name: str) -> str:
        """See Place."""
        return str(self._folder / name)

    @contextmanager
    def open(self, name: str) -> Iterator[ByteSource]:
        """See Place."""
        with FileBytes(self._folder / name) as source:
            yield source

    def read_spans(self, name: str, spans: Sequence[ByteSpan]) -> list[bytes]:
        """See Place."""
        with FileBytes(self._folder / name) as source:
            return [source.read(*span) for span in spans]

    @contextmanager
    def checkpoint(self) -> Iterator[Path]:
        """See Place."""
        yield self._folder


class HubLocation:
    """A repository on the hub."""

    is_local: bool = False

    def __init__(self, repository: HubRepository, selected: str | None = None) -> None:
        self._repository = repository
        self.revision: str | None = repository.revision
        self.selected = selected
        self.names = [name for name in repository.names if name.count("/") < _DEPTH or name == selected]
        if selected is not None and selected not in repository.names:
            raise UsageError(f"{repository.repo} has no file {selected}.")

    @property
    def fetched(self) -> int:
        """See Place."""
        return self._repository.fetched

    def path_of(self, name: str) -> str:
        """See Place."""
        return f"{_SCHEME}{self._repository.repo}" + (f"/{name}" if name else "")

    @contextmanager
    def open(self, name: str) -> Iterator[ByteSource]:
        """See Place."""
        yield self._repository.open(name, _HEADER_CHUNK)

    def read_spans(self, name: str, spans: Sequence[ByteSpan]) -> list[bytes] | None:
        """See Place."""
        runs = _merged(spans)
        if len(runs) > _MAX_REQUESTS:
            return None
        parts = {start: self._repository.read_range(name, start, end - start).data for start, end in runs}
        return [_cut(parts, offset, nbytes) for offset, nbytes in spans]

    @contextmanager
    def checkpoint(self) -> Iterator[Path]:
        """See Place."""
        with tempfile.TemporaryDirectory(prefix="qtool-") as folder:
            mirror_headers(self._repository, Path(folder))
            yield Path(folder)


def open_location(target: str, revision: str | None = None, token: str | None = None) -> ArtefactLocation:
    """Find `target`: a file, a folder, a built-in demo model, `org/name` or `hf://org/name[@revision][/file]`."""
    path = Path(target)
    if not target.startswith(_SCHEME) and path.exists():
        if revision is not None:
            raise UsageError(f"{target} lies on this disk and has no revisions.", "Leave --revision out.")
        return LocalLocation(path) if path.is_dir() else LocalLocation(path.parent, path.name)
    if target in resources.demo_models():
        return LocalLocation(resources.demo_model(target))
    repo, in_name, name = _hub_address(target)
    if in_name and revision not in (None, in_name):
        raise UsageError(f"{target} names one revision and --revision another.")
    return HubLocation(HubRepository(repo, in_name or revision, token), name)


def _hub_address(target: str) -> tuple[str, str | None, str | None]:
    match = _HUB_ADDRESS.fullmatch(target.removeprefix(_SCHEME))
    if match is None or is_path(target):
        raise UsageError(
            f"{target} is no file or folder here and no repository.",
            "Pass a file, a folder, org/name or hf://org/name[@revision][/file].",
        )
    return match[1], unquote(match[2]) if match[2] else None, match[3]


def _merged(spans: Sequence[ByteSpan]) -> list[tuple[int, int]]:
    """Start and end of the runs to fetch: spans with little between them go together."""
    runs: list[tuple[int, int]] = []
    for offset, nbytes in sorted(spans):
        if runs and offset - runs[-1][1] <= _GAP:
            runs[-1] = (runs[-1][0], max(runs[-1][1], offset + nbytes))
        else:
            runs.append((offset, offset + nbytes))
    return runs


def _cut(parts: dict[int, bytes], offset: int, nbytes: int) -> bytes:
    start = max(start for start in parts if start <= offset)
    return parts[start][offset - start : offset - start + nbytes]
