"""Hashes files, or parts of files, while other threads are still writing them.

Rule: bytes are hashed in order, and only once everything before them has been written.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from heapq import nlargest
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qtool.checkpoint.sha256 import digests
from qtool.checkpoint.sha256_lanes import BLOCK, LANES

_CHUNK: Final = 1 << 18
"""Bytes of one extent in a step: eight of them fit a core's own cache."""


def sha256_of(paths: Sequence[Path]) -> list[str]:
    """Hex digests of finished files."""
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in paths]
        sizes = [os.fstat(file.fileno()).st_size for file in files]
        hasher = FollowingHasher([Extent(file.fileno(), 0, size) for file, size in zip(files, sizes, strict=True)])
        for index, size in enumerate(sizes):
            hasher.written(index, 0, size)
        return hasher.hexdigests()


@dataclass(frozen=True)
class Extent:
    """`nbytes` bytes of an open file from `start` on."""

    descriptor: int
    start: int
    nbytes: int


class _Followed:
    """An extent, how far it is written without a gap, and how far it is hashed (both counted from its start)."""

    def __init__(self, extent: Extent) -> None:
        self._extent = extent
        self.nbytes = extent.nbytes
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

    @property
    def step(self) -> int:
        """How much comes next: whole blocks, or nothing but the tail."""
        return min(_CHUNK, self.left // BLOCK * BLOCK)

    @property
    def can_step(self) -> bool:
        return self._ready - self.position >= self.step

    @property
    def is_written(self) -> bool:
        return self._ready == self.nbytes

    def read(self, buffer: NDArray[np.uint8]) -> None:
        """The next bytes; Linux may write them to the disk now, since nobody reads them again."""
        descriptor, place = self._extent.descriptor, self._extent.start + self.position
        if os.preadv(descriptor, [buffer.data], place) != buffer.nbytes:
            raise OSError(f"byte {place:,} of an output file could not be read back")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, place, buffer.nbytes, os.POSIX_FADV_DONTNEED)
        self.position += buffer.nbytes


class FollowingHasher:
    """The SHA-256 of extents of open files, computed by a thread that follows their writers.

    Several extents advance together. It goes on when the one with the most left can, or when all lanes have work.
    """

    def __init__(self, extents: Sequence[Extent]) -> None:
        self._extents = [_Followed(extent) for extent in extents]
        self._changed = threading.Condition()
        self._cancelled = False
        self._digests = digests(len(extents))
        self._hexdigests: list[str] = []
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def written(self, extent: int, offset: int, nbytes: int) -> None:
        """Tell that these bytes of the `extent`-th extent are final."""
        if nbytes == 0:
            return
        with self._changed:
            self._extents[extent].written(offset, nbytes)
            self._changed.notify()

    def cancel(self) -> None:
        """Stop following; no digest can be had any more."""
        with self._changed:
            self._cancelled = True
            self._changed.notify()
        self._thread.join()

    def hexdigests(self) -> list[str]:
        """Wait until every byte is hashed; the digests in hex, extent by extent."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._hexdigests

    def _follow(self) -> None:
        buffer = np.empty((LANES, _CHUNK), np.uint8)
        try:
            while chosen := self._next():
                nbytes = min(self._extents[index].step for index in chosen)
                self._advance(chosen, buffer if nbytes == _CHUNK else np.empty((LANES, nbytes), np.uint8))
            if not self._cancelled:
                self._hexdigests = [self._finish(index, extent) for index, extent in enumerate(self._extents)]
        except OSError as error:
            self._error = error

    def _next(self) -> list[int]:
        """Wait for work: up to LANES extents that can advance, those with the most left first; none at the end."""
        unfinished = [index for index, extent in enumerate(self._extents) if extent.step]
        longest = max(unfinished, key=lambda index: self._extents[index].left, default=None)
        chosen: list[int] = []

        def is_worth_while() -> bool:
            ready = [index for index in unfinished if self._extents[index].can_step]
            chosen[:] = nlargest(LANES, ready, key=lambda index: self._extents[index].left)
            return len(chosen) == LANES or longest in chosen or all(extent.is_written for extent in self._extents)

        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or is_worth_while())
            return [] if self._cancelled else chosen

    def _advance(self, chosen: Sequence[int], buffer: NDArray[np.uint8]) -> None:
        for index, row in zip(chosen, buffer, strict=False):
            self._extents[index].read(row)
        self._digests.update(chosen, buffer)

    def _finish(self, index: int, extent: _Followed) -> str:
        tail = np.empty(extent.left, np.uint8)
        extent.read(tail)
        return self._digests.finish(index, tail.tobytes(), extent.nbytes)
