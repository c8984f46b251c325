"""The weights of a checkpoint on the Hub, read by range: some bytes at once, or all of them in order, ahead and checked."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qtool.progress import ignore
from qtool.storage.checkpoint import Checkpoint
from qtool.storage.hub_repository import HubRepository

BLOCK: Final = 8 << 20
"""Bytes of a request: much more than what a connection carries while the next request is on its way."""
CONNECTIONS: Final = 8
WINDOW: Final = 32
"""Blocks that are on their way or wait on the disk, a quarter of a gigabyte, unless a reader needs more at once."""
WINDOW_BYTES: Final = BLOCK * WINDOW
_RUN: Final = 1 << 20


@dataclass(frozen=True)
class WeightRead:
    """`nbytes` bytes from `offset` on of a weight file, which will be read once."""

    file: str
    offset: int
    nbytes: int


class HubWeights:
    """The bytes of the weight files in `repository`. Outside of `streamed` each read is a request of its own."""

    def __init__(self, repository: HubRepository) -> None:
        self.repository = repository
        self._stream: _Stream | None = None

    def read_into(self, file: str, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Fill `buffer` with the bytes of a file from `offset` on; safe from several threads."""
        if self._stream is not None and self._stream.read_into(file, offset, buffer):
            return
        data = self.repository.read_range(file, offset, buffer.nbytes).data
        if len(data) != buffer.nbytes:
            raise self.repository.changed(file)
        buffer[:] = np.frombuffer(data, np.uint8)

    @contextmanager
    def streamed(self, files: Sequence[str], folder: Path) -> Iterator[Callable[[Iterable[WeightRead]], None]]:
        """Fetch `files` whole, in their order, each checked against the hash that the Hub tells when the block ends well.

        The block gets a function that it must tell what it will read, and how often, about in the order of the files.
        What has arrived waits for its readers in an unnamed file in `folder`, which is no larger than WINDOW_BYTES unless
        they need more at once.
        """
        stream = _Stream(self.repository, files, folder)
        self._stream = stream
        try:
            yield stream.expect
            stream.finish()
        finally:
            self._stream = None
            stream.stop()


@contextmanager
def weights_ahead(checkpoint: Checkpoint, folder: Path) -> Iterator[Callable[[Iterable[WeightRead]], None]]:
    """While the block runs, weights that lie on the hub are fetched ahead of their readers: see `HubWeights.streamed`."""
    if not isinstance(checkpoint.weights, HubWeights):
        yield ignore
        return
    files = list(dict.fromkeys(info.file.name for info in checkpoint.tensors.values()))
    with checkpoint.weights.streamed(files, folder) as expect:
        yield expect


@dataclass(frozen=True)
class _Block:
    file: str
    offset: int
    nbytes: int


class _Stream:
    """Blocks of the files, fetched by several threads in order, hashed by one, and dropped after their last reader."""

    def __init__(self, repository: HubRepository, files: Sequence[str], folder: Path) -> None:
        self._repository = repository
        self._files = files
        self._blocks: list[_Block] = []
        self._of_file: dict[str, range] = {}
        for file in files:
            size = repository.entries[file].size
            size = repository.read_range(file, 0, 1).size if size is None else size
            added = [_Block(file, offset, min(BLOCK, size - offset)) for offset in range(0, size, BLOCK)]
            self._of_file[file] = range(len(self._blocks), len(self._blocks) + len(added))
            self._blocks += added
        self._unread = [0] * len(self._blocks)
        self._is_expecting = False  # until then each block is kept
        self._spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by its last user, which may be a thread
        self._free: list[int] = []
        self._slots = 0
        self._slot: dict[int, int] = {}  # of blocks that are on their way or have arrived and are still needed
        self._arrived: set[int] = set()
        self._hashed = 0  # blocks, from the first on
        self._is_checked = False
        self._next = 0
        self._wanted: Counter[int] = Counter()
        self._error: BaseException | None = None
        self._is_stopped = False
        self._changed = threading.Condition()
        threads = [self._hash_blocks, *[self._fetch_blocks] * min(CONNECTIONS, len(self._blocks))]
        self._running = len(threads)
        for work in threads:
            threading.Thread(target=self._guarded, args=(work,), daemon=True).start()

    # Readers.

    def expect(self, reads: Iterable[WeightRead]) -> None:
        """Take down what will be read; all else may be dropped as soon as it is hashed."""
        with self._changed:
            for read in reads:
                for index, start, end in self._parts(read.file, read.offset, read.nbytes):
                    self._unread[index] += end - start
            self._is_expecting = True
            for index in list(self._slot):
                self._drop_unneeded(index)

    def read_into(self, file: str, offset: int, buffer: NDArray[np.uint8]) -> bool:
        """Fill `buffer`, waiting until the bytes have arrived; False where they have been dropped."""
        for index, start, end in self._parts(file, offset, buffer.nbytes):
            slot = self._awaited(index)
            if slot is None:
                return False
            block = self._blocks[index]
            place = slot * BLOCK + start - block.offset
            view = memoryview(buffer.data)[start - offset : end - offset]
            if os.preadv(self._spool.fileno(), [view], place) != end - start:
                raise OSError("the file that weights wait in was cut off")
            self._note_read(index, end - start + 1)
        return True

    def _awaited(self, index: int) -> int | None:
        with self._changed:
            self._wanted[index] += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._is_over or index in self._arrived or self._is_gone(index))
                if self._error is not None:
                    raise self._error
                if index not in self._arrived:
                    return None
                self._unread[index] += 1  # so that it stays while it is being read
                return self._slot[index]
            finally:
                self._wanted[index] -= 1
                if not self._wanted[index]:
                    del self._wanted[index]

    def _is_gone(self, index: int) -> bool:
        """Whether the block came and was dropped."""
        return index < self._next and index not in self._slot

    @property
    def _is_over(self) -> bool:
        return self._error is not None or self._is_stopped

    def _note_read(self, index: int, nbytes: int) -> None:
        with self._changed:
            self._unread[index] -= nbytes
            self._drop_unneeded(index)

    def _drop_unneeded(self, index: int) -> None:
        is_needed = self._unread[index] > 0 or not self._is_expecting or index >= self._hashed
        if index in self._slot and not is_needed:
            self._free.append(self._slot.pop(index))
            self._arrived.discard(index)
            self._changed.notify_all()

    def _parts(self, file: str, offset: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
        """(block, start, end) of the parts of a range that lie in different blocks; start and end count in the file."""
        end = offset + nbytes
        while offset < end:
            index = self._of_file[file].start + offset // BLOCK
            until = min(end, (offset // BLOCK + 1) * BLOCK)
            yield index, offset, until
            offset = until

    # Threads that fetch and hash.

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised where the weights are read
            with self._changed:
                self._error = self._error or error
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()
                self._close_if_unused()

    def _close_if_unused(self) -> None:
        """Close the spool once nobody can touch it: a thread may wait for the network long after the run has ended."""
        if self._is_stopped and not self._running:
            self._spool.close()

    def _fetch_blocks(self) -> None:
        while (taken := self._taken()) is not None:
            index, slot = taken
            block = self._blocks[index]
            self._fetch(block, slot * BLOCK)
            with self._changed:
                self._arrived.add(index)
                self._changed.notify_all()

    def _taken(self) -> tuple[int, int] | None:
        """The next block to fetch and where it goes, as soon as there is room or a reader waits for it or a later one."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._has_room() or self._next == len(self._blocks))
            if self._is_over or self._next == len(self._blocks):
                return None
            index = self._next
            self._next += 1
            if not self._free:
                self._free.append(self._slots)
                self._slots += 1
            self._slot[index] = self._free.pop()
            return index, self._slot[index]

    def _has_room(self) -> bool:
        return len(self._slot) < WINDOW or max(self._wanted, default=-1) >= self._next

    def _fetch(self, block: _Block, place: int) -> None:
        waiting: list[bytes] = []
        nbytes = 0

        def write() -> None:
            nonlocal place, nbytes
            if waiting and not self._is_stopped:
                written = os.pwritev(self._spool.fileno(), waiting, place)
                if written < nbytes:
                    os.pwrite(self._spool.fileno(), b"".join(waiting)[written:], place + written)
                place += nbytes
            waiting.clear()
            nbytes = 0

        def take(piece: bytes) -> None:
            nonlocal nbytes
            waiting.append(piece)
            nbytes += len(piece)
            if nbytes >= _RUN:
                write()

        end = place + block.nbytes
        self._repository.receive(block.file, block.offset, block.nbytes, take)
        write()
        if place != end and not self._is_stopped:
            raise self._repository.changed(block.file)

    def _hash_blocks(self) -> None:
        buffer = bytearray(BLOCK)
        for file in self._files:
            entry = self._repository.entries[file]
            digest = entry.digest() if entry.is_hashed else None
            for index in self._of_file[file]:
                with self._changed:
                    while index not in self._arrived:
                        if self._is_over:
                            return
                        self._changed.wait()
                    place = self._slot[index] * BLOCK
                if digest is not None:
                    view = memoryview(buffer)[: self._blocks[index].nbytes]
                    os.preadv(self._spool.fileno(), [view], place)
                    digest.update(view)
                with self._changed:
                    self._hashed = index + 1
                    self._drop_unneeded(index)
                    self._changed.notify_all()
            if digest is not None:
                self._repository.require_hash(file, digest)
        with self._changed:
            self._is_checked = True
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait until everything has been fetched and checked. Raises what went wrong."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._is_checked)
            if self._error is not None:
                raise self._error

    def stop(self) -> None:
        """Let the threads end after what they are at."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
            self._close_if_unused()
