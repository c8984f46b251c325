"""Whether NVFP4 blocks are what rounding to nearest makes of their weights.

Rule: a block passes if its scale is within one E4M3 step of its largest magnitude over six and every code is a nearest
one under that scale; ties and the last bit of a division may fall either way, so that any sound quantizer passes.
"""

from __future__ import annotations

from typing import Final, no_type_check

import numba
import numpy as np

from qtool.formats.floats import Float32
from qtool.formats.nvfp4 import BLOCK, E4M3_VALUES, U8, block_scale_codes

_LOW: Final = np.array([0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32) * np.float32(1 - 1e-5)
_HIGH: Final = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, np.inf], np.float32) * np.float32(1 + 1e-5)
"""Between which quotients each magnitude is a nearest one; the largest has no end, since its scale is judged instead."""


def misrounded_blocks(values: Float32, packed: U8, block_scales: U8, scale: np.float32) -> int:
    """How many blocks of `values` [n] are not what `packed` [n/2] and `block_scales` [n/16] under `scale` may hold."""
    maxima = np.abs(values.reshape(-1, BLOCK)).max(axis=1)
    if not (np.isfinite(scale) and scale > 0):
        return int(maxima.size)
    ideal = block_scale_codes(maxima, scale)
    factors = E4M3_VALUES * np.float32(scale)
    return int(_count(values, packed, block_scales, maxima, ideal, factors))


@numba.njit(nogil=True, cache=True)
@no_type_check
def _count(values, packed, block_scales, maxima, ideal, factors):
    bad = 0
    for block in range(maxima.size):
        code = np.int64(block_scales[block])
        is_bad = maxima[block] > 0 and (code > 126 or abs(code - np.int64(ideal[block])) > 1)
        factor = factors[code]
        for place in range(16):
            index = block * 16 + place
            nibble = np.int64(packed[index // 2]) >> 4 * (index % 2) & 15
            magnitude = nibble & 7
            if maxima[block] == 0:
                is_bad |= magnitude != 0
                continue
            quotient = abs(values[index]) / factor
            is_bad |= not (_LOW[magnitude] <= quotient <= _HIGH[magnitude])
            is_bad |= magnitude != 0 and (values[index] < 0) != (nibble > 7)
        bad += is_bad
    return bad
