"""Bytes of files that may lie anywhere: read in parts, or exactly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from qtool.errors import ModelError, reason

if TYPE_CHECKING:
    from typing_extensions import Self


class ByteSource(Protocol):
    """A file of `size` bytes that messages call `name`; `chunk` is a good number of bytes to read ahead."""

    name: str
    size: int
    chunk: int

    def read(self, offset: int, nbytes: int) -> bytes:
        """Up to `nbytes` bytes from `offset` on; fewer only at the end."""


class FileBytes(ByteSource):
    """A local file."""

    chunk = 1 << 18

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {reason(error)}.") from None
        self.name = str(path)
        self.size = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @override
    def read(self, offset: int, nbytes: int) -> bytes:
        return os.pread(self._file.fileno(), nbytes, offset)


def read_exactly(path: Path, offset: int, buffer: NDArray[np.uint8], what: str) -> None:
    """Fill `buffer` with the bytes of a file from `offset` on; safe from several threads. Errors name `what` was read."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {reason(error)}.") from None
    try:
        done = 0
        while done < buffer.nbytes:
            count = os.preadv(descriptor, [buffer[done:].data], offset + done)
            if count == 0:
                raise ModelError(f"{path} ended while {what} was read: it changed during the run.")
            done += count
    finally:
        os.close(descriptor)
