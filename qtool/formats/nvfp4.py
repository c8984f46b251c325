"""NVFP4: blocks of 16 values, each a 4-bit E2M1 code under an E4M3 block scale and one float32 global scale.

Every rounding is NVIDIA ModelOpt's (0.47, `NVFP4QTensor`), so that our bytes equal its bytes. ModelOpt divides each
weight by its scale in float32; the quotient grows with the weight, so each code begins at one exact bit pattern. These
patterns are found once for each of the 126 block scales, so that the kernels only compare integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np

from qtool.formats.floats import (
    E4M3_MAX,
    E4M3_MIN,
    E4M3_VALUES,
    FLOAT_FORMATS,
    U8,
    Bits,
    Float32,
    FloatFormat,
    encode_e4m3,
)

BLOCK: Final = 16
E2M1_MAX: Final = np.float32(6)

E2M1_VALUES: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
"""Value of each 4-bit code; bit 3 is the sign."""

# Midpoints between neighbouring magnitudes; as in ModelOpt, a tie goes to the even code.
_E2M1_MIDPOINTS: Final = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], dtype=np.float32)
_TIE_GOES_UP: Final = np.array([False, True, False, True, False, True, False])


Algorithm = Literal["max", "mse", "four-over-six"]
"""How block scales are chosen: from the block's largest magnitude, or searched (see `nvfp4_search`)."""

FOUR_OVER_SIX_MAX: Final = np.float32(256)
"""The largest block scale of four-over-six: below 448, so that each can be made one and a half times as large."""


def largest_block_scale(algorithm: Algorithm) -> np.float32:
    """The block scale of the block with the group's largest magnitude."""
    return FOUR_OVER_SIX_MAX if algorithm == "four-over-six" else E4M3_MAX


def global_scale(amax: np.float32, largest_block_scale: np.float32 = E4M3_MAX) -> np.float32:
    """`weight_scale_2` of a fused group whose largest magnitude is `amax`."""
    return np.float32(amax / np.float32(E2M1_MAX * largest_block_scale))


def is_usable_scale(scale: np.float32) -> bool:
    """Whether every block scale times `scale` stays above zero; ModelOpt writes NaN scales where it does not."""
    return bool(E4M3_MIN * scale > 0) and bool(np.isfinite(scale))


def block_scale_codes(block_amax: Float32, scale: np.float32) -> U8:
    """E4M3 code of the scale of blocks with these largest magnitudes, under the global scale `scale`."""
    with np.errstate(over="ignore"):  # the table contains maxima that no block of the group has
        ratio = block_amax / np.float32(E2M1_MAX * scale)
    ratio[ratio == 0] = 1
    return encode_e4m3(np.clip(ratio, E4M3_MIN, E4M3_MAX))


@dataclass(frozen=True)
class EncodeTables:
    """What the kernels look up to encode one fused group.

    `element`: the type of the weights, BF16 or F32 (F16 is widened first).
    `thresholds` [127, 8, 16]: for each block-scale code, the magnitude bits at which codes 1..7 begin, then those from
    which a negative weight keeps its sign (below, the quotient underflows to zero and ModelOpt drops the sign);
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
    """The smallest magnitude whose quotient exceeds each bound, bisected for all block scales and bounds at once."""
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


NEAREST_FROM: Final = np.array([0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32) * np.float32(1 - 1e-5)
NEAREST_TO: Final = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, np.inf], np.float32) * np.float32(1 + 1e-5)
"""The quotients whose nearest magnitude is each one. The largest has no end: its block scale is checked instead."""

# The specification of `nvfp4_kernels`, which tests compare with it bit for bit.


def unpack(packed: U8) -> U8:
    """The 4-bit codes [n/16, 16] of `packed` [n/2]; the even element is in the low nibble."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1, BLOCK)


def largest_magnitude_reference(bits: Bits, element: FloatFormat) -> int:
    """The largest magnitude in `bits`, as bits; at least `element.infinity_bits` if any is NaN or infinite."""
    return int((bits & element.magnitude_mask).max(initial=0))


def encode_reference(weights: Float32, scale: np.float32) -> tuple[U8, U8]:
    """(packed [n/2], block scales [n/16]) of `weights` [n] under the global scale `scale`."""
    blocks = weights.reshape(-1, BLOCK)
    scales = block_scale_codes(np.abs(blocks).max(axis=1), scale)
    quotients = blocks / (E4M3_VALUES[scales] * scale)[:, None]
    codes = np.searchsorted(_E2M1_MIDPOINTS, np.abs(quotients))
    is_tie = np.abs(quotients) == np.append(_E2M1_MIDPOINTS, np.nan)[codes]
    codes += is_tie & (codes % 2 == 1)  # to the even code
    signed: U8 = (codes | np.where(quotients < 0, 8, 0)).astype(np.uint8)
    return (signed[:, ::2] | signed[:, 1::2] << np.uint8(4)).reshape(-1), scales


def dequantize_reference(packed: U8, block_scales: U8, scale: np.float32) -> Float32:
    """The float32 weights [n/16, 16] of `packed` [n/2]; as in ModelOpt, the two scales are multiplied first."""
    return E2M1_VALUES[unpack(packed)] * (E4M3_VALUES[block_scales] * scale)[:, None]


def squared_sums_reference(weights: Float32, restored: Float32, blocks_summed: int) -> tuple[float, float]:
    """The sums of (weight - restored)² and weight² over blocks [n/16, 16].

    Each of the 16 columns is summed in float32 over runs of `blocks_summed` blocks, then over the columns; the runs are
    summed in float64.
    """
    error = power = 0.0
    for start in range(0, len(weights), blocks_summed):
        run = weights[start : start + blocks_summed]
        difference = run - restored[start : start + blocks_summed]
        error += float(
            np.cumsum(np.cumsum(difference * difference, axis=0)[-1])[-1]
        )  # cumsum adds in order, sum does not
        power += float(np.cumsum(np.cumsum(run * run, axis=0)[-1])[-1])
    return error, power


class BlockCounts(NamedTuple):
    """Of a run of blocks: those with a code or a scale that no rounding to nearest gives, such codes, and searched scales."""

    blocks: int
    codes: int
    searched: int


SEARCHED_FROM: Final = np.float32(2.9)
SEARCHED_TO: Final = np.float32(96)
"""What a block's largest value may be in units of its scale, where a search chose it.

ModelOpt's max scale gives 6 and four-over-six 4 or 6. A search for the least error gave 3.5 to 7.2 on normal and
heavy-tailed blocks, and up to 68 where importances over four decades weigh the errors.
"""


def judge_blocks_reference(values: Float32, packed: U8, block_scales: U8, scale: np.float32) -> BlockCounts:
    """How the blocks of `values` [n] were rounded to `packed` [n/2] and `block_scales` [n/16] under `scale`.

    A scale within one E4M3 step of the largest value's is right; another one is searched if it lies in the range above.
    Under any scale each code must be a nearest one; ties, and the last bit of a division, may go either way, so that every
    correct quantizer is accepted.
    """
    blocks, codes = values.reshape(-1, BLOCK), unpack(packed)
    maxima, magnitudes = np.abs(blocks).max(axis=1), codes & 7
    if not (np.isfinite(scale) and scale > 0):
        return BlockCounts(len(blocks), values.size, 0)
    ideal = block_scale_codes(maxima, scale)
    is_near = np.abs(block_scales.astype(int) - ideal) <= 1
    with np.errstate(divide="ignore", invalid="ignore"):  # block scale 0
        factors = E4M3_VALUES[block_scales] * scale
        quotients = np.abs(blocks) / factors[:, None]
        is_searched = ~is_near & (maxima / factors >= SEARCHED_FROM) & (maxima / factors <= SEARCHED_TO)
    is_nearest = (NEAREST_FROM[magnitudes] <= quotients) & (quotients <= NEAREST_TO[magnitudes])
    is_sign_right = (magnitudes == 0) | ((blocks < 0) == (codes > 7))
    wrong = ~(is_nearest & is_sign_right)
    wrong[(block_scales == 0) & is_near] = False  # so small that every code stands for zero
    wrong[(block_scales > 126) | ~(is_near | is_searched)] = True
    empty = maxima == 0
    wrong[empty] = magnitudes[empty] != 0
    bad = wrong.any(axis=1)
    counted = is_searched & (block_scales <= 126) & ~empty & ~bad
    return BlockCounts(int(bad.sum()), int(wrong.sum()), int(counted.sum()))
