"""The compiled inner loops of NVFP4 encoding: integers in, bytes out, no Python objects, no GIL.

Rule: each loop does one thing to one tile, which is what LLVM vectorises (one fused loop ran four times slower).
Blocks of 16 never straddle rows, so a weight is one flat run of blocks and no loop needs its shape.
"""

from __future__ import annotations

from typing import Final, no_type_check

import numba
import numpy as np

from qtool.formats.floats import Bits, FloatFormat
from qtool.formats.nvfp4 import E4M3_VALUES, U8, EncodeTables

TILE: Final = 1 << 14
"""Weights per tile: their bits, codes and values stay together in a core's own cache."""

_compile = numba.njit(nogil=True, cache=True, boundscheck=False)


def largest_magnitude(bits: Bits, element: FloatFormat) -> int:
    """The bits of the largest magnitude in `bits` [n]; at least `element.infinity_bits` if any is NaN or infinite."""
    return int(_largest(bits, bits.dtype.type(element.magnitude_mask)))


def encode(bits: Bits, tables: EncodeTables, packed: U8, block_scales: U8) -> tuple[float, float]:
    """Encode the run `bits` [n] into `packed` [n/2] and `block_scales` [n/16].

    Returns the sums over the run of (weight - dequantized weight) squared and of weight squared.
    """
    mask = bits.dtype.type(tables.element.magnitude_mask)
    maxima = np.empty(block_scales.size, bits.dtype)
    _block_maxima(bits, mask, maxima)
    block_scales[:] = tables.block_scales(maxima)
    _encode_run(bits, mask, block_scales, tables.thresholds, packed)
    return squared_error(bits, tables.element, tables.scale, packed, block_scales)


def squared_error(
    bits: Bits, element: FloatFormat, scale: np.float32, packed: U8, block_scales: U8
) -> tuple[float, float]:
    """The sums that `encode` returns, for `bits` [n] encoded by anyone under the global scale `scale`."""
    half_factors = E4M3_VALUES * scale * np.float32(0.5)
    if element.name == "BF16":
        error, power = _bf16_error_run(bits, half_factors, packed, block_scales)
    else:
        error, power = _float32_error_run(element.widen(bits), half_factors, packed, block_scales)
    return float(error), float(power)


@_compile
@no_type_check
def _larger(a, b):
    return a if a > b else b


@_compile
@no_type_check
def _largest(bits, mask):
    largest = mask ^ mask
    for i in range(bits.size):
        largest = _larger(largest, bits[i] & mask)
    return largest


@_compile
@no_type_check
def _block_maxima(bits, mask, maxima):
    # Four running maxima: with one, each comparison waits for the last, and the loop takes three times as long.
    for b in range(maxima.size):
        block = bits[b * 16 : b * 16 + 16]
        m0, m1, m2, m3 = block[0] & mask, block[1] & mask, block[2] & mask, block[3] & mask
        for j in range(4, 16, 4):
            m0 = _larger(m0, block[j] & mask)
            m1 = _larger(m1, block[j + 1] & mask)
            m2 = _larger(m2, block[j + 2] & mask)
            m3 = _larger(m3, block[j + 3] & mask)
        maxima[b] = _larger(_larger(m0, m1), _larger(m2, m3))


@_compile
@no_type_check
def _encode_run(bits, mask, scales, thresholds, packed):
    codes = np.empty(TILE, bits.dtype)
    for start in range(0, bits.size, TILE):
        tile = bits[start : start + TILE]
        tile_scales = scales[start // 16 : start // 16 + tile.size // 16]
        _encode_tile(tile, mask, tile_scales, thresholds, codes)
        _pack(codes, packed[start // 2 : start // 2 + tile.size // 2])


@_compile
@no_type_check
def _encode_tile(bits, mask, scales, thresholds, codes):
    one = codes.dtype.type(1)
    sign_bit = codes.dtype.type(8)
    sign_shift = codes.dtype.type(8 * codes.itemsize - 4)
    for b in range(scales.size):
        t = thresholds[scales[b]]
        t1, t2, t3, t4, t5, t6, t7, signed = t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]
        for j in range(16):
            word = bits[b * 16 + j]
            m = word & mask
            code = one * (m >= t1) + one * (m >= t2) + one * (m >= t3) + one * (m >= t4)
            code += one * (m >= t5) + one * (m >= t6) + one * (m >= t7)
            codes[b * 16 + j] = code | ((word >> sign_shift) & (sign_bit * (m >= signed)))


@_compile
@no_type_check
def _pack(codes, packed):
    # The even element takes the low nibble.
    for i in range(packed.size):
        packed[i] = codes[2 * i] | (codes[2 * i + 1] << 4)


@_compile
@no_type_check
def _unpack(packed, codes):
    for i in range(packed.size):
        codes[2 * i] = packed[i] & 15
        codes[2 * i + 1] = packed[i] >> 4


@_compile
@no_type_check
def _bf16_error_run(bits, half_factors, packed, scales):
    values = np.empty(TILE, np.float32)
    words = values.view(np.uint32)
    error = power = 0.0
    for start in range(0, bits.size, TILE):
        tile = bits[start : start + TILE]
        for i in range(tile.size):
            words[i] = np.uint32(tile[i]) << np.uint32(16)
        tile_packed = packed[start // 2 : start // 2 + tile.size // 2]
        tile_scales = scales[start // 16 : start // 16 + tile.size // 16]
        tile_error, tile_power = _tile_error(values, half_factors, tile_packed, tile_scales)
        error += tile_error
        power += tile_power
    return error, power


@_compile
@no_type_check
def _float32_error_run(values, half_factors, packed, scales):
    error = power = 0.0
    for start in range(0, values.size, TILE):
        tile = values[start : start + TILE]
        tile_packed = packed[start // 2 : start // 2 + tile.size // 2]
        tile_scales = scales[start // 16 : start // 16 + tile.size // 16]
        tile_error, tile_power = _tile_error(tile, half_factors, tile_packed, tile_scales)
        error += tile_error
        power += tile_power
    return error, power


@_compile
@no_type_check
def _tile_error(values, half_factors, packed, scales):
    codes = np.empty(TILE, np.uint8)
    _unpack(packed, codes)
    # 16 running sums, one a lane: a single sum would forbid vectorising.
    error = np.zeros(16, np.float32)
    power = np.zeros(16, np.float32)
    for b in range(scales.size):
        half_factor = half_factors[scales[b]]
        for j in range(16):
            signed = np.int32(codes[b * 16 + j])
            code = signed & np.int32(7)
            # Twice the magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6 of E2M1.
            doubled = code + max(code - np.int32(4), np.int32(0)) + np.int32(2) * np.int32(code == 7)
            magnitude = np.float32(doubled) * half_factor
            value = values[b * 16 + j]
            delta = value + magnitude if signed > np.int32(7) else value - magnitude
            error[j] += delta * delta
            power[j] += value * value
    return error.astype(np.float64).sum(), power.astype(np.float64).sum()
