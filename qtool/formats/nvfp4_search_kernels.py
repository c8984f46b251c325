"""The compiled loops of `nvfp4_search`, which specifies what they compute. All run without the GIL."""

from __future__ import annotations

from typing import no_type_check

import numba
import numpy as np

from qtool.formats.floats import U8, Float32
from qtool.formats.nvfp4 import BLOCK
from qtool.formats.nvfp4_search import tried_four_over_six_scales, tried_mse_scales

_compile = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")  # a tried scale may be zero


def search_mse(weights: Float32, amax: np.float32, block_scales: U8) -> None:
    """Write the block-scale codes [n/16] of `weights` [n]; see `search_mse_reference`."""
    _search_mse(weights, tried_mse_scales(amax), block_scales)


def search_four_over_six(weights: Float32, amax: np.float32, block_scales: U8) -> None:
    """Write the block-scale codes [n/16] of `weights` [n]; see `search_four_over_six_reference`."""
    codes, tried = tried_four_over_six_scales(np.abs(weights.reshape(-1, BLOCK)).max(axis=1), amax)
    search_few(weights, codes, tried, block_scales)


def search_few(weights: Float32, codes: U8, tried: Float32, block_scales: U8) -> None:
    """Write for each block the one of `codes` [c, n/16] whose scale, of `tried` [c, n/16], has the least squared error."""
    _search_few(weights, codes, tried, block_scales)


@_compile
@no_type_check
def _squared_error(weights, first, scale, squares):
    for j in range(16):
        magnitude = abs(weights[first + j])
        quotient = magnitude / scale
        rounded = (
            np.float32(0.5) * np.float32(quotient > np.float32(0.25))
            + np.float32(0.5) * np.float32(quotient >= np.float32(0.75))
            + np.float32(0.5) * np.float32(quotient > np.float32(1.25))
            + np.float32(0.5) * np.float32(quotient >= np.float32(1.75))
            + np.float32(quotient > np.float32(2.5))
            + np.float32(quotient >= np.float32(3.5))
            + np.float32(2) * np.float32(quotient > np.float32(5))
        )
        rest = magnitude - rounded * scale
        squares[j] = rest * rest
    total = squares[0] + squares[8]
    for j in range(1, 8):
        total += squares[j] + squares[j + 8]
    return total


@_compile
@no_type_check
def _search_mse(weights, tried, block_scales):
    squares = np.empty(16, np.float32)
    for block in range(block_scales.size):
        first = block * 16
        largest = np.float32(0)
        for j in range(first, first + 16):
            largest = max(largest, abs(weights[j]))
        best, least = 1, np.float32(np.inf)
        for code in range(1, 0x7F):
            clipped = largest - np.float32(6) * tried[code]
            if clipped > 0 and clipped * clipped > least * np.float32(1.0001):
                continue  # the largest weight alone loses more
            loss = _squared_error(weights, first, tried[code], squares)
            if loss < least:
                best, least = code, loss
            if largest * np.float32(4.001) < tried[code]:
                break  # all round to zero, here and under larger scales
        block_scales[block] = best


@_compile
@no_type_check
def _search_few(weights, codes, tried, block_scales):
    squares = np.empty(16, np.float32)
    for block in range(block_scales.size):
        best, least = 0, np.float32(np.inf)
        for candidate in range(codes.shape[0]):
            loss = _squared_error(weights, block * 16, tried[candidate, block], squares)
            if loss < least:
                best, least = candidate, loss
        block_scales[block] = codes[best, block]
