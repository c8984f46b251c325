"""The element types of ggml, and the bytes of those that qtool writes, in NumPy: what `ggml_kernels` computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qtool.formats.floats import U8, Float32


@dataclass(frozen=True)
class GgmlType:
    """One element type: `block` values in `block_bytes` bytes."""

    number: int
    name: str
    block: int
    block_bytes: int

    def nbytes(self, elements: int) -> int:
        """Bytes of `elements` values."""
        return elements // self.block * self.block_bytes


GGML_TYPES: Final[Mapping[int, GgmlType]] = {
    int(number): GgmlType(int(number), number.name, *sizes) for number, sizes in GGML_QUANT_SIZES.items()
}
"""Every known type by its number."""

F32: Final = GGML_TYPES[GGMLQuantizationType.F32]
F16: Final = GGML_TYPES[GGMLQuantizationType.F16]
BF16: Final = GGML_TYPES[GGMLQuantizationType.BF16]
Q8_0: Final = GGML_TYPES[GGMLQuantizationType.Q8_0]
NVFP4: Final = GGML_TYPES[GGMLQuantizationType.NVFP4]
FLOAT_TYPES: Final = (F32, F16, BF16)
"""The types that store each value by itself."""

# The specification of `ggml_kernels`, which tests compare with it bit for bit.


def encode_reference(values: Float32, target: GgmlType) -> U8:
    """The bytes of the run `values` [n] in F32, F16, BF16 (both rounded to nearest even) or Q8_0."""
    if target is F32:
        return values.view(np.uint8)
    if target is F16:
        return values.astype(np.float16).view(np.uint8)
    if target is BF16:
        bits = values.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(np.uint8)
    blocks = values.reshape(-1, Q8_0.block)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    quotients = blocks * np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    magnitudes = np.floor(np.abs(quotients))
    magnitudes += np.abs(quotients) - magnitudes >= np.float32(0.5)  # halves away from zero
    codes = np.copysign(magnitudes, quotients).astype(np.int8)
    return np.hstack([scales.astype(np.float16).view(np.uint8), codes.view(np.uint8)]).reshape(-1)


def repack_nvfp4_reference(packed: U8, block_scales: U8) -> U8:
    """ModelOpt's `packed` [rows, columns/2] and E4M3 `block_scales` [rows, columns/16] in ggml's blocks of 64.

    A block is four scales without their sign bit, then four groups of 8 bytes in which byte j holds element j in its
    low nibble and element j + 8 in its high one. Source: llama.cpp `ggml-common.h`, `block_nvfp4`.
    """
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1, 4, 16)
    groups = codes[..., :8] | codes[..., 8:] << 4
    return np.hstack([block_scales.reshape(-1, 4) & 0x7F, groups.reshape(-1, 32)]).reshape(-1)
