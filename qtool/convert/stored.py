"""Tensors that lie in a GGUF file already, as sources of another.

Rule: bytes are copied; only rows of a quantized matrix are decoded, and then to float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from qtool.checkpoint.reader import iter_chunks
from qtool.convert.sources import Piece, Small
from qtool.formats.ggml import GgmlType
from qtool.formats.ggml_kernels import U8
from qtool.gguf_file.reader import GgufTensor

_PIECE: Final = 4 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor of a GGUF file, byte for byte."""

    path: Path
    tensor: GgufTensor

    @property
    def work_bytes(self) -> int:
        """See TensorSource."""
        return self.tensor.nbytes

    def pieces(self, target: GgmlType) -> Iterator[Piece]:  # noqa: ARG002 - its own
        """See TensorSource."""
        for start, length in iter_chunks(self.tensor.nbytes, _PIECE):
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
