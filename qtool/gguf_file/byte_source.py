"""Bytes that may lie anywhere and are fetched in parts.

Rule: only the parts that are asked for are read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qtool.errors import ModelError

if TYPE_CHECKING:
    from typing_extensions import Self


class ByteSource(Protocol):
    """A file of known size; `chunk` is how much to ask for at once."""

    @property
    def name(self) -> str:
        """What to call it in messages."""

    @property
    def size(self) -> int:
        """Its bytes in all."""

    @property
    def chunk(self) -> int:
        """A good number of bytes to read ahead."""

    def read(self, offset: int, nbytes: int) -> bytes:
        """Up to `nbytes` bytes from `offset` on; fewer only at the end."""


class FileBytes:
    """A local file."""

    chunk = 1 << 18

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}.") from None
        self.name = str(path)
        self.size = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, offset: int, nbytes: int) -> bytes:
        """See ByteSource."""
        return os.pread(self._file.fileno(), nbytes, offset)
