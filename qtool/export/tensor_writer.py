"""Writes all artefacts: tensors are read, encoded, written and hashed a few megabytes at a time, on every processor."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Semaphore
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from qtool.errors import ModelError
from qtool.formats.floats import FLOAT_FORMATS, Bits, FloatFormat
from qtool.formats.nvfp4_kernels import largest_magnitude
from qtool.progress import Advance
from qtool.storage.checkpoint import Checkpoint, TensorInfo
from qtool.storage.output_files import FileLayout, OutputFiles, open_files
from qtool.workers import WORKERS, worker_pool

CHUNK_BYTES: Final = 2 << 20
"""Source bytes of a chunk: large enough that calls cost little, small enough to stay in the processor's caches."""

_QUEUED: Final = 8 * WORKERS
"""Chunks in the queue at most, so that neither the queue grows with the model nor a worker waits for its next chunk."""


class Encoded(NamedTuple):
    """Bytes that go to the place `start` of the output tensor `name`."""

    name: str
    start: int
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class TensorChunk:
    """The unit of work: `encode` reads `nbytes` bytes of the source and returns what is to be written."""

    nbytes: int
    encode: Callable[[], Sequence[Encoded]]


def chunk_ranges(nbytes: int) -> Iterator[tuple[int, int]]:
    """(start, nbytes) of the chunks of a source tensor of `nbytes` bytes."""
    for start in range(0, nbytes, CHUNK_BYTES):
        yield start, min(CHUNK_BYTES, nbytes - start)


class TensorSource(Protocol):
    """Where the bytes of one or more output tensors come from."""

    @property
    def work_bytes(self) -> int:
        """The sum of `nbytes` over all its chunks."""

    def measurements(self) -> Iterator[TensorChunk]:
        """Chunks that all must be done before the first of `chunks` is asked for; most sources have none."""
        return iter(())

    def chunks(self) -> Iterator[TensorChunk]:
        """The chunks that encode the tensors, in order."""


def write_tensors(
    layouts: Sequence[FileLayout],
    sources: Sequence[TensorSource],
    folder: Path,
    advance: Advance,
    *,
    hash_tensors: bool = False,
) -> Mapping[str, str]:
    """Write files into `folder`; their SHA-256 by name, or with `hash_tensors` those of each header and tensor."""
    with open_files(layouts, folder, hash_tensors=hash_tensors) as files, worker_pool() as pool:
        slots = Semaphore(_QUEUED)
        jobs: deque[Future[None]] = deque()

        def submit(chunk: TensorChunk) -> Future[None]:
            slots.acquire()
            while jobs and jobs[0].done():
                jobs.popleft().result()
            jobs.append(pool.submit(_run, chunk, files, advance))
            jobs[-1].add_done_callback(lambda _: slots.release())
            return jobs[-1]

        measured: deque[list[Future[None]]] = deque()
        for index, source in enumerate(sources):
            # Some sources ahead are measured before this one is encoded, so that the pool never runs dry.
            while len(measured) <= WORKERS and index + len(measured) < len(sources):
                measured.append([submit(chunk) for chunk in sources[index + len(measured)].measurements()])
            for job in measured.popleft():
                job.result()
            for chunk in source.chunks():
                submit(chunk)
        for job in jobs:
            job.result()
        return files.sha256()


def _run(chunk: TensorChunk, files: OutputFiles, advance: Advance) -> None:
    for name, start, data in chunk.encode():
        files.write(name, start, data)
    advance(chunk.nbytes)


# Weights as sources read them: a chunk at a time, and checked.


def float_format_of(info: TensorInfo) -> FloatFormat:
    """The float type of a source tensor; ModelError when it has none."""
    if info.dtype not in FLOAT_FORMATS:
        raise ModelError(f"{info.hf_name} has the type {info.dtype}; expected one of {', '.join(FLOAT_FORMATS)}.")
    return FLOAT_FORMATS[info.dtype]


def read_bits(checkpoint: Checkpoint, info: TensorInfo, start: int, nbytes: int) -> Bits:
    """Raw bits of `nbytes` bytes of a float tensor from byte `start` on."""
    data = np.empty(nbytes, np.uint8)
    checkpoint.read_into(info, start, data)
    return data.view(float_format_of(info).bits_dtype)


def checked_largest(checkpoint: Checkpoint, info: TensorInfo, bits: Bits) -> int:
    """Bits of the largest magnitude in `bits` of `info`; ModelError, with their number, if any weight is not finite."""
    element = float_format_of(info)
    largest = largest_magnitude(bits, element)
    if largest >= element.infinity_bits:
        weights: NDArray[np.unsignedinteger] = checkpoint.read(info.hf_name).view(element.bits_dtype)
        raise ModelError(
            f"{info.hf_name} holds {element.count_nonfinite(weights):,} NaN or infinite weights.",
            "The checkpoint is broken; download it again.",
        )
    return largest
