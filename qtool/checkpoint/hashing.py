"""Hashes files while other threads are still writing them.

Rule: bytes are hashed in file order, and only once everything before them has been written.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qtool.checkpoint.sha256 import digests
from qtool.checkpoint.sha256_lanes import BLOCK, LANES

_CHUNK: Final = 1 << 18
"""Bytes of one file in a step: eight of them fit a core's own cache."""


def sha256_of(paths: Sequence[Path]) -> list[str]:
    """Hex digests of finished files."""
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in paths]
        sizes = [os.fstat(file.fileno()).st_size for file in files]
        hasher = FollowingHasher([(file.fileno(), size) for file, size in zip(files, sizes, strict=True)])
        for index, size in enumerate(sizes):
            hasher.written(index, 0, size)
        return hasher.hexdigests()


class _Followed:
    """A file, how far it is written without a gap, and how far it is hashed."""

    def __init__(self, descriptor: int, nbytes: int) -> None:
        self.descriptor, self.nbytes = descriptor, nbytes
        self.position = 0
        self._ready = 0
        self._extents: dict[int, int] = {}

    def written(self, offset: int, nbytes: int) -> None:
        self._extents[offset] = offset + nbytes
        while (end := self._extents.pop(self._ready, None)) is not None:
            self._ready = end

    @property
    def left(self) -> int:
        return self.nbytes - self.position

    def has_ready(self, nbytes: int) -> bool:
        return self._ready - self.position >= nbytes

    def read(self, buffer: NDArray[np.uint8]) -> None:
        """The next bytes; Linux may write them to the disk now, since nobody reads them again."""
        if os.preadv(self.descriptor, [buffer.data], self.position) != buffer.nbytes:
            raise OSError(f"byte {self.position:,} of an output file could not be read back")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, self.position, buffer.nbytes, os.POSIX_FADV_DONTNEED)
        self.position += buffer.nbytes


class FollowingHasher:
    """The SHA-256 of open files of known sizes, computed by a thread that follows their writers.

    Several files advance together; the one with the most left is never kept waiting for another.
    """

    def __init__(self, files: Sequence[tuple[int, int]]) -> None:
        self._files = [_Followed(descriptor, nbytes) for descriptor, nbytes in files]
        self._changed = threading.Condition()
        self._cancelled = False
        self._digests = digests(len(files))
        self._hexdigests: list[str] = []
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def written(self, file: int, offset: int, nbytes: int) -> None:
        """Tell that these bytes of the `file`-th file are final."""
        if nbytes == 0:
            return
        with self._changed:
            self._files[file].written(offset, nbytes)
            self._changed.notify()

    def cancel(self) -> None:
        """Stop following; no digest can be had any more."""
        with self._changed:
            self._cancelled = True
            self._changed.notify()
        self._thread.join()

    def hexdigests(self) -> list[str]:
        """Wait until every byte is hashed; the digests in hex, file by file."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._hexdigests

    def _follow(self) -> None:
        buffer = np.empty((LANES, _CHUNK), np.uint8)
        try:
            while (nbytes := self._step()) and self._wait(nbytes):
                self._advance(buffer[:, :nbytes] if nbytes == _CHUNK else np.empty((LANES, nbytes), np.uint8))
            if self._wait(0):
                self._hexdigests = [self._finish(index, file) for index, file in enumerate(self._files)]
        except OSError as error:
            self._error = error

    def _longest(self) -> list[int]:
        return sorted(range(len(self._files)), key=lambda index: -self._files[index].left)

    def _step(self) -> int:
        """How much of the file with the most left comes next: whole blocks."""
        most = max((file.left for file in self._files), default=0)
        return min(_CHUNK, most // BLOCK * BLOCK)

    def _wait(self, nbytes: int) -> bool:
        """Wait for `nbytes` of the file with the most left, or with 0 for the last of all; False after `cancel`."""
        awaited = [self._files[i] for i in self._longest()[: 1 if nbytes else None]]
        with self._changed:
            self._changed.wait_for(
                lambda: self._cancelled or all(file.has_ready(nbytes or file.left) for file in awaited)
            )
            return not self._cancelled

    def _advance(self, buffer: NDArray[np.uint8]) -> None:
        with self._changed:
            ready = [i for i in self._longest() if self._files[i].has_ready(buffer.shape[1])][:LANES]
        for index, row in zip(ready, buffer, strict=False):
            self._files[index].read(row)
        self._digests.update(ready, buffer)

    def _finish(self, index: int, file: _Followed) -> str:
        nbytes = file.nbytes
        tail = np.empty(file.left, np.uint8)
        file.read(tail)
        return self._digests.finish(index, tail.tobytes(), nbytes)
