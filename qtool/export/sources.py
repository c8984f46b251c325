"""Where the bytes of a GGUF tensor come from: a checkpoint, or another GGUF file."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from typing_extensions import override

from qtool.errors import ModelError
from qtool.export.tensor_writer import (
    Encoded,
    TensorChunk,
    TensorSource,
    checked_largest,
    chunk_ranges,
    float_format_of,
    read_bits,
)
from qtool.formats.floats import U8, Bits, Float32
from qtool.formats.ggml import F16, F32, NVFP4, GgmlType
from qtool.formats.ggml_kernels import F16_MAX, encode_run, repack_nvfp4
from qtool.storage.checkpoint import Checkpoint, TensorInfo
from qtool.storage.gguf import GgufTensor
from qtool.storage.gguf_model import GgufModel, decode
from qtool.storage.packed import PackedWeight

# Tensors of a checkpoint. Each source has the name of its output and, as `target`, its type there.


def encode_checked(checkpoint: Checkpoint, info: TensorInfo, bits: Bits, target: GgmlType) -> U8:
    """`bits` of `info` as `target`; ModelError if a weight is not finite or too large for it."""
    element = float_format_of(info)
    largest = checked_largest(checkpoint, info, bits)
    if target is F16 and element.widen(np.array([largest], element.bits_dtype))[0] > F16_MAX:
        raise ModelError(
            f"{info.hf_name} holds weights beyond {F16_MAX:,.0f}, the largest value of F16.", "Use --outtype bf16."
        )
    return encode_run(bits, element, target)


def encode_rows(checkpoint: Checkpoint, info: TensorInfo, rows: Sequence[int], target: GgmlType) -> U8:
    """Some rows of a matrix as `target`."""
    width = info.nbytes // info.shape[0]
    bits = np.concatenate([read_bits(checkpoint, info, row * width, width) for row in rows])
    return encode_checked(checkpoint, info, bits, target)


@dataclass(frozen=True)
class Whole(TensorSource):
    """A tensor as it is."""

    checkpoint: Checkpoint
    info: TensorInfo
    output: str
    target: GgmlType

    @property
    @override
    def work_bytes(self) -> int:
        return self.info.nbytes

    @override
    def chunks(self) -> Iterator[TensorChunk]:
        for start, nbytes in chunk_ranges(self.info.nbytes):
            yield TensorChunk(nbytes, partial(self._encode, start, nbytes))

    def _encode(self, start: int, nbytes: int) -> Sequence[Encoded]:
        bits = read_bits(self.checkpoint, self.info, start, nbytes)
        data = encode_checked(self.checkpoint, self.info, bits, self.target)
        return (Encoded(self.output, self.target.nbytes(start // bits.itemsize), data),)


class _SmallTensor(TensorSource):
    """A tensor that is made in one go, too small to count as work."""

    output: str

    @property
    @override
    def work_bytes(self) -> int:
        return 0

    @override
    def chunks(self) -> Iterator[TensorChunk]:
        yield TensorChunk(0, lambda: (Encoded(self.output, 0, self._encode()),))

    @abstractmethod
    def _encode(self) -> U8:
        """All of its bytes."""


@dataclass(frozen=True)
class Rows(_SmallTensor):
    """Some rows of a matrix: the answers' rows of a head."""

    checkpoint: Checkpoint
    info: TensorInfo
    rows: tuple[int, ...]
    output: str
    target: GgmlType

    @override
    def _encode(self) -> U8:
        return encode_rows(self.checkpoint, self.info, self.rows, self.target)


@dataclass(frozen=True)
class Frame(_SmallTensor):
    """One of the frames of a convolution over time [out, in, frames, height, width]."""

    checkpoint: Checkpoint
    info: TensorInfo
    frame: int
    output: str
    target: GgmlType

    @override
    def _encode(self) -> U8:
        weights = self.checkpoint.read(self.info.hf_name).view(float_format_of(self.info).bits_dtype)
        return encode_checked(self.checkpoint, self.info, weights[:, :, self.frame].reshape(-1), self.target)


@dataclass(frozen=True)
class GlobalScale(_SmallTensor):
    """The global scale of a packed NVFP4 weight as an F32 tensor, which llama.cpp multiplies in."""

    checkpoint: Checkpoint
    weight: PackedWeight
    output: str

    @override
    def _encode(self) -> U8:
        return self.checkpoint.read(self.weight.global_scale.hf_name).reshape(1).view(np.uint8)


@dataclass(frozen=True)
class Repacked(TensorSource):
    """A packed NVFP4 weight: the same codes and block scales in ggml's order."""

    checkpoint: Checkpoint
    weight: PackedWeight
    output: str

    @property
    @override
    def work_bytes(self) -> int:
        return self.weight.packed.nbytes

    @override
    def chunks(self) -> Iterator[TensorChunk]:
        for start, nbytes in chunk_ranges(self.weight.packed.nbytes):
            yield TensorChunk(nbytes, partial(self._repack, start, nbytes))

    def _repack(self, start: int, nbytes: int) -> Sequence[Encoded]:
        packed, block_scales = np.empty(nbytes, np.uint8), np.empty(nbytes // 8, np.uint8)
        self.checkpoint.read_into(self.weight.packed, start, packed)
        self.checkpoint.read_into(self.weight.block_scales, start // 8, block_scales)
        return (Encoded(self.output, NVFP4.nbytes(2 * start), repack_nvfp4(packed, block_scales)),)


def float32_runs(source: TensorSource) -> Iterator[tuple[int, Float32]]:
    """The values of a source whose target is F32, chunk by chunk, each with the place of its first."""
    for chunk in source.chunks():
        for _, start, data in chunk.encode():
            yield start // F32.block_bytes, data.view(np.float32)


# Tensors of another GGUF file. Bytes are copied; only rows of a quantized matrix are decoded, to float32.


@dataclass(frozen=True)
class StoredTensor(TensorSource):
    """A tensor of a GGUF file, byte for byte."""

    model: GgufModel
    tensor: GgufTensor

    @property
    @override
    def work_bytes(self) -> int:
        return self.tensor.nbytes

    @override
    def chunks(self) -> Iterator[TensorChunk]:
        for start, nbytes in chunk_ranges(self.tensor.nbytes):
            yield TensorChunk(nbytes, partial(self._read, start, nbytes))

    def _read(self, start: int, nbytes: int) -> Sequence[Encoded]:
        return (Encoded(self.tensor.gguf_name, start, self.model.read(self.tensor, start, nbytes)),)


@dataclass(frozen=True)
class StoredRows(_SmallTensor):
    """Some rows of a matrix in a GGUF file: as they are, or dequantized to float32."""

    model: GgufModel
    tensor: GgufTensor
    rows: tuple[int, ...]
    output: str
    target: GgmlType

    @override
    def _encode(self) -> U8:
        data = self.model.read_rows(self.tensor, self.rows)
        if self.tensor.type is self.target:
            return data.reshape(-1)
        return np.ascontiguousarray(decode(data, self.tensor.type)).reshape(-1).view(np.uint8)
