"""Output files: laid out in advance, then open for several writers and hashed as they are completed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qtool.storage.hashing import sha256_of_range

HEADER: Final = "header of {}"
"""The name under which the hash of a file's header goes, where each tensor has its own hash."""


@dataclass(frozen=True)
class FileLayout:
    """One output file: its header, and (offset, nbytes) of each tensor in it."""

    file_name: str
    header: bytes
    ranges: Mapping[str, tuple[int, int]]
    nbytes: int


@dataclass(frozen=True)
class FileRange:
    """`nbytes` bytes of an open file from `offset` on."""

    descriptor: int
    offset: int
    nbytes: int


class OutputFiles:
    """Files being written; `write` is safe from several threads.

    `ranges` says where each tensor goes, `hashed_as` under which name of `hashed` its bytes are hashed. The thread that
    writes the last byte of a hashed range also hashes it: its bytes are still in the page cache, and the others write on.
    """

    def __init__(
        self, ranges: Mapping[str, FileRange], hashed_as: Mapping[str, str], hashed: Mapping[str, FileRange]
    ) -> None:
        self._ranges = ranges
        self._hashed_as = hashed_as
        self._hashed = hashed
        self._left = {name: each.nbytes for name, each in hashed.items()}
        self._digests: dict[str, str] = {}
        self._lock = threading.Lock()

    def write(self, name: str, start: int, data: NDArray[np.uint8]) -> None:
        """Write `data` at byte `start` of the tensor `name`; each byte is written once."""
        target, hashed_as = self._ranges[name], self._hashed_as[name]
        _write_at(target.descriptor, data.data, target.offset + start)
        with self._lock:
            self._left[hashed_as] -= data.nbytes
            is_complete = data.nbytes and not self._left[hashed_as]
        if is_complete:
            whole = self._hashed[hashed_as]
            self._digests[hashed_as] = sha256_of_range(whole.descriptor, whole.offset, whole.nbytes)
            if hasattr(os, "posix_fadvise"):  # Linux then writes it to the disk now, and not when the folder is synced
                os.posix_fadvise(whole.descriptor, whole.offset, whole.nbytes, os.POSIX_FADV_DONTNEED)

    def sha256(self) -> Mapping[str, str]:
        """The digests in hex by name, once everything has been written."""
        return {name: self._digests[name] for name in self._hashed}


@contextmanager
def open_files(layouts: Sequence[FileLayout], folder: Path, *, hash_tensors: bool = False) -> Iterator[OutputFiles]:
    """Create files and write their headers; tensors are then written by their names.

    Each file is hashed as a whole, under its name. With `hash_tensors`, header and tensors each have a hash instead: the
    hash of one file of several gigabytes is the work of one thread, and the others would wait for it.
    """
    with ExitStack() as stack:
        ranges: dict[str, FileRange] = {}
        hashed_as: dict[str, str] = {}
        whole: dict[str, FileRange] = {}
        for layout in layouts:
            descriptor = stack.enter_context(_created(folder / layout.file_name, layout.nbytes))
            whole[layout.file_name] = FileRange(descriptor, 0, layout.nbytes)
            header = HEADER.format(layout.file_name)
            for name, (offset, nbytes) in {header: (0, len(layout.header)), **layout.ranges}.items():
                ranges[name] = FileRange(descriptor, offset, nbytes)
                hashed_as[name] = name if hash_tensors else layout.file_name
        files = OutputFiles(ranges, hashed_as, ranges if hash_tensors else whole)
        for layout in layouts:
            files.write(HEADER.format(layout.file_name), 0, np.frombuffer(layout.header, np.uint8))
        yield files


@contextmanager
def _created(path: Path, nbytes: int) -> Iterator[int]:
    """A descriptor of a new file with all its bytes reserved; raises OSError when the disk does not have them."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
    try:
        if nbytes and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, nbytes)
        else:
            os.ftruncate(descriptor, nbytes)
        yield descriptor
    finally:
        os.close(descriptor)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
