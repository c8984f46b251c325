"""The unit of streaming work: a few megabytes of one tensor, read and checked.

Rule: no weight goes further than here unless it is finite, and no group unless it has a scale that works.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from qtool.checkpoint.reader import Checkpoint, iter_chunks
from qtool.errors import ModelError
from qtool.formats.floats import FLOAT_FORMATS, Bits, FloatFormat
from qtool.formats.nvfp4 import U8, global_scale, is_usable_scale
from qtool.formats.nvfp4_kernels import largest_magnitude
from qtool.progress import Advance
from qtool.quantization.plan import Action, PlannedTensor, QuantizationPlan

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
