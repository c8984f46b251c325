"""Where the bytes of a GGUF tensor come from: a checkpoint, or another GGUF file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from qtool.errors import ModelError
from qtool.formats.floats import FLOAT_FORMATS, U8, FloatFormat
from qtool.formats.ggml import F16, GgmlType
from qtool.formats.ggml_kernels import F16_MAX, encode_run, repack_nvfp4
from qtool.formats.nvfp4_kernels import largest_magnitude
from qtool.storage.checkpoint import Checkpoint, TensorInfo, iter_chunks
from qtool.storage.gguf import GgufTensor
from qtool.storage.packed import PackedWeight

# Where the bytes of a GGUF tensor come from. A source yields its bytes in pieces of a few megabytes, each with its
# place in the output, and checks what it reads.


_PIECE: Final = 2 << 20
"""Source bytes per piece: small enough to stay in the processor's caches."""

Piece = tuple[int, int, Callable[[], U8]]
"""Where in the output it goes, how many source bytes it reads, and what makes its bytes."""


class TensorSource(Protocol):
    """The origin of one output tensor; `work_bytes` is how much its pieces say that they read."""

    @property
    def work_bytes(self) -> int:
        """Source bytes, those of tiny tensors left out."""

    def pieces(self, target: GgmlType) -> Iterator[Piece]:
        """The tensor's bytes as `target`, in order."""


def element_of(info: TensorInfo) -> FloatFormat:
    """The float type of a source tensor; ModelError when it has none."""
    if info.dtype not in FLOAT_FORMATS:
        raise ModelError(f"{info.hf_name} is {info.dtype}; qtool converts {', '.join(FLOAT_FORMATS)}.")
    return FLOAT_FORMATS[info.dtype]


def encode_checked(stored: U8, info: TensorInfo, target: GgmlType) -> U8:
    """Bytes of `info` as `target`, or a ModelError if a weight is not finite or too large for it."""
    element = element_of(info)
    bits = stored.view(element.bits_dtype)
    largest = largest_magnitude(bits, element)
    if largest >= element.infinity_bits:
        raise ModelError(f"{info.hf_name} holds NaN or infinite weights.", "The checkpoint is broken; fetch it again.")
    if target is F16 and element.widen(np.array([largest], element.bits_dtype))[0] > F16_MAX:
        raise ModelError(
            f"{info.hf_name} holds weights beyond {F16_MAX:,.0f}, the largest of F16.", "Use --outtype bf16."
        )
    return encode_run(bits, element, target)


@dataclass(frozen=True)
class Whole:
    """A tensor as it is."""

    checkpoint: Checkpoint
    info: TensorInfo

    @property
    def work_bytes(self) -> int:
        """See TensorSource."""
        return self.info.nbytes

    def pieces(self, target: GgmlType) -> Iterator[Piece]:
        """See TensorSource."""
        width = element_of(self.info).itemsize
        for start, length in iter_chunks(self.info.nbytes, _PIECE):
            yield target.nbytes(start // width), length, partial(self._encode, target, start, length)

    def _encode(self, target: GgmlType, start: int, length: int) -> U8:
        buffer = np.empty(length, np.uint8)
        self.checkpoint.read_into(self.info, start, buffer)
        return encode_checked(buffer, self.info, target)


class Small(ABC):
    """A tensor that is made in one go, too small to count as work."""

    @property
    def work_bytes(self) -> int:
        """See TensorSource."""
        return 0

    def pieces(self, target: GgmlType) -> Iterator[Piece]:
        """See TensorSource."""
        yield 0, 0, partial(self.encode, target)

    @abstractmethod
    def encode(self, target: GgmlType) -> U8:
        """All of its bytes."""


@dataclass(frozen=True)
class Rows(Small):
    """Some rows of a matrix: the answers' rows of a head."""

    checkpoint: Checkpoint
    info: TensorInfo
    rows: tuple[int, ...]

    def encode(self, target: GgmlType) -> U8:
        """See Small."""
        width = self.info.nbytes // self.info.shape[0]
        buffer = np.empty((len(self.rows), width), np.uint8)
        for row, into in zip(self.rows, buffer, strict=True):
            self.checkpoint.read_into(self.info, row * width, into)
        return encode_checked(buffer.reshape(-1), self.info, target)


@dataclass(frozen=True)
class Frame(Small):
    """One of the frames of a convolution over time [out, in, frames, height, width]."""

    checkpoint: Checkpoint
    info: TensorInfo
    frame: int

    def encode(self, target: GgmlType) -> U8:
        """See Small."""
        weights = self.checkpoint.read(self.info.hf_name).view(element_of(self.info).bits_dtype)
        return encode_checked(weights[:, :, self.frame].reshape(-1).view(np.uint8), self.info, target)


@dataclass(frozen=True)
class GlobalScale(Small):
    """The global scale of a packed NVFP4 weight, as llama.cpp multiplies it in."""

    checkpoint: Checkpoint
    weight: PackedWeight

    def encode(self, target: GgmlType) -> U8:  # noqa: ARG002 - always F32
        """See Small."""
        return self.checkpoint.read(self.weight.global_scale.hf_name).reshape(1).view(np.uint8)


@dataclass(frozen=True)
class Repacked:
    """A packed NVFP4 weight: the same codes and block scales in ggml's order."""

    checkpoint: Checkpoint
    weight: PackedWeight

    @property
    def work_bytes(self) -> int:
        """See TensorSource."""
        return self.weight.packed.nbytes

    def pieces(self, target: GgmlType) -> Iterator[Piece]:
        """See TensorSource."""
        for start, length in iter_chunks(self.weight.packed.nbytes, _PIECE):
            yield target.nbytes(2 * start), length, partial(self._repack, start, length)

    def _repack(self, start: int, length: int) -> U8:
        packed, scales = np.empty(length, np.uint8), np.empty(length // 8, np.uint8)
        self.checkpoint.read_into(self.weight.packed, start, packed)
        self.checkpoint.read_into(self.weight.block_scales, start // 8, scales)
        return repack_nvfp4(packed, scales)


# Tensors that lie in a GGUF file already, as sources of another. Bytes are copied; only rows of a quantized matrix
# are decoded, and then to float32.


_COPY_CHUNK: Final = 4 << 20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a GGUF file, byte for byte."""

    path: Path
    tensor: GgufTensor

    @property
    def work_bytes(self) -> int:
        """See TensorSource."""
        return self.tensor.nbytes

    def pieces(self, target: GgmlType) -> Iterator[Piece]:  # noqa: ARG002 - its own
        """See TensorSource."""
        for start, length in iter_chunks(self.tensor.nbytes, _COPY_CHUNK):
            yield start, length, partial(self._read, start, length)

    def _read(self, start: int, length: int) -> U8:
        return np.fromfile(self.path, np.uint8, length, offset=self.tensor.offset + start)


@dataclass(frozen=True)
class StoredRows(Small):
    """Some rows of a matrix in a GGUF file: as they are, or dequantized to float32."""

    path: Path
    tensor: GgufTensor
    rows: tuple[int, ...]

    def encode(self, target: GgmlType) -> U8:
        """See Small."""
        width = self.tensor.nbytes // self.tensor.shape[0]
        stored = [np.fromfile(self.path, np.uint8, width, offset=self.tensor.offset + row * width) for row in self.rows]
        data = np.stack(stored)
        if self.tensor.type is target:
            return data.reshape(-1)
        weights = dequantize(data, GGMLQuantizationType(self.tensor.type.number))
        return np.ascontiguousarray(weights, np.float32).reshape(-1).view(np.uint8)
