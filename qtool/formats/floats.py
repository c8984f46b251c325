"""The floating-point types of safetensors files, as raw bits and as exact float32 values; rounding to E4M3."""

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

E4M3_MAX: Final = np.float32(448)
E4M3_MIN: Final = np.float32(2.0**-9)


def _e4m3_values() -> Float32:
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    magnitude = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    magnitude[[0x7F, 0xFF]] = np.nan
    return np.where(codes >= 128, -magnitude, magnitude).astype(np.float32)


E4M3_VALUES: Final = _e4m3_values()
"""Value of each 8-bit E4M3 code (the `fn` variant: no infinities, 0x7F and 0xFF are NaN)."""

_E4M3_MIDPOINTS: Final = (E4M3_VALUES[:0x7E].astype(np.float64) + E4M3_VALUES[1:0x7F]) / 2


def encode_e4m3(values: Float32) -> U8:
    """E4M3 codes of `values` in 0..448, rounded to nearest, ties to even."""
    code = np.searchsorted(_E4M3_MIDPOINTS, values, side="left")
    is_tie = _E4M3_MIDPOINTS[np.minimum(code, len(_E4M3_MIDPOINTS) - 1)] == values
    rounded: U8 = (code + (is_tie & (code % 2 == 1))).astype(np.uint8)
    return rounded
