"""Tensors read from a checkpoint: the check that every weight passes, and the plain copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from qtool.errors import ModelError
from qtool.export.engine import Encoded, TensorChunk, TensorSource, chunk_ranges
from qtool.formats.floats import FLOAT_FORMATS, Bits, FloatFormat
from qtool.formats.nvfp4_kernels import largest_magnitude
from qtool.storage.checkpoint import Checkpoint, TensorInfo


def float_format_of(info: TensorInfo) -> FloatFormat:
    """The float type of a source tensor; ModelError when it has none."""
    if info.dtype not in FLOAT_FORMATS:
        raise ModelError(f"{info.hf_name} has the type {info.dtype}; expected {', '.join(FLOAT_FORMATS)}.")
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


@dataclass(frozen=True)
class CopiedTensor(TensorSource):
    """A tensor whose bytes stay, under the name `output`."""

    checkpoint: Checkpoint
    info: TensorInfo
    output: str

    @property
    @override
    def work_bytes(self) -> int:
        return self.info.nbytes

    @override
    def chunks(self) -> Iterator[TensorChunk]:
        for start, nbytes in chunk_ranges(self.info.nbytes):
            yield TensorChunk(nbytes, partial(self._copy, start, nbytes))

    def _copy(self, start: int, nbytes: int) -> Sequence[Encoded]:
        bits = read_bits(self.checkpoint, self.info, start, nbytes)
        checked_largest(self.checkpoint, self.info, bits)
        return (Encoded(self.output, start, bits.view(np.uint8)),)
