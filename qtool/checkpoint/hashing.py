"""Hashes a file while other threads are still writing it.

Rule: bytes are hashed in file order, and only once everything before them has been written.
"""

from __future__ import annotations

import hashlib
import os
import threading

import numpy as np

_CHUNK = 1 << 22


class FollowingHasher:
    """The SHA-256 of the `nbytes` bytes of an open file, computed by a thread that follows its writers."""

    def __init__(self, descriptor: int, nbytes: int) -> None:
        self._descriptor = descriptor
        self._nbytes = nbytes
        self._extents: dict[int, int] = {}
        self._ready = 0
        self._changed = threading.Condition()
        self._digest = hashlib.sha256()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def written(self, offset: int, nbytes: int) -> None:
        """Tell that these bytes are final."""
        if nbytes == 0:
            return
        with self._changed:
            self._extents[offset] = offset + nbytes
            while (end := self._extents.pop(self._ready, None)) is not None:
                self._ready = end
            self._changed.notify()

    def cancel(self) -> None:
        """Stop following; no digest can be had any more."""
        with self._changed:
            self._nbytes = 0
            self._changed.notify()
        self._thread.join()

    def hexdigest(self) -> str:
        """Wait until every byte is hashed; the digest in hex."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()

    def _follow(self) -> None:
        buffer = np.empty(_CHUNK, np.uint8)
        position = 0
        try:
            while position < (end := self._wait_beyond(position)):
                count = os.preadv(self._descriptor, [buffer[: end - position].data], position)
                self._digest.update(buffer[:count].data)
                _start_writeback(self._descriptor, position, count)
                position += count
        except OSError as error:
            self._error = error

    def _wait_beyond(self, position: int) -> int:
        """Wait for bytes beyond `position`; how far the file may be read, or 0 after `cancel`."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready > position or position >= self._nbytes)
            return min(self._ready, self._nbytes)


def _start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    # Nobody reads these bytes again. Telling so makes Linux write them out now, beside the work, not at the final fsync.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
