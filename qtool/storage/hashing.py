"""Hashes files, or parts of files, while other threads are still writing them."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from heapq import nlargest
from math import isqrt
from pathlib import Path
from typing import Final, Protocol, no_type_check

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from qtool.formats.llvm import Emitter, constant

# The compiled loop of SHA-256 (FIPS 180-4) for eight streams in lockstep, one a vector lane. Only whole blocks come
# here; how streams begin and end is known to `sha256`.


LANES: Final = 8
BLOCK: Final = 64
_WORDS: Final = ir.VectorType(ir.IntType(32), LANES)
_PRIMES: Final = [p for p in range(2, 312) if all(p % d for d in range(2, p))]


def _cube_root(number: int) -> int:
    root = 1 << -(-number.bit_length() // 3)
    while (better := (2 * root + number // root**2) // 3) < root:
        root = better
    return root


# The first 32 bits of the fractions of the primes' square and cube roots (FIPS 180-4, 4.2.2 and 5.3.3).
INITIAL: Final = np.array([isqrt(p << 64) & 0xFFFFFFFF for p in _PRIMES[:8]], np.uint32)
_ROUND: Final = [_cube_root(p << 96) & 0xFFFFFFFF for p in _PRIMES]


@numba.njit(nogil=True, cache=True, boundscheck=False)
@no_type_check
def compress(state, data):
    """Put the words `data` [LANES, n] into the state [8, LANES]."""
    for first in range(0, data.shape[1], BLOCK // 4):
        _compress_block(state, data, first, data.shape[1])


@intrinsic
@no_type_check
def _compress_block(_typing, state, data, first, stride):
    """Put the words `data[:, first : first + 16]` into the state [8, LANES] (FIPS 180-4, 6.2.2, with its letters)."""

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder)
        state_at, data_at = (emit.pointer(signature.args[i], arguments[i]) for i in (0, 1))
        rows = [ir.IntType(64)(row * LANES) for row in range(8)]
        before = [emit.load(_WORDS, state_at, row) for row in rows]
        schedule = _message(emit, data_at, arguments[2], arguments[3])
        for row, old, new in zip(rows, before, _rounds(emit, schedule, before), strict=True):
            emit.store(builder.add(old, new), state_at, row)
        return context.get_dummy_value()

    return types.void(state, data, first, stride), generate


@no_type_check
def _message(emit, data_at, first, stride):
    """The 16 words of a block, each for all lanes."""
    builder = emit.builder
    words = []
    for half in (0, LANES):
        start = builder.add(first, first.type(half))
        lanes = [builder.add(start, builder.mul(stride, stride.type(lane))) for lane in range(LANES)]
        rows = [emit.load(_WORDS, data_at, index) for index in lanes]
        words += [emit.call(f"llvm.bswap.v{LANES}i32", _WORDS, word) for word in _transposed(builder, rows)]
    return words


@no_type_check
def _transposed(builder, rows):
    """Lane by lane becomes word by word: shuffle the upper half of the rows into the lower one, three times."""
    low = [lane // 2 + lane % 2 * LANES for lane in range(LANES)]
    masks = [ir.Constant(_WORDS, [lane + half for lane in low]) for half in (0, LANES // 2)]
    for _ in range(LANES.bit_length() - 1):
        pairs = zip(rows[: LANES // 2], rows[LANES // 2 :], strict=True)
        rows = [builder.shuffle_vector(upper, lower, mask) for upper, lower in pairs for mask in masks]
    return rows


@no_type_check
def _rounds(emit, schedule, before):
    builder = emit.builder
    a, b, c, d, e, f, g, h = before
    for t in range(64):
        word = schedule[t] if t < 16 else _next_word(emit, schedule)
        choice = builder.xor(g, builder.and_(e, builder.xor(f, g)))
        majority = builder.or_(builder.and_(a, b), builder.and_(c, builder.or_(a, b)))
        early = _sum(builder, h, word, constant(_WORDS, _ROUND[t]))  # what the round before does not hold up
        t1 = _sum(builder, early, choice, _rotated(emit, e, 6, 11, 25))
        t2 = builder.add(_rotated(emit, a, 2, 13, 22), majority)
        a, b, c, d, e, f, g, h = builder.add(t1, t2), a, b, c, builder.add(d, t1), e, f, g
    return a, b, c, d, e, f, g, h


@no_type_check
def _next_word(emit, schedule):
    builder = emit.builder
    early, late = schedule[-15], schedule[-2]
    sigma0 = builder.xor(_rotated(emit, early, 7, 18), builder.lshr(early, constant(_WORDS, 3)))
    sigma1 = builder.xor(_rotated(emit, late, 17, 19), builder.lshr(late, constant(_WORDS, 10)))
    schedule.append(_sum(builder, schedule[-16], sigma0, schedule[-7], sigma1))
    return schedule[-1]


@no_type_check
def _sum(builder, first, *others):
    for other in others:
        first = builder.add(first, other)
    return first


@no_type_check
def _rotated(emit, word, *counts):
    """The exclusive or of `word` rotated right by each of `counts`."""
    name = f"llvm.fshr.v{LANES}i32"
    first, *others = (emit.call(name, _WORDS, word, word, constant(_WORDS, count)) for count in counts)
    for other in others:
        first = emit.builder.xor(first, other)
    return first


# SHA-256 (FIPS 180-4) of several streams side by side, one a vector lane. The same digests as hashlib, which stays in
# charge where the processor has SHA instructions. Without those, one stream keeps a core busy at some 250 MB/s, and
# eight streams in lockstep cost no more time than one.


class Digests(Protocol):
    """The SHA-256 of several streams, fed in whole blocks."""

    def update(self, streams: Sequence[int], data: NDArray[np.uint8]) -> None:
        """Hash on: `data` [LANES, n] holds the next n bytes (whole blocks) of each of up to LANES `streams`."""

    def finish(self, stream: int, tail: bytes, nbytes: int) -> str:
        """The digest in hex of a stream of `nbytes` in all, of which `tail` (less than a block) is still to come."""


def digests(count: int) -> Digests:
    """The faster kind for this processor."""
    features = binding.get_host_cpu_features()
    return HashlibDigests(count) if features.get("sha") or features.get("sha2") else LaneDigests(count)


class HashlibDigests:
    """One stream after the other."""

    def __init__(self, count: int) -> None:
        self._hashes = [hashlib.sha256() for _ in range(count)]

    def update(self, streams: Sequence[int], data: NDArray[np.uint8]) -> None:
        """See `Digests`."""
        for stream, row in zip(streams, data, strict=False):
            self._hashes[stream].update(row)

    def finish(self, stream: int, tail: bytes, nbytes: int) -> str:  # noqa: ARG002 - hashlib has counted
        """See `Digests`."""
        self._hashes[stream].update(tail)
        return self._hashes[stream].hexdigest()


class LaneDigests:
    """All at once."""

    def __init__(self, count: int) -> None:
        self._states = np.repeat(INITIAL[:, None], count, axis=1)

    def update(self, streams: Sequence[int], data: NDArray[np.uint8]) -> None:
        """See `Digests`."""
        lanes = np.resize(streams, LANES)  # idle ones repeat a stream, to no effect
        state = np.ascontiguousarray(self._states[:, lanes])
        compress(state, data.view(np.uint32))
        self._states[:, streams] = state[:, : len(streams)]

    def finish(self, stream: int, tail: bytes, nbytes: int) -> str:
        """See `Digests`."""
        padded = tail + b"\x80" + bytes(-(len(tail) + 9) % BLOCK) + (8 * nbytes).to_bytes(8, "big")
        self.update([stream], np.tile(np.frombuffer(padded, np.uint8), (LANES, 1)))
        return self._states[:, stream].astype(">u4").tobytes().hex()


# Hashes files, or parts of files, while other threads are still writing them. Bytes are hashed in order, and only
# once everything before them has been written.


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
