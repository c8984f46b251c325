"""Output files, open for several writers and hashed as they fill.

Rule: every byte goes through `write`, so that the digests are complete when the files are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qtool.storage.hashing import Extent, FollowingHasher
from qtool.storage.output import create_file, write_at
from qtool.storage.shards import WeightShard


@dataclass(frozen=True)
class Place:
    """Where bytes of one name go: `offset` of a file, and `hashed_at` of the extent whose hash they belong to.

    With a `slice_bytes`, that extent is the first of several of this size.
    """

    descriptor: int
    offset: int
    extent: int
    hashed_at: int
    slice_bytes: int = sys.maxsize


class OutputFiles:
    """Files being written; `write` is safe from several threads."""

    def __init__(self, places: Mapping[str, Place], hasher: FollowingHasher, extent_names: Sequence[str]) -> None:
        self._places = places
        self._hasher = hasher
        self._extent_names = extent_names

    def write(self, name: str, start: int, data: NDArray[np.uint8]) -> None:
        """Write `data` at byte `start` of what is called `name`."""
        place = self._places[name]
        write_at(place.descriptor, data.data, place.offset + start)
        done = 0
        while done < data.nbytes:
            number, within = divmod(place.hashed_at + start + done, place.slice_bytes)
            length = min(data.nbytes - done, place.slice_bytes - within)
            self._hasher.written(place.extent + number, within, length)
            done += length

    def sha256(self) -> Mapping[str, str]:
        """Wait until every byte is written and hashed; the digest of each extent by name."""
        return dict(zip(self._extent_names, self._hasher.hexdigests(), strict=True))


@contextmanager
def open_outputs(
    places: Mapping[str, Place], extents: Mapping[str, Extent], headers: Iterable[tuple[str, bytes]]
) -> Iterator[OutputFiles]:
    """Follow `extents` with a hasher and write `headers`, by the names of their places."""
    hasher = FollowingHasher(list(extents.values()))
    try:
        files = OutputFiles(places, hasher, list(extents))
        for name, header in headers:
            files.write(name, 0, np.frombuffer(header, np.uint8))
        yield files
    finally:
        hasher.cancel()


@contextmanager
def created(path: Path, nbytes: int) -> Iterator[int]:
    """A descriptor of a new file with all its bytes reserved."""
    descriptor = create_file(path, nbytes)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def open_shards(shards: Sequence[WeightShard], folder: Path) -> Iterator[OutputFiles]:
    """Create safetensors files, each hashed as a whole; tensors are written by their names."""
    with ExitStack() as stack:
        descriptors = [stack.enter_context(created(folder / shard.file_name, shard.nbytes)) for shard in shards]
        extents = {s.file_name: Extent(d, 0, s.nbytes) for s, d in zip(shards, descriptors, strict=True)}
        places = {
            name: Place(descriptors[index], start, index, start)
            for index, shard in enumerate(shards)
            for name, start in {shard.file_name: 0, **shard.offsets}.items()
        }
        headers = [(shard.file_name, shard.header) for shard in shards]
        yield stack.enter_context(open_outputs(places, extents, headers))
