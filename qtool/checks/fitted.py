"""How weights that were fitted to data are judged: by what their manifest records of them, else by how far they are off.

Rounding that minimizes the error of an output moves codes away from the nearest, so nearness proves nothing of it. What it
wrote is known by checksums; what it was made of by the error to the reference, which is recorded to the last digit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import pairwise
from typing import Final

import numpy as np

from qtool.checks.declared import RecordedWeight
from qtool.formats.floats import U8, Float32
from qtool.formats.nvfp4 import BLOCK
from qtool.formats.nvfp4_checksums import Difference, Nvfp4Checksums, band_edges, checksums_of, compare_checksums

# What fitting to data may take a weight to has no derived bound: each error is passed on to other weights, and the layers
# that add to the residual stream make up for what came before, so a weight far smaller than the stream's error may become
# anything. Measured were, at fast and standard effort and on 10 to 65,536 tokens:
#
#                           weight    row   blocks further off than zeros
#   demo models              0.148   0.32   0.003 %
#   MiniLM, 128 sentences    0.162   0.30   0
#   SmolLM2-135M, 16 pairs   0.200   1.19   0.11 %   (the row of a massive activation)
#
# The bounds are twice and ten times the largest. They hold weights whose manifest has no numbers that can be used.

FITTED_BOUND: Final = 0.4
ROW_BOUND: Final = 2.4
FAR_BLOCKS: Final = 0.01

_SAME: Final = 1e-9
"""The error is a sum in double precision, in whatever order: noise of a millionth changes more of it."""
_FAR: Final = 1 - 1e-6
_DAMAGED_SHARE: Final = 0.25
_MOSTLY: Final = 0.9


class Standing(Enum):
    """What a weight is beside its record."""

    INTACT = "as recorded"
    EDITED = "the record contradicts itself"
    DAMAGED = "other codes or scales than recorded"
    OTHER_SOURCE = "as recorded, of another source than the reference"


@dataclass(frozen=True)
class Proof:
    """A weight beside what its manifest records: `checksums`, `scale` and `source_crc32` as found, and its error."""

    recorded: RecordedWeight
    shape: tuple[int, int]
    checksums: Nvfp4Checksums
    scale: np.float32
    source_crc32: int
    relative_error: float

    @cached_property
    def difference(self) -> Difference | None:
        """Where codes or block scales are others."""
        return compare_checksums(self.checksums, self.recorded.checksums, self.shape)

    @property
    def has_other_scale(self) -> bool:
        """Whether the global scale is another."""
        return bool(self.scale != self.recorded.global_scale)

    @cached_property
    def standing(self) -> Standing:
        """What it is: an equal error says that weights and reference are those of the record, whatever else it says."""
        is_written = self.difference is None and not self.has_other_scale
        is_source = self.source_crc32 == self.recorded.source_crc32
        recorded = self.recorded.relative_error
        if abs(self.relative_error - recorded) <= _SAME * recorded:
            return Standing.INTACT if is_written and is_source else Standing.EDITED
        if not is_written:
            return Standing.DAMAGED
        return Standing.EDITED if is_source else Standing.OTHER_SOURCE

    @property
    def is_local(self) -> bool:
        """Whether only a part of it is other than recorded."""
        return self.difference is not None and self.difference.share <= _DAMAGED_SHARE and not self.has_other_scale

    def is_of(self, other: Proof) -> bool:
        """Whether these are the codes and block scales that are recorded of another weight."""
        is_alike = other.shape == self.shape and other.recorded.checksums.encoded() != self.recorded.checksums.encoded()
        return is_alike and compare_checksums(self.checksums, other.recorded.checksums, self.shape) is None

    @property
    def changed_parts(self) -> str:
        """What is other than recorded, as a message names it."""
        parts = []
        if self.difference is not None:
            parts += ["codes"] if self.difference.codes else []
            parts += ["block scales"] if self.difference.block_scales else []
        parts += ["global scale"] if self.has_other_scale else []
        return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)

    def is_restored_by(self, packed: U8, block_scales: U8) -> bool:
        """Whether these codes and block scales of its first rows, whole bands of them, are the recorded ones.

        A few bands may differ: a shift that is undone leaves the ends wrong.
        """
        edges = band_edges(self.shape[0])
        packed, block_scales = (
            each.reshape(-1, self.shape[1] // per) for each, per in ((packed, 2), (block_scales, BLOCK))
        )
        bands = [(first, last) for first, last in pairwise(edges) if last <= len(packed)]
        if not bands:
            return False
        found = checksums_of((packed[first:last], block_scales[first:last]) for first, last in bands).by_rows
        equal = (found == self.recorded.checksums.by_rows[:, : len(bands)]).all(axis=0)
        return bool(equal.mean() >= _MOSTLY)


class FittedErrors:
    """The errors of a weight [rows, in] by blocks and rows, from runs of whole blocks, and their sums in double precision.

    `far`: blocks that are further from the reference than zeros would be, or as far.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self._blocks_a_row = columns // BLOCK
        self._error, self._power, self._found = np.zeros(rows), np.zeros(rows), np.zeros(rows)
        self.far = 0

    def add(self, start: int, expected: Float32, found: Float32) -> None:
        """Add a run, of which the first value is number `start` of the weight."""
        with np.errstate(all="ignore"):
            difference = (found - expected).reshape(-1, BLOCK)
            error = np.einsum("ij,ij->i", difference, difference, dtype=np.float64)
            values = expected.reshape(-1, BLOCK)
            power = np.einsum("ij,ij->i", values, values, dtype=np.float64)
            self.far += int(np.count_nonzero((error >= _FAR * power) & (error > 0)))
            rows = (start // BLOCK + np.arange(len(error))) // self._blocks_a_row
            self._error += np.bincount(rows, error, self._error.size)
            self._power += np.bincount(rows, power, self._power.size)
            self._found += np.bincount(rows, np.abs(found).reshape(-1, BLOCK).max(axis=1), self._found.size)

    @property
    def zero_rows(self) -> int:
        """How many rows are all zeros where the reference's are not."""
        return int(np.count_nonzero((self._found == 0) & (self._power > 0)))

    @property
    def worst_row(self) -> float:
        """The largest relative error of a row."""
        with np.errstate(all="ignore"):
            return float(np.sqrt(np.nan_to_num(self._error / self._power)).max(initial=0))

    @property
    def relative_error(self) -> float:
        """|w - q| / |w| of the whole weight."""
        power = float(self._power.sum())
        return float(np.sqrt(self._error.sum() / power)) if power else 0.0


def row_bands(rows: int) -> Iterator[tuple[int, int]]:
    """The first row and the end of each band of a weight's rows."""
    return pairwise(band_edges(rows))
