"""One output shard, open for several writers and hashed as it fills.

Rule: every byte goes through `write`, so that the digest is complete when the file is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qtool.checkpoint.hashing import FollowingHasher
from qtool.checkpoint.layout import Shard
from qtool.checkpoint.writer import create_file, write_at


@dataclass(frozen=True)
class ShardFile:
    """A shard being written; `write` is safe from several threads."""

    shard: Shard
    hasher: FollowingHasher
    _descriptor: int

    def write(self, hf_name: str, start: int, data: NDArray[np.uint8]) -> None:
        """Write `data` at byte `start` of a tensor."""
        self._write_at(self.shard.offsets[hf_name] + start, data.data)

    def write_header(self) -> None:
        """Write what comes before the tensors."""
        self._write_at(0, memoryview(self.shard.header))

    def _write_at(self, offset: int, data: memoryview) -> None:
        write_at(self._descriptor, data, offset)
        self.hasher.written(offset, len(data))


@contextmanager
def open_shard(shard: Shard, folder: Path) -> Iterator[ShardFile]:
    """Create the file with all its bytes reserved and its header written."""
    descriptor = create_file(folder / shard.file_name, shard.nbytes)
    hasher = FollowingHasher(descriptor, shard.nbytes)
    try:
        file = ShardFile(shard, hasher, descriptor)
        file.write_header()
        yield file
    finally:
        hasher.cancel()
        os.close(descriptor)
