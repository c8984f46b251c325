"""What each number format may lose, and which stored values no algorithm of the format could have written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qtool.formats.floats import U8, Float32
from qtool.formats.ggml import GgmlType
from qtool.storage.gguf_model import decode

# What each number format may lose, and which values or blocks lost more. A bound is derived from the format's rounding,
# not fitted, so that no sound artefact exceeds it:
# - F16 and BF16 round to nearest: 2^-11 and 2^-8 of a value, and half the smallest subnormal.
# - Q8_0: half a step of amax/127 in each block of 32, and the scale is an F16. Worst is a block of one large value and 31
#   at half a step: sqrt(31)/254 · 1.125 = 0.025.
# - NVFP4: worst is a block whose 15 smaller values lie in the middle of the widest gap (4 to 6) under a scale that E4M3
#   rounded down: sqrt((15 + 0.125) / (15·25 + 31.9)) = 0.193; normal weights lose 0.09 to 0.10.
# - A type that llama.cpp quantizes has no such bound: 3.2 / 2^bits, two and a half times what the demo reranker loses
#   (Q6_K 0.019, Q5_K 0.038, Q4_K 0.074, IQ4_XS 0.079).

_NVFP4: Final = 0.2
_Q8_0: Final = 0.025
_RELATIVE: Final[Mapping[str, float]] = {"F16": 2.0**-11, "BF16": 2.0**-8}
_SUBNORMAL: Final[Mapping[str, float]] = {"F16": 2.0**-25, "BF16": 2.0**-134}
_EXACT: Final[Mapping[str, tuple[str, ...]]] = {"F32": ("BF16", "F16", "F32"), "F16": ("F16",), "BF16": ("BF16",)}
"""By stored type: the types that it holds without loss."""

_Q8_BLOCK: Final = 32
_Q8_STEP: Final = (0.5 + 127 * 2.0**-11) * (1 + 1e-5) / 127
_Q8_SUBNORMAL: Final = 127 * 2.0**-25  # the scale is an F16, too
_BITS: Final = re.compile(r"I?Q(\d)|TQ(\d)|MXFP(\d)")


@dataclass(frozen=True)
class Misfits:
    """What no rounding of the reference gives: `units` (blocks where a format has them, else values) that hold such values.

    `values` counts the values themselves, `searched` the NVFP4 blocks whose scale is not that of their largest value and
    which are rounded to nearest under it: what a search for the best scale writes.
    """

    units: int = 0
    values: int = 0
    searched: int = 0

    def __add__(self, other: Misfits) -> Misfits:
        return Misfits(self.units + other.units, self.values + other.values, self.searched + other.searched)


def is_exact(stored: str, source: str) -> bool:
    """Whether every value of the type `source` survives in the type `stored`."""
    return source in _EXACT.get(stored, ())


def bound(stored: str, source: str, count: int, norm: float) -> float:
    """The largest relative (Frobenius) error of `count` values whose norm is `norm`."""
    if is_exact(stored, source) or norm == 0:
        return 0.0
    small = np.sqrt(count) / norm
    if stored in _RELATIVE:
        return float(_RELATIVE[stored] + _SUBNORMAL[stored] * small)
    if stored == "Q8_0":
        return float(_Q8_0 + _Q8_SUBNORMAL * small)
    if stored == "NVFP4":
        return _NVFP4
    match = _BITS.match(stored)
    bits = int(next(filter(None, match.groups()))) if match else 1
    return 3.2 / float(2**bits)


def unit(stored: str) -> str:
    """What is counted: single values, or blocks where a format has them."""
    return "blocks" if stored in ("NVFP4", "Q8_0") else "values"


def units(stored: str, count: int) -> int:
    """How many there are among `count` values."""
    return count // {"NVFP4": 16, "Q8_0": _Q8_BLOCK}.get(stored, 1)


def misfits(stored: str, source: str, expected: Float32, found: Float32) -> Misfits:
    """The values or blocks that lost more than rounding can; formats with codes of 2 to 6 bits have checks of their own."""
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(found - expected)
    if is_exact(stored, source):
        bad = ~(error == 0)
        if bad.any() and (stored, source) == ("F32", "BF16"):  # widened from F16, which rounds the smallest numbers
            with np.errstate(over="ignore"):
                bad &= (error > _SUBNORMAL["F16"]) | (found != expected.astype(np.float16))
        return _single(bad)
    if stored in _RELATIVE:
        allowed = _RELATIVE[stored] * np.abs(expected) + _SUBNORMAL[stored]
        return _single(~(error <= allowed))
    if stored == "Q8_0":
        blocks = np.abs(expected).reshape(-1, _Q8_BLOCK).max(axis=1, keepdims=True)
        bad = ~(error.reshape(-1, _Q8_BLOCK) <= blocks * _Q8_STEP + _Q8_SUBNORMAL)
        return Misfits(int(np.count_nonzero(bad.any(axis=1))), int(np.count_nonzero(bad)))
    return Misfits()


def _single(bad: NDArray[np.bool_]) -> Misfits:
    count = int(np.count_nonzero(bad))
    return Misfits(count, count)


# The types that llama.cpp quantizes with a search, with or without an importance matrix. However it chooses scales and
# minima, at the end it gives each value the nearest code under those that it stores (ggml-quants.c, `quantize_row_*`),
# and so any other code was not written by it. Guided by an importance matrix, the codes of Q4_0 and Q5_0 are nearest under
# one scale of their block that is not stored: there must be such a scale. Q4_1 and Q5_1 then have a minimum besides, and
# are held to their bound only, as are IQ1 to IQ3, TQ and MXFP4.


@dataclass(frozen=True)
class _Coded:
    """Where the codes lie in a block, and the values that they stand for before scaling.

    `spread` is how far, in parts of itself, the scale under which codes were chosen may be from the stored one, an F16 at
    the beginning of the block: None where it is another one.
    """

    codes: slice
    levels: Float32
    spread: float | None = 0.0


def _levels(count: int, first: int = 0) -> Float32:
    return np.arange(first, first + count, dtype=np.float32)


_NL: Final = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)  # kvalues_iq4nl
_F16_STEP: Final = 2.0**-11
_CODED: Final[Mapping[str, _Coded]] = {
    "Q2_K": _Coded(slice(16, 80), _levels(4)),
    "Q3_K": _Coded(slice(0, 96), _levels(8, -4)),
    "Q4_K": _Coded(slice(16, 144), _levels(16)),
    "Q5_K": _Coded(slice(16, 176), _levels(32)),
    "Q6_K": _Coded(slice(0, 192), _levels(64, -32)),
    "IQ4_NL": _Coded(slice(2, 18), _NL, _F16_STEP),
    "IQ4_XS": _Coded(slice(8, 136), _NL, _F16_STEP),
    "Q4_0": _Coded(slice(2, 18), _levels(16, -8), None),
    "Q5_0": _Coded(slice(2, 22), _levels(32, -16), None),
}
_TOLERANCE: Final = 2e-3
"""Parts of a step that are lost in single precision."""
_FURTHEST: Final = 2.0
"""How far the scale of a Q4_0 block's codes may be from the stored one; measured with importances over five decades: 1.2."""
_MOST_LOST: Final = 0.1
"""A scale that lost more in F16 says nothing of the one before."""
_TINY: Final = 1.3e-4
"""What a block whose F16 scale has become zero may have held: 4,096 times 2^-25, of Q6_K."""


def coded_misfits(kind: GgmlType, stored: U8, expected: Float32, found: Float32) -> Misfits:
    """The values whose code is not the nearest under the scales of their block; none of a type that is not known."""
    coded = _CODED.get(kind.name)
    if coded is None:
        return Misfits()
    low, high = (_decoded(kind, stored, coded.codes, fill) for fill in (0x00, 0xFF))
    levels = coded.levels
    with np.errstate(all="ignore"):
        scale = (high - low) / (levels[-1] - levels[0])
        zero = low - levels[0] * scale
        wanted, given = (expected - zero) / scale, (found - zero) / scale
        if coded.spread is None or levels is _NL:
            codes = np.rint(np.interp(np.nan_to_num(given), levels, np.arange(levels.size))).astype(np.int64)
            edges = (levels[1:] + levels[:-1]) / 2
            least, most = np.append(-np.inf, edges)[codes], np.append(edges, np.inf)[codes]
        if coded.spread is None:
            bad = _without_scale(wanted, least, most, kind.block)
        elif levels is _NL:
            slack = _TOLERANCE + np.abs(wanted) * _spread(coded.spread, stored, kind)
            bad = ~((wanted >= least - slack) & (wanted <= most + slack))
        else:
            bad = ~(np.abs(np.clip(wanted, levels[0], levels[-1]) - given) <= 0.5 + _TOLERANCE)
    largest = np.abs(scale).reshape(-1, kind.block).max(axis=1).repeat(kind.block)
    flat = scale == 0  # the code has no effect: beside parts that reach further, or matter more, this one was given up
    bad[flat] = np.abs(found - expected)[flat] > np.maximum(largest * (levels[-1] - levels[0]), _TINY)[flat]
    return _single(bad)


def _spread(relative: float, stored: U8, kind: GgmlType) -> NDArray[np.floating] | float:
    """How far each value's scale may be from the stored one, which is rounded to F16."""
    if not relative:
        return 0.0
    scales = np.ascontiguousarray(stored.reshape(-1, kind.block_bytes)[:, :2]).view(np.float16).astype(np.float32)
    lost = 2.0**-25 / (np.abs(scales).reshape(-1) - 2.0**-25)  # half the smallest half, of what was rounded
    return np.repeat(np.where(lost < _MOST_LOST, relative + lost, np.inf), kind.block)


def _without_scale(wanted: Float32, least: Float32, most: Float32, block: int) -> NDArray[np.bool_]:
    """The values of blocks for which there is no factor that brings each of them between its edges."""
    low, high = wanted / most, wanted / least  # of a factor f: f · least <= wanted <= f · most
    above, below = most > 0, least < 0
    lower = np.maximum(np.where(above, low, -np.inf), np.where(below, high, -np.inf))
    upper = np.minimum(np.where(above, np.inf, low), np.where(below, np.inf, high))
    lower, upper = lower.reshape(-1, block).max(axis=1), upper.reshape(-1, block).min(axis=1)
    good = (lower <= upper * (1 + _TOLERANCE)) & (lower <= _FURTHEST) & (upper >= 1 / _FURTHEST)
    return np.asarray(np.repeat(~good, block) & (wanted != 0))


def _decoded(kind: GgmlType, stored: U8, codes: slice, fill: int) -> Float32:
    blocks = stored.reshape(-1, kind.block_bytes).copy()
    blocks[:, codes] = fill
    return decode(blocks.reshape(1, -1), kind).reshape(-1)
