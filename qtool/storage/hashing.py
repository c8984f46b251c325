"""SHA-256 of files and of parts of files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qtool.workers import worker_pool

_CHUNK: Final = 1 << 20


def sha256_of(paths: Sequence[Path]) -> list[str]:
    """Hex digests of whole files, several at a time."""
    with worker_pool() as pool:
        return list(pool.map(lambda path: sha256_of_part(path, 0, path.stat().st_size), paths))


def sha256_of_part(path: Path, offset: int, nbytes: int) -> str:
    """Hex digest of `nbytes` bytes of a file from `offset` on."""
    with path.open("rb", buffering=0) as file:
        return sha256_of_range(file.fileno(), offset, nbytes)


def sha256_of_range(descriptor: int, offset: int, nbytes: int) -> str:
    """The same of an open file; raises OSError when the file ends before."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_CHUNK, nbytes)))
    end = offset + nbytes
    while offset < end:
        count = os.preadv(descriptor, [buffer[: end - offset]], offset)
        if count == 0:
            raise OSError(f"the file ends at byte {offset:,}, before byte {end:,} that was to be hashed")
        digest.update(buffer[:count])
        offset += count
    return digest.hexdigest()
