"""What was measured of one tensor, and samples by which tensors are recognised.

Rule: a sample is the beginning of a tensor; two tensors of one shape are the same if it agrees within the format's bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Final

import numpy as np

from qtool.comparison.weight_formats import bound, unit, units
from qtool.comparison.weight_pairs import TensorPair
from qtool.formats.floats import Float32

SAMPLE: Final = 1 << 16
_DAMAGED: Final = 0.05
"""Where fewer blocks are wrong, the rest is the reference's and bytes were damaged."""
_MARGIN: Final = 1.5


@dataclass(frozen=True)
class Measured:
    """A tensor's relative error beside its bound, and how many values or blocks lost more than rounding can."""

    pair: TensorPair
    relative_error: float
    bound: float
    misfits: int
    is_zero: bool = False

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.relative_error <= self.bound and not self.misfits

    @property
    def is_finite(self) -> bool:
        """Whether it holds numbers only."""
        return isfinite(self.relative_error)

    @property
    def is_damaged(self) -> bool:
        """Whether a few blocks are wrong and the rest is right."""
        return 0 < self.misfits < max(_DAMAGED * self.total, 2)

    @property
    def total(self) -> int:
        """How many values or blocks there are."""
        return units(self.pair.stored.format, self.pair.elements)

    @property
    def unit(self) -> str:
        """What is counted."""
        return unit(self.pair.stored.format)

    @cached_property
    def expected(self) -> Float32:
        """The beginning of the reference's tensor."""
        _, values = next(self.pair.expected())
        return values[:SAMPLE].copy()

    @cached_property
    def found(self) -> Float32:
        """The beginning of what is stored."""
        return self.pair.stored.values(0, self.expected.size)

    def matches(self, found: Float32, expected: Float32) -> bool:
        """Whether `found`, in this tensor's format, may stand for `expected`."""
        norm = float(np.linalg.norm(expected))
        allowed = _MARGIN * bound(self.pair.stored.format, self.pair.source_format, expected.size, norm)
        return norm > 0 and distance(found, expected) <= allowed


def distance(found: Float32, expected: Float32) -> float:
    """The relative (Frobenius) error."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))
