"""The floating-point element types of safetensors files, as raw bits and as exact float32 values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.unsignedinteger]
Float32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


@dataclass(frozen=True)
class FloatFormat:
    """One IEEE-like type: its safetensors name, its width in bytes and the bits of +infinity."""

    name: str
    itemsize: int
    infinity_bits: int

    @property
    def bits_dtype(self) -> np.dtype[np.unsignedinteger]:
        """The unsigned integer type that holds the raw bits."""
        return np.dtype(f"u{self.itemsize}")

    @property
    def magnitude_mask(self) -> int:
        """The bits without the sign. Magnitudes order as their unsigned integers do."""
        return (1 << (8 * self.itemsize - 1)) - 1

    def widen(self, bits: Bits) -> Float32:
        """The exact float32 values of `bits`."""
        if self.name == "BF16":
            return (bits.astype(np.uint32) << 16).view(np.float32)
        if self.name == "F16":
            return bits.view(np.float16).astype(np.float32)
        return bits.view(np.float32)

    def count_nonfinite(self, bits: Bits) -> int:
        """How many of `bits` are NaN or infinite."""
        return int(np.count_nonzero((bits & self.magnitude_mask) >= self.infinity_bits))


FLOAT_FORMATS: Final = {
    element.name: element
    for element in (
        FloatFormat("BF16", 2, 0x7F80),
        FloatFormat("F16", 2, 0x7C00),
        FloatFormat("F32", 4, 0x7F80_0000),
    )
}
