"""Our own engine: from safetensors to safetensors, a few megabytes at a time, without a model in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from qtool.errors import ModelError
from qtool.export.quantize_plan import Action, PlannedTensor, QuantizationPlan
from qtool.formats.floats import FLOAT_FORMATS, U8, Bits, FloatFormat
from qtool.formats.nvfp4 import BLOCK, EncodeTables, encode_tables, global_scale, is_usable_scale
from qtool.formats.nvfp4_kernels import encode, largest_magnitude
from qtool.progress import Advance
from qtool.storage.checkpoint import Checkpoint, iter_chunks
from qtool.storage.output import WORKERS, worker_pool
from qtool.storage.output_files import OutputFiles, open_shards
from qtool.storage.shards import ShardLayout

# The unit of streaming work: a few megabytes of one tensor, read and checked. No weight goes further than here unless
# it is finite, and no group unless it has a scale that works.


PIECE: Final = 2 << 20
"""Source bytes per piece: large enough that calls cost little, small enough to stay in the processor's caches."""


@dataclass(frozen=True)
class Piece:
    """Bytes `start` to `start + length` of a source tensor."""

    tensor: PlannedTensor
    start: int
    length: int

    @property
    def element(self) -> FloatFormat:
        """The type of the weights."""
        return FLOAT_FORMATS[self.tensor.source.dtype]


def pieces_of(tensor: PlannedTensor) -> Iterator[Piece]:
    """The pieces of a tensor, in order. Each is a whole number of blocks, since PIECE and every quantized row are."""
    for start, length in iter_chunks(tensor.source.nbytes, PIECE):
        yield Piece(tensor, start, length)


def read_piece(checkpoint: Checkpoint, piece: Piece, buffer: U8) -> Bits:
    """Read a piece into `buffer` [PIECE]; its raw bits are a view of it."""
    data = buffer[: piece.length]
    checkpoint.read_into(piece.tensor.source, piece.start, data)
    return data.view(piece.element.bits_dtype)


def checked_largest(checkpoint: Checkpoint, piece: Piece, bits: Bits) -> int:
    """Bits of the largest magnitude of a piece, or a ModelError that counts the tensor's NaN and infinite weights."""
    largest = largest_magnitude(bits, piece.element)
    if largest >= piece.element.infinity_bits:
        name = piece.tensor.source.hf_name
        count = piece.element.count_nonfinite(checkpoint.read(name).view(piece.element.bits_dtype))
        raise ModelError(
            f"{name} holds {count:,} NaN or infinite weights.", "The checkpoint is broken; fetch it again."
        )
    return largest


def usable_scale(group: str, largest: int, element: FloatFormat) -> np.float32:
    """The global scale of a group whose largest magnitude has the bits `largest`; ModelError where there is none."""
    amax = element.widen(np.array([largest], element.bits_dtype))[0]
    scale = global_scale(amax)
    if not is_usable_scale(scale):
        raise ModelError(
            f"{group}: the largest magnitude is {amax:g}, for which ModelOpt writes NaN scales.",
            "Such a layer was never trained or was not saved; qtool does not write it.",
        )
    return scale


def work_bytes(plan: QuantizationPlan) -> int:
    """Source bytes that a run reads: what `advance` adds up to."""
    reads = {Action.QUANTIZE: 2, Action.COPY: 1, Action.DROP: 0}
    return sum(reads[tensor.action] * tensor.source.nbytes for tensor in plan.tensors)


def check_weights(checkpoint: Checkpoint, plan: QuantizationPlan, advance: Advance) -> None:
    """Read every weight and raise the ModelError that streaming would, for backends that do not look."""
    buffer = np.empty(PIECE, np.uint8)
    largest: dict[str, tuple[int, FloatFormat]] = {}
    for tensor in plan.tensors:
        for piece in pieces_of(tensor) if tensor.action is not Action.DROP else ():
            found = checked_largest(checkpoint, piece, read_piece(checkpoint, piece, buffer))
            advance(piece.length)
            if tensor.action is Action.QUANTIZE:
                before = largest.get(tensor.spec.fused_group, (0, piece.element))[0]
                largest[tensor.spec.fused_group] = max(before, found), piece.element
    for group, (bits, element) in largest.items():
        usable_scale(group, bits, element)


# Our own engine: from safetensors to safetensors, a few megabytes at a time, without a model in memory. Memory does
# not grow with the model. Work is cut into pieces; each thread owns one set of buffers and reads, encodes and writes
# one piece at a time. A fused group is read twice: for its largest magnitude, then to encode it.


@dataclass(frozen=True)
class StreamingResult:
    """What was measured on the way: the file hashes, and |w - q| / |w| (Frobenius) of each quantized tensor."""

    sha256: Mapping[str, str]
    relative_errors: Mapping[str, float]


def quantize_streaming(
    checkpoint: Checkpoint, plan: QuantizationPlan, layout: ShardLayout, folder: Path, advance: Advance
) -> StreamingResult:
    """Write the weight files of `layout` into `folder`."""
    with ExitStack() as stack:
        files = stack.enter_context(open_shards(layout.shards, folder))
        pool = stack.enter_context(worker_pool())
        sums = _Engine(checkpoint, plan, layout, files, pool, advance).run()
        return StreamingResult(files.sha256(), {name: _relative(*pair) for name, pair in sums.items()})


def _relative(error: float, power: float) -> float:
    return float(np.sqrt(error / power)) if power else 0.0


class _Buffers(threading.local):
    """Per thread: a piece of source and what becomes of it."""

    def __init__(self) -> None:
        self.source = np.empty(PIECE, np.uint8)
        self.packed = np.empty(PIECE // 4, np.uint8)
        self.block_scales = np.empty(PIECE // 2 // BLOCK, np.uint8)


class _Measurement:
    """The largest magnitude of a fused group, gathered from its pieces; the last of them makes the tables."""

    def __init__(self, group: str, element: FloatFormat, pieces: int) -> None:
        self.tables: Future[EncodeTables] = Future()
        self._group, self._element, self._left = group, element, pieces
        self._largest = 0
        self._lock = threading.Lock()

    def add(self, largest: int) -> bool:
        """Take in one piece; whether it was the last."""
        with self._lock:
            self._largest = max(self._largest, largest)
            self._left -= 1
            return self._left == 0

    def make_tables(self) -> EncodeTables:
        """The encode tables under the group's global scale."""
        return encode_tables(usable_scale(self._group, self._largest, self._element), self._element)


def _fill_order(plan: QuantizationPlan, layout: ShardLayout) -> list[PlannedTensor]:
    """The tensors in such an order that all shards fill evenly from their beginnings, as their hashes need it."""
    progress = {name: start / shard.nbytes for shard in layout.shards for name, start in shard.offsets.items()}
    written = [tensor for tensor in plan.tensors if tensor.action is not Action.DROP]
    return sorted(written, key=lambda tensor: progress[tensor.spec.hf_name])


_Sums = tuple[float, float]


class _Engine:
    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: QuantizationPlan,
        layout: ShardLayout,
        files: OutputFiles,
        pool: ThreadPoolExecutor,
        advance: Advance,
    ) -> None:
        self._checkpoint = checkpoint
        self._ordered = _fill_order(plan, layout)
        self._groups = plan.groups
        self._files = files
        self._pool = pool
        self._advance = advance
        self._buffers = _Buffers()
        self._measurements: dict[str, _Measurement] = {}

    def run(self) -> Mapping[str, _Sums]:
        """Carry the plan out; sums of squared error and of squared weight of each quantized tensor."""
        jobs = list(self._submit_all())
        sums: dict[str, _Sums] = {}
        for tensor, job in jobs:
            error, power = job.result()
            if tensor.action is Action.QUANTIZE:
                before = sums.get(tensor.spec.hf_name, (0.0, 0.0))
                sums[tensor.spec.hf_name] = (before[0] + error, before[1] + power)
        return sums

    def _submit_all(self) -> Iterator[tuple[PlannedTensor, Future[_Sums]]]:
        for index, tensor in enumerate(self._ordered):
            for coming in self._ordered[
                index : index + 1 + WORKERS
            ]:  # measured ahead, so that no encoder waits for long
                self._submit_measurement(coming)
            work = self._encode if tensor.action is Action.QUANTIZE else self._copy
            for piece in pieces_of(tensor):
                yield tensor, self._pool.submit(work, piece)

    def _submit_measurement(self, tensor: PlannedTensor) -> None:
        group = tensor.spec.fused_group
        if tensor.action is not Action.QUANTIZE or group in self._measurements:
            return
        pieces = [piece for member in self._groups[group] for piece in pieces_of(member)]
        measurement = _Measurement(group, pieces[0].element, len(pieces))
        self._measurements[group] = measurement
        for piece in pieces:
            self._pool.submit(self._measure, piece, measurement)

    def _measure(self, piece: Piece, measurement: _Measurement) -> None:
        try:
            if measurement.add(checked_largest(self._checkpoint, piece, self._read(piece))):
                tables = measurement.make_tables()
                self._write_global_scales(piece.tensor.spec.fused_group, tables)
                measurement.tables.set_result(tables)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the encoders that wait for these tables must hear of it
            if not measurement.tables.done():
                measurement.tables.set_exception(error)
        self._advance(piece.length)

    def _write_global_scales(self, group: str, tables: EncodeTables) -> None:
        for tensor in self._groups[group]:
            scale_name = f"{tensor.spec.module}.weight_scale_2"
            self._files.write(scale_name, 0, np.array([tables.scale], "<f4").view(np.uint8))

    def _encode(self, piece: Piece) -> _Sums:
        tables = self._measurements[piece.tensor.spec.fused_group].tables.result()
        bits, buffers = self._read(piece), self._buffers
        packed, scales = buffers.packed[: bits.size // 2], buffers.block_scales[: bits.size // BLOCK]
        sums = encode(bits, tables, packed, scales)
        first = piece.start // piece.element.itemsize
        name, scale_name = piece.tensor.spec.hf_name, f"{piece.tensor.spec.module}.weight_scale"
        self._files.write(name, first // 2, packed)
        self._files.write(scale_name, first // BLOCK, scales)
        self._advance(piece.length)
        return sums

    def _copy(self, piece: Piece) -> _Sums:
        bits = self._read(piece)
        checked_largest(self._checkpoint, piece, bits)
        self._files.write(piece.tensor.spec.hf_name, piece.start, bits.view(np.uint8))
        self._advance(piece.length)
        return 0.0, 0.0

    def _read(self, piece: Piece) -> Bits:
        return read_piece(self._checkpoint, piece, self._buffers.source)
