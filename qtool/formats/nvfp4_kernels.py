"""The compiled loops of NVFP4: weights to bytes and back, without Python objects and without the GIL.

Rule: a weight is one flat run of blocks. Blocks of 16 never straddle rows, so no loop needs the shape.
"""

from __future__ import annotations

from typing import Final, no_type_check

import numba
import numpy as np

from qtool.formats.floats import FLOAT_FORMATS, Bits, Float32, FloatFormat
from qtool.formats.nvfp4 import E2M1_VALUES, E4M3_VALUES, U8, EncodeTables, block_scale_codes
from qtool.formats.nvfp4_block import block_maximum, encode_blocks

_SUMMED: Final = 1 << 10
"""Blocks whose errors are summed in float32 before a double takes them over."""

_compile = numba.njit(nogil=True, cache=True, boundscheck=False)


def largest_magnitude(bits: Bits, element: FloatFormat) -> int:
    """The bits of the largest magnitude in `bits` [n]; at least `element.infinity_bits` if any is NaN or infinite."""
    return int(_largest(bits, bits.dtype.type(element.magnitude_mask)))


def encode(bits: Bits, tables: EncodeTables, packed: U8, block_scales: U8) -> tuple[float, float]:
    """Encode the run `bits` [n] into `packed` [n/2] and `block_scales` [n/16].

    Returns the sums over the run of (weight - dequantized weight) squared and of weight squared.
    """
    element = tables.element
    if bits.dtype != element.bits_dtype:
        bits = FLOAT_FORMATS["F16"].widen(bits).view(element.bits_dtype)
    maxima = np.empty(block_scales.size, bits.dtype)
    _block_maxima(bits, bits.dtype.type(element.magnitude_mask), maxima)
    if tables.scale_codes.size:
        _look_up(tables.scale_codes, maxima, block_scales)
    else:
        block_scales[:] = block_scale_codes(element.widen(maxima), tables.scale)
    half_factors = E4M3_VALUES * tables.scale * np.float32(0.5)
    error, power = _encode_run(bits, block_scales, tables.thresholds, half_factors, packed)
    return float(error), float(power)


def dequantize(packed: U8, block_scales: U8, scale: np.float32) -> Float32:
    """The float32 weights [out, in] of `packed` [out, in/2] under E4M3 `block_scales` [out, in/16].

    The two scales are multiplied first, as ModelOpt and the engines' kernels do.
    """
    weights = np.empty((packed.shape[0], packed.shape[1] * 2), np.float32)
    factors = E4M3_VALUES * np.float32(scale)
    _decode_run(np.ascontiguousarray(packed).reshape(-1), block_scales.reshape(-1), factors, weights.reshape(-1))
    return weights


@_compile
@no_type_check
def _largest(bits, mask):
    largest = mask ^ mask
    for i in range(bits.size):
        magnitude = bits[i] & mask
        largest = max(largest, magnitude)
    return largest


@_compile
@no_type_check
def _block_maxima(bits, mask, maxima):
    for b in range(maxima.size):
        maxima[b] = block_maximum(bits, b * 16, mask)


@_compile
@no_type_check
def _look_up(scale_codes, maxima, scales):
    for b in range(maxima.size):
        scales[b] = scale_codes[np.uint32(maxima[b])]


@_compile
@no_type_check
def _encode_run(bits, scales, thresholds, half_factors, packed):
    sums = np.empty((2, 16), np.float32)
    error = power = 0.0
    for first in range(0, scales.size, _SUMMED):
        last = min(first + _SUMMED, scales.size)
        run, into = bits[first * 16 : last * 16], packed[first * 8 : last * 8]
        encode_blocks(run, scales[first:last], thresholds, half_factors, into, sums)
        error += sums[0].sum()
        power += sums[1].sum()
    return error, power


@_compile
@no_type_check
def _decode_run(packed, scales, factors, weights):
    for i in range(packed.size):
        factor = factors[scales[i // 8]]
        weights[2 * i] = E2M1_VALUES[packed[i] & 15] * factor
        weights[2 * i + 1] = E2M1_VALUES[packed[i] >> 4] * factor
