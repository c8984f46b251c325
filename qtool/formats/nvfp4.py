"""NVFP4: blocks of 16 values, each a 4-bit E2M1 code under an E4M3 block scale and one float32 global scale.

Rule: every rounding is NVIDIA ModelOpt's (0.47, `NVFP4QTensor`), so that our bytes equal its bytes. ModelOpt divides
each weight by its scale in float32; that quotient grows with the weight, so each code begins at one exact bit pattern.
We find those patterns once for each of the 126 block scales and the kernels then only compare integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qtool.formats.floats import FLOAT_FORMATS, Bits, Float32, FloatFormat

BLOCK: Final = 16
E2M1_MAX: Final = np.float32(6)
E4M3_MAX: Final = np.float32(448)
E4M3_MIN: Final = np.float32(2.0**-9)
E4M3_ONE: Final = 0x38

U8 = NDArray[np.uint8]

E2M1_VALUES: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
"""Value of each 4-bit code; bit 3 is the sign."""

# Midpoints between neighbouring magnitudes; ModelOpt sends ties at the odd entries up and at the even ones down.
_E2M1_MIDPOINTS: Final = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], dtype=np.float32)
_TIE_GOES_UP: Final = np.array([False, True, False, True, False, True, False])


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


def global_scale(amax: np.float32) -> np.float32:
    """`weight_scale_2` of a fused group whose largest magnitude is `amax`."""
    return np.float32(amax / np.float32(E2M1_MAX * E4M3_MAX))


def is_usable_scale(scale: np.float32) -> bool:
    """Whether every block scale times `scale` stays above zero; ModelOpt writes NaN scales where it does not."""
    return bool(E4M3_MIN * scale > 0) and bool(np.isfinite(scale))


def block_scale_codes(block_amax: Float32, scale: np.float32) -> U8:
    """E4M3 code of the scale of blocks with these largest magnitudes, under the global scale `scale`."""
    with np.errstate(over="ignore"):  # maxima that no block of this group has
        ratio = block_amax / np.float32(E2M1_MAX * scale)
    ratio[ratio == 0] = 1
    return encode_e4m3(np.clip(ratio, E4M3_MIN, E4M3_MAX))


@dataclass(frozen=True)
class EncodeTables:
    """What the kernels look up to encode one fused group.

    `element`: the type that they read, BF16 or F32 (F16 is widened first).
    `thresholds` [127, 8, 16]: for each block-scale code, the magnitude bits at which codes 1..7 begin, then those at
    which a negative weight starts to show its sign (below, the quotient underflows to zero and ModelOpt drops it);
    each repeated for the 16 weights of a block.
    `scale_codes` [infinity_bits]: block-scale code for each possible block maximum; empty for F32.
    """

    element: FloatFormat
    scale: np.float32
    thresholds: Bits
    scale_codes: U8


def encode_tables(scale: np.float32, stored: FloatFormat) -> EncodeTables:
    """The tables for the global scale `scale` and weights stored as `stored`."""
    element = FLOAT_FORMATS["BF16" if stored.name == "BF16" else "F32"]
    codes = np.empty(0, np.uint8)
    if element.itemsize == 2:  # 32,640 possible maxima at most: cheaper to tabulate than to compute per block
        magnitudes = np.arange(element.infinity_bits, dtype=element.bits_dtype)
        codes = block_scale_codes(element.widen(magnitudes), scale)
    thresholds = np.repeat(_thresholds(scale, element)[:, :, None], BLOCK, axis=2)
    return EncodeTables(element, scale, thresholds, codes)


def _thresholds(scale: np.float32, element: FloatFormat) -> Bits:
    """Bisect, for every block scale and bound at once, the smallest magnitude whose quotient passes the bound."""
    divisor = (E4M3_VALUES[:0x7F] * scale)[:, None]
    bounds = np.append(_E2M1_MIDPOINTS, np.float32(0))
    tie_passes = np.append(_TIE_GOES_UP, False)
    low = np.zeros((divisor.size, bounds.size), dtype=np.int64)  # the answer lies in low..high
    high = np.full_like(low, element.infinity_bits)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # row 0: no block has scale 0
        while (low < high).any():
            middle = (low + high) // 2
            quotient = element.widen(middle.astype(element.bits_dtype)) / divisor
            passes = (quotient > bounds) | ((quotient == bounds) & tie_passes)
            low, high = np.where(passes, low, middle + 1), np.where(passes, middle, high)
            low = np.minimum(low, high)
    return low.astype(element.bits_dtype)
