"""NVFP4 weights whose bytes are right and in the wrong place, and weights of any format under a wrong factor.

Rule: each known mistake is undone on the beginning of the tensor; the one that makes it fit is the diagnosis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from qtool.comparison.catalogue import finding
from qtool.comparison.weight_measure import Measured
from qtool.comparison.weight_stores import Blocks, InGguf, Packed
from qtool.formats.nvfp4 import BLOCK
from qtool.inspection.finding import Finding

_INVERSE: Final = 0.05
"""How far scale times scale may be from 1; a factor is known to a few percent."""


def misread(each: Measured, artefact: Path) -> Finding | None:
    """What was done to the tensor, if undoing it makes it fit."""
    name, stored = each.pair.name, each.pair.stored
    blocks = None
    if stored.format == "NVFP4" and isinstance(stored, Packed | InGguf):
        blocks = stored.blocks(0, each.expected.size)
        for code, undone in _undone(blocks, each.pair.shape[-1]):
            if each.matches(undone.values(), each.expected):
                return finding(code, artefact, tensor=name)
    factor = _factor(each)
    if factor is None:
        return None
    if blocks is not None and abs(factor * float(blocks.scale) ** 2 - 1) < _INVERSE:
        return finding("global-scale-inverted", artefact, tensor=name)
    return finding("weights-scaled", artefact, tensor=name, factor=f"{1 / factor:.3g}")


def _undone(blocks: Blocks, columns: int) -> Iterator[tuple[str, Blocks]]:
    yield "nibbles-swapped", replace(blocks, packed=(blocks.packed >> 4 | blocks.packed << 4).astype(np.uint8))
    rows = blocks.block_scales
    if columns % BLOCK == 0 and rows.size % (columns // BLOCK) == 0:
        rows = rows.reshape(-1, columns // BLOCK)
    for step in (1, -1):
        yield "block-scales-shifted", replace(blocks, block_scales=np.roll(blocks.block_scales, step))
        yield "block-scales-shifted", replace(blocks, block_scales=np.roll(rows, step, axis=-1).reshape(-1))


def _factor(each: Measured) -> float | None:
    """What the stored weights must be multiplied with to fit, if there is such a number."""
    found, expected = each.found.astype(np.float64), each.expected.astype(np.float64)
    power = float(found @ found)
    if not power:
        return None
    factor = float(found @ expected) / power
    scaled = (factor * found).astype(np.float32)
    is_plain = each.bound == 0  # then a factor leaves rounding errors that the format itself has not
    fits = np.linalg.norm(scaled - each.expected) <= 0.01 * np.linalg.norm(expected) if is_plain else False
    return factor if factor > 0 and (fits or each.matches(scaled, each.expected)) else None
