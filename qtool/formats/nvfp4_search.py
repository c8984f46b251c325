"""Block scales that are searched instead of computed: ModelOpt's `mse` and four-over-six, which need no data.

ModelOpt 0.47 tries scales in its fake quantizer and then computes the stored codes by another formula, so a scale that is
tried (`tried_scales`) may differ from the stored one in the last bit. Both formulas are ModelOpt's, operation by operation.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from qtool.formats.floats import E4M3_MAX, E4M3_MIN, E4M3_VALUES, U8, Float32, encode_e4m3
from qtool.formats.nvfp4 import BLOCK, E2M1_MAX, FOUR_OVER_SIX_MAX

MULTIPLIERS: Final = np.array([1, 1.5], np.float32)
"""Of a block's largest magnitude, which becomes the code 6, or 4: the block is then rounded on a finer grid near it."""


def _rounded(scales: Float32, largest: np.float32) -> Float32:
    """`scales` rounded to E4M3 under a second scale that maps `largest` to 448."""
    bound = np.float32(1) if largest <= 2.0**-24 else largest
    factor = np.float32(1) / bound * E4M3_MAX  # torch computes 448 / x as the reciprocal times 448
    codes = encode_e4m3(np.clip(scales * factor, np.float32(0), E4M3_MAX))
    rounded: Float32 = E4M3_VALUES[codes] * (np.float32(1) / factor)
    return rounded


def tried_mse_scales(amax: np.float32) -> Float32:
    """The scale [127] that ModelOpt tries for each block-scale code, in a group whose largest magnitude is `amax`."""
    fractions = E4M3_VALUES[:0x7F] / E4M3_MAX
    return _rounded(amax * fractions / E2M1_MAX, amax / E2M1_MAX)


def tried_four_over_six_scales(block_amax: Float32, amax: np.float32) -> tuple[U8, Float32]:
    """For blocks with these largest magnitudes the codes [2, n] to choose from, and the scales [2, n] tried for them."""
    scales = block_amax * MULTIPLIERS[:, None] / E2M1_MAX
    tried = _rounded(scales, amax * np.float32(E4M3_MAX / FOUR_OVER_SIX_MAX) / E2M1_MAX)
    scales[scales == 0] = 1
    with np.errstate(over="ignore"):  # the table contains maxima that no block of the group has
        stored = scales * FOUR_OVER_SIX_MAX / np.float32(amax / E2M1_MAX)
    return encode_e4m3(np.clip(stored, E4M3_MIN, E4M3_MAX)), tried


# The specification of `nvfp4_search_kernels`.


def squared_error_reference(blocks: Float32, scales: Float32) -> Float32:
    """The squared error [n] of each of `blocks` [n, 16] under its scale [n].

    The squares are added as torch adds 16 of them with vectors of eight: the halves to each other, then the eight sums.
    """
    magnitudes = np.abs(blocks)
    with np.errstate(divide="ignore", invalid="ignore"):
        quotients = magnitudes / scales[:, None]
    rounded = np.select(
        [
            quotients > 5,
            quotients >= 3.5,
            quotients > 2.5,
            quotients >= 1.75,
            quotients > 1.25,
            quotients >= 0.75,
            quotients > 0.25,
        ],
        [np.float32(value) for value in (6, 4, 3, 2, 1.5, 1, 0.5)],
        np.float32(0),
    )
    squares = (magnitudes - rounded * scales[:, None]) ** 2
    lanes = squares[:, :8] + squares[:, 8:]
    total: Float32 = np.cumsum(lanes, axis=1)[:, -1]
    return total


def search_mse_reference(weights: Float32, amax: np.float32) -> U8:
    """The block-scale codes [n/16] with the least squared error, of all 126; the smallest of equal ones."""
    blocks = weights.reshape(-1, BLOCK)
    tried = tried_mse_scales(amax)
    losses = [squared_error_reference(blocks, np.repeat(tried[code], len(blocks))) for code in range(1, 0x7F)]
    codes: U8 = (1 + np.argmin(losses, axis=0)).astype(np.uint8)
    return codes


def search_four_over_six_reference(weights: Float32, amax: np.float32) -> U8:
    """The block-scale codes [n/16] that map the largest magnitude to 6 or to 4, whichever has the smaller error."""
    blocks = weights.reshape(-1, BLOCK)
    codes, tried = tried_four_over_six_scales(np.abs(blocks).max(axis=1), amax)
    six, four = (squared_error_reference(blocks, scales) for scales in tried)
    chosen: U8 = np.where(four < six, codes[1], codes[0])
    return chosen
