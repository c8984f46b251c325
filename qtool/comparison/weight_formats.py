"""What each number format may lose, and which values or blocks lost more.

Rule: a bound is derived from the format's rounding, not fitted, so that no sound artefact exceeds it:

- F16 and BF16 round to nearest: 2^-11 and 2^-8 of a value, and half the smallest subnormal.
- Q8_0: half a step of amax/127 in each block of 32, and the scale is an F16. Worst is a block of one large value and 31
  at half a step: sqrt(31)/254 · 1.125 = 0.025.
- NVFP4: worst is a block whose 15 smaller values lie in the middle of the widest gap (4 to 6) under a scale that E4M3
  rounded down: sqrt((15 + 0.125) / (15·25 + 31.9)) = 0.193; normal weights lose 0.09 to 0.10.
- A type that llama.cpp quantizes has no such bound: 3.2 / 2^bits, two and a half times what the demo reranker loses (Q6_K
  0.019, Q5_K 0.038, Q4_K 0.074, IQ4_XS 0.079).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import numpy as np

from qtool.formats.floats import Float32

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
    return _NVFP4 if stored == "NVFP4" else 3.2 / 2 ** _bits(stored)


def _bits(stored: str) -> int:
    match = _BITS.match(stored)
    return int(next(filter(None, match.groups()))) if match else 1


def unit(stored: str) -> str:
    """What is counted: single values, or blocks where a format has them."""
    return "blocks" if stored in ("NVFP4", "Q8_0") else "values"


def units(stored: str, count: int) -> int:
    """How many there are among `count` values."""
    return count // {"NVFP4": 16, "Q8_0": _Q8_BLOCK}.get(stored, 1)


def misfits(stored: str, source: str, expected: Float32, found: Float32) -> int:
    """How many values or blocks lost more than rounding can; NVFP4 has its own check, llama.cpp's types have none."""
    error = np.abs(found - expected)
    if is_exact(stored, source):
        return int(np.count_nonzero(~(error == 0)))
    if stored in _RELATIVE:
        allowed = _RELATIVE[stored] * np.abs(expected) + _SUBNORMAL[stored]
        return int(np.count_nonzero(~(error <= allowed)))
    if stored == "Q8_0":
        blocks = np.abs(expected).reshape(-1, _Q8_BLOCK).max(axis=1)
        worst = error.reshape(-1, _Q8_BLOCK).max(axis=1)
        return int(np.count_nonzero(~(worst <= blocks * _Q8_STEP + _Q8_SUBNORMAL)))
    return 0
