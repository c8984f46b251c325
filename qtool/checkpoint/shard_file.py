"""Output shards, open for several writers and hashed as they fill.

Rule: every byte goes through `write`, so that the digests are complete when the files are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qtool.checkpoint.hashing import FollowingHasher
from qtool.checkpoint.layout import Shard
from qtool.checkpoint.writer import create_file, write_at


class ShardFiles:
    """Shards being written; `write` is safe from several threads."""

    def __init__(self, shards: Sequence[Shard], descriptors: Sequence[int], hasher: FollowingHasher) -> None:
        self._shards = shards
        self._descriptors = descriptors
        self._hasher = hasher
        self._places = {name: (i, start) for i, shard in enumerate(shards) for name, start in shard.offsets.items()}

    def write(self, hf_name: str, start: int, data: NDArray[np.uint8]) -> None:
        """Write `data` at byte `start` of a tensor."""
        shard, offset = self._places[hf_name]
        self._write_at(shard, offset + start, data.data)

    def write_headers(self) -> None:
        """Write what comes before the tensors."""
        for index, shard in enumerate(self._shards):
            self._write_at(index, 0, memoryview(shard.header))

    def progress_at(self, hf_name: str) -> float:
        """Which part of its shard lies before a tensor."""
        shard, offset = self._places[hf_name]
        return offset / self._shards[shard].nbytes

    def sha256(self) -> Mapping[str, str]:
        """Wait until every byte is written and hashed; the digest of each file by name."""
        return dict(zip((shard.file_name for shard in self._shards), self._hasher.hexdigests(), strict=True))

    def _write_at(self, shard: int, offset: int, data: memoryview) -> None:
        write_at(self._descriptors[shard], data, offset)
        self._hasher.written(shard, offset, len(data))


@contextmanager
def open_shards(shards: Sequence[Shard], folder: Path) -> Iterator[ShardFiles]:
    """Create the files with all their bytes reserved and their headers written."""
    with ExitStack() as stack:
        descriptors = []
        for shard in shards:
            descriptors.append(create_file(folder / shard.file_name, shard.nbytes))
            stack.callback(os.close, descriptors[-1])
        hasher = FollowingHasher([(d, shard.nbytes) for d, shard in zip(descriptors, shards, strict=True)])
        stack.callback(hasher.cancel)
        files = ShardFiles(shards, descriptors, hasher)
        files.write_headers()
        yield files
