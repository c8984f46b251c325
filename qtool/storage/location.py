"""Where an artefact lies: a folder of this disk or a repository on the hub, seen alike."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from qtool import resources
from qtool.errors import UsageError
from qtool.storage.byte_source import ByteSource, FileBytes, read_exactly
from qtool.storage.hub import SCHEME, is_path
from qtool.storage.hub_folder import mirror_configs
from qtool.storage.hub_repository import HubRepository

ByteSpan = tuple[int, int]
"""Offset and number of bytes."""

_DEPTH: Final = 2
"""Files in folders below the first are some other artefact's."""
HEADER_CHUNK: Final = 2 << 20
_GAP: Final = 256 << 10  # what lies between two parts is fetched with them if it is less
_MAX_REQUESTS: Final = 16
_HUB_ADDRESS: Final = re.compile(r"([^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(.+))?")


class ArtefactLocation(Protocol):
    """A folder or, with `selected`, one file of it.

    `revision` is the commit of a repository on the hub. Of a model that `is_local` a few rows of weights may be read: from
    the hub, where only headers are fetched, they would have to be transferred first.
    """

    revision: str | None
    selected: str | None
    is_local: bool

    @property
    def names(self) -> Sequence[str]:
        """Paths of the files, with slashes."""

    @property
    def fetched(self) -> int:
        """Bytes that came over the network."""

    def path_of(self, name: str) -> str:
        """How to write a file's place on a command line; of the folder itself with the empty name."""

    def open(self, name: str, chunk: int = HEADER_CHUNK) -> AbstractContextManager[ByteSource]:
        """A file to read a header from; over the network `chunk` bytes come at once."""

    def read_into(self, name: str, offset: int, buffer: NDArray[np.uint8], what: str) -> None:
        """Fill `buffer` with the bytes of a file from `offset` on; errors name `what` was read."""

    def read_spans(self, name: str, spans: Sequence[ByteSpan]) -> list[bytes] | None:
        """The bytes of each span; None where that would take too many requests."""

    def checkpoint(self) -> AbstractContextManager[Path]:
        """A folder on this disk with the headers and configuration of the safetensors checkpoint."""


class LocalLocation(ArtefactLocation):
    """A folder of this disk, or those files of it that `names` lists; `revision` is the commit that it was downloaded from."""

    is_local = True

    def __init__(
        self,
        folder: Path,
        selected: str | None = None,
        revision: str | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self._folder = folder
        self._given = names
        self.selected = selected
        self.revision = revision

    @property
    @override
    def fetched(self) -> int:
        return 0

    @cached_property
    def _names(self) -> Sequence[str]:
        if self._given is not None:
            return self._given
        found = (path for pattern in ("*", "*/*") for path in self._folder.glob(pattern) if path.is_file())
        return sorted(path.relative_to(self._folder).as_posix() for path in found)

    @property
    @override
    def names(self) -> Sequence[str]:
        return self._names

    @override
    def path_of(self, name: str) -> str:
        return str(self._folder / name)

    @contextmanager
    @override
    def open(self, name: str, chunk: int = HEADER_CHUNK) -> Iterator[ByteSource]:
        del chunk
        with FileBytes(self._folder / name) as source:
            yield source

    @override
    def read_into(self, name: str, offset: int, buffer: NDArray[np.uint8], what: str) -> None:
        read_exactly(self._folder / name, offset, buffer, what)

    @override
    def read_spans(self, name: str, spans: Sequence[ByteSpan]) -> list[bytes]:
        with FileBytes(self._folder / name) as source:
            return [source.read(*span) for span in spans]

    @contextmanager
    @override
    def checkpoint(self) -> Iterator[Path]:
        yield self._folder


class HubLocation(ArtefactLocation):
    """A repository on the hub."""

    is_local = False

    def __init__(self, repository: HubRepository, selected: str | None = None) -> None:
        self.repository = repository
        self.revision = repository.revision
        self.selected = selected
        self._names = [name for name in repository.names if name.count("/") < _DEPTH or name == selected]
        if selected is not None and selected not in repository.names:
            raise UsageError(f"{repository.repo} has no file {selected}.")

    @property
    @override
    def names(self) -> Sequence[str]:
        return self._names

    @property
    @override
    def fetched(self) -> int:
        return self.repository.fetched

    @override
    def path_of(self, name: str) -> str:
        return f"{SCHEME}{self.repository.repo}" + (f"/{name}" if name else "")

    @contextmanager
    @override
    def open(self, name: str, chunk: int = HEADER_CHUNK) -> Iterator[ByteSource]:
        yield self.repository.open(name, chunk)

    @override
    def read_into(self, name: str, offset: int, buffer: NDArray[np.uint8], what: str) -> None:
        del what  # the repository's errors name the file
        buffer[:] = np.frombuffer(self.repository.read_range(name, offset, buffer.nbytes).data, np.uint8)

    @override
    def read_spans(self, name: str, spans: Sequence[ByteSpan]) -> list[bytes] | None:
        runs = _merged(spans)
        if len(runs) > _MAX_REQUESTS:
            return None
        parts = {start: self.repository.read_range(name, start, end - start).data for start, end in runs}
        return [_cut(parts, offset, nbytes) for offset, nbytes in spans]

    @contextmanager
    @override
    def checkpoint(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="qtool-") as folder:
            mirror_configs(self.repository, Path(folder))
            yield Path(folder)


def open_location(target: str, revision: str | None = None, token: str | None = None) -> ArtefactLocation:
    """Find `target`: a file, a folder, a built-in demo model, `org/name` or `hf://org/name[@revision][/file]`."""
    if is_on_this_disk(target):
        return local_location(target, revision)
    address = hub_address(target, revision)
    return HubLocation(HubRepository(address.repo, address.revision, token), address.file)


def is_on_this_disk(target: str) -> bool:
    """Whether a target is a file, a folder or a demo model, and no repository."""
    return not target.startswith(SCHEME) and (Path(target).exists() or target in resources.demo_models())


def local_location(target: str, revision: str | None = None) -> LocalLocation:
    """A file, a folder or a demo model. Raises UsageError for a revision, which none of them has."""
    if revision is not None:
        raise UsageError(f"{target} is on this disk and has no revisions.", "Leave out --revision.")
    path = Path(target)
    if not path.exists():
        return LocalLocation(resources.demo_model(target))
    return LocalLocation(path) if path.is_dir() else LocalLocation(path.parent, path.name)


@dataclass(frozen=True)
class HubAddress:
    """What `hf://org/name[@revision][/file]` says."""

    repo: str
    revision: str | None
    file: str | None

    @property
    def target(self) -> str:
        """As it is written, without the file."""
        return f"{SCHEME}{self.repo}" + (f"@{quote(self.revision, safe='/')}" if self.revision else "")


def hub_address(target: str, revision: str | None = None) -> HubAddress:
    """The parts of a target that is not on this disk. Raises UsageError for what is no address or names two revisions."""
    match = _HUB_ADDRESS.fullmatch(target.removeprefix(SCHEME))
    if match is None or is_path(target):
        raise UsageError(
            f"Not a local file, a local folder or a Hub repository: {target!r}.",
            "Pass a file, a folder, org/name or hf://org/name[@revision][/file].",
        )
    in_name = unquote(match[2]) if match[2] else None
    if in_name and revision not in (None, in_name):
        raise UsageError(
            f"{target} names the revision {in_name}; --revision asks for {revision}.", "Leave one of them out."
        )
    return HubAddress(match[1], in_name or revision, match[3])


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
