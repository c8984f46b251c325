"""The weights of an artefact, tensor by tensor, as float32, from whatever they are stored as.

Rule: any run of whole blocks can be read by itself, so that memory does not grow with the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from qtool.checkpoint.reader import Checkpoint, TensorInfo
from qtool.comparison.weight_formats import misfits
from qtool.formats.floats import FLOAT_FORMATS, Float32
from qtool.formats.nvfp4 import BLOCK, U8
from qtool.formats.nvfp4_check_kernels import misrounded_blocks
from qtool.formats.nvfp4_kernels import dequantize
from qtool.gguf_file.reader import GgufTensor
from qtool.inventory.packed import PackedWeight, read_global_scale


class Stored(Protocol):
    """One tensor of an artefact; `format` names its type and `file` the file that it lies in."""

    @property
    def format(self) -> str:
        """Such as BF16, NVFP4 or Q4_K."""

    @property
    def file(self) -> str:
        """The file's name."""

    def values(self, start: int, count: int) -> Float32:
        """`count` values from `start` on, both multiples of the block."""

    def compare(self, start: int, expected: Float32, source: str) -> tuple[Float32, int]:
        """The values beside `expected`, and how many of them, or blocks, are not what rounding that (a `source`) gives."""


@dataclass(frozen=True)
class Plain:
    """An unquantized tensor of a checkpoint."""

    checkpoint: Checkpoint
    info: TensorInfo

    @property
    def format(self) -> str:
        """See Stored."""
        return self.info.dtype

    @property
    def file(self) -> str:
        """See Stored."""
        return self.info.file.name

    def values(self, start: int, count: int) -> Float32:
        """See Stored."""
        element = FLOAT_FORMATS[self.info.dtype]
        data = np.empty(count * element.itemsize, np.uint8)
        self.checkpoint.read_into(self.info, start * element.itemsize, data)
        return element.widen(data.view(element.bits_dtype))

    def compare(self, start: int, expected: Float32, source: str) -> tuple[Float32, int]:
        """See Stored."""
        found = self.values(start, expected.size)
        return found, misfits(self.format, source, expected, found)


@dataclass(frozen=True)
class Blocks:
    """The codes of a run of NVFP4 blocks: two values a byte, one E4M3 scale a block, and the global scale."""

    packed: U8
    block_scales: U8
    scale: np.float32

    def values(self) -> Float32:
        """The float32 weights."""
        return dequantize(self.packed.reshape(1, -1), self.block_scales, self.scale).reshape(-1)

    def compare(self, expected: Float32) -> tuple[Float32, int]:
        """The weights, and how many blocks are not what rounding `expected` gives."""
        return self.values(), misrounded_blocks(expected, self.packed, self.block_scales, self.scale)


@dataclass(frozen=True)
class Packed:
    """An NVFP4 weight of a checkpoint."""

    checkpoint: Checkpoint
    weight: PackedWeight
    format: str = "NVFP4"

    @property
    def file(self) -> str:
        """See Stored."""
        return self.weight.packed.file.name

    @cached_property
    def _scale(self) -> np.float32:
        return read_global_scale(self.checkpoint, self.weight)

    def blocks(self, start: int, count: int) -> Blocks:
        """The codes of `count` values from `start` on."""
        packed, scales = np.empty(count // 2, np.uint8), np.empty(count // BLOCK, np.uint8)
        self.checkpoint.read_into(self.weight.packed, start // 2, packed)
        self.checkpoint.read_into(self.weight.block_scales, start // BLOCK, scales)
        return Blocks(packed, scales, self._scale)

    def values(self, start: int, count: int) -> Float32:
        """See Stored."""
        return self.blocks(start, count).values()

    def compare(self, start: int, expected: Float32, source: str) -> tuple[Float32, int]:  # noqa: ARG002 - any rounds alike
        """See Stored."""
        return self.blocks(start, expected.size).compare(expected)


@dataclass(frozen=True)
class InGguf:
    """A tensor of a GGUF file; `scale` is what llama.cpp multiplies an NVFP4 product with."""

    path: Path
    tensor: GgufTensor
    scale: np.float32 = np.float32(1)  # noqa: RUF009 - a number like any other

    @property
    def format(self) -> str:
        """See Stored."""
        return self.tensor.type.name

    @property
    def file(self) -> str:
        """See Stored."""
        return self.path.name

    def _bytes(self, start: int, count: int) -> U8:
        kind = self.tensor.type
        return np.fromfile(self.path, np.uint8, kind.nbytes(count), offset=self.tensor.offset + kind.nbytes(start))

    def blocks(self, start: int, count: int) -> Blocks:
        """The codes of `count` NVFP4 values from `start` on, in ModelOpt's order."""
        groups = self._bytes(start, count).reshape(-1, 36)
        halves = groups[:, 4:].reshape(-1, 8)  # byte j holds the elements j and j + 8
        low, high = halves & 15, halves >> 4
        packed = np.concatenate([low[:, ::2] | low[:, 1::2] << 4, high[:, ::2] | high[:, 1::2] << 4], axis=1)
        return Blocks(packed.reshape(-1), np.ascontiguousarray(groups[:, :4]).reshape(-1), self.scale)

    def values(self, start: int, count: int) -> Float32:
        """See Stored. Raises NotImplementedError for a type that the gguf package cannot read."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize as dequantized

        if self.format == "NVFP4":
            return self.blocks(start, count).values()
        data = self._bytes(start, count).reshape(1, -1)
        return np.asarray(dequantized(data, GGMLQuantizationType(self.tensor.type.number)), np.float32).reshape(-1)

    def compare(self, start: int, expected: Float32, source: str) -> tuple[Float32, int]:
        """See Stored."""
        if self.format == "NVFP4":
            return self.blocks(start, expected.size).compare(expected)
        found = self.values(start, expected.size)
        return found, misfits(self.format, source, expected, found)
