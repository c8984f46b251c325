"""SHA-256 (FIPS 180-4) of several streams side by side, one a vector lane.

Rule: the same digests as hashlib, which stays in charge where the processor has SHA instructions. Without those, one
stream keeps a core busy at some 250 MB/s, and eight streams in lockstep cost no more time than one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from llvmlite import binding
from numpy.typing import NDArray

from qtool.checkpoint.sha256_lanes import BLOCK, INITIAL, LANES, compress


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
