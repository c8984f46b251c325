"""Second moments of a fused group's inputs, summed over the calibration tokens."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qtool.errors import ModelError
from qtool.formats.floats import Float32

Float64 = NDArray[np.float64]

TOKENS_SUMMED: Final = 1024
"""Tokens whose products are summed in float32 before they are added to the float64 sums."""
_TILE: Final = 512  # columns of a product that one thread computes at a time


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Each matrix product stays on the thread that asks for it: `workers` divides the work, always the same way.

    A BLAS that divides a product by the number of its threads may round differently with another number.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        yield


@dataclass(frozen=True)
class Moments:
    """Means over tokens t with weights w_t; x̂ is a token's input after the quantized layers, x its original input.

    `hessian` [in, in]: of w x̂ x̂ᵀ. `mean` [in]: of w x̂.
    `cross` [in, in]: of w x̂ xᵀ; None where x̂ = x, or where `drift` contains it.
    `drift` [in, out]: of w x̂ eᵀ, where e [out] is what has to be added to the group's output x̂ Wᵀ. For a linear that is
    added to the residual stream r: e = (r + x Wᵀ) - (r̂ + x̂ Wᵀ), without `cross`; or e = r - r̂, with it.
    `tokens`: how many there were.
    """

    hessian: Float64
    mean: Float64
    cross: Float64 | None
    drift: Float64 | None
    tokens: int


class MomentSums:
    """The running sums of one fused group's moments.

    The sums depend neither on the number of threads nor on how the tokens are cut into batches.
    """

    def __init__(self, columns: int, *, cross: bool = False, drift: int = 0, pool: Executor | None = None) -> None:
        """`columns`: of the weights. `drift`: the rows of the group if its drift is summed, else 0."""
        self._pool = pool
        self._hessian = np.zeros((columns, columns))
        self._mean = np.zeros(columns)
        self._cross = np.zeros((columns, columns)) if cross else None
        self._drift = np.zeros((columns, drift)) if drift else None
        widths = (columns, columns if cross else 0, drift, 1)
        self._waiting = tuple(np.empty((TOKENS_SUMMED, width), np.float32) for width in widths)
        self._tokens = 0

    def add(
        self,
        quantized: Float32,
        original: Float32 | None = None,
        lack: Float32 | None = None,
        token_weights: Float32 | None = None,
    ) -> None:
        """Add tokens: x̂ [t, in], x [t, in] if `cross` is summed, e [t, out] if `drift` is, w [t] (without: all 1)."""
        tokens = len(quantized)
        weights = np.ones((tokens, 1), np.float32) if token_weights is None else token_weights[:, None]
        empty = np.empty((tokens, 0), np.float32)
        given = (quantized, empty if original is None else original, empty if lack is None else lack, weights)
        for part, waiting in zip(given, self._waiting, strict=True):
            if part.shape != (tokens, waiting.shape[1]):
                raise ValueError(f"expected {(tokens, waiting.shape[1])}, got {part.shape}")
        start = 0
        while start < tokens:
            filled = self._tokens % TOKENS_SUMMED
            count = min(TOKENS_SUMMED - filled, tokens - start)
            for part, waiting in zip(given, self._waiting, strict=True):
                waiting[filled : filled + count] = part[start : start + count]
            start += count
            self._tokens += count
            if filled + count == TOKENS_SUMMED:
                self._sum(TOKENS_SUMMED, (self._hessian, self._mean, self._cross, self._drift))

    def moments(self) -> Moments:
        """The means over the tokens so far; ModelError if any is NaN or infinite."""
        rest = self._tokens % TOKENS_SUMMED
        sums = (self._hessian, self._mean, self._cross, self._drift)
        if rest:  # the waiting tokens are not forgotten: more may come
            sums = tuple(None if each is None else each.copy() for each in sums)  # type: ignore[assignment]
            self._sum(rest, sums)
        hessian, mean, cross, drift = (None if each is None else each / max(self._tokens, 1) for each in sums)
        if hessian is None or mean is None:
            raise ValueError("no sums")
        for rows in row_tiles(len(hessian)):  # the index arrays of np.tril_indices would be as large as two Hessians
            corner = hessian[rows, rows]
            corner[:] = np.triu(corner) + np.triu(corner, 1).T
            hessian[rows, : rows.start] = hessian[: rows.start, rows].T
        moments = Moments(hessian, mean, cross, drift, self._tokens)
        require_finite(moments)
        return moments

    def _sum(self, tokens: int, sums: tuple[Float64, Float64, Float64 | None, Float64 | None]) -> None:
        hessian, mean, cross, drift = sums
        inputs, original, lack, weights = (waiting[:tokens] for waiting in self._waiting)
        weighted = np.ascontiguousarray((inputs * weights).T)
        mean += weighted.sum(axis=1, dtype=np.float64)
        jobs = [
            (hessian, inputs, rows, columns) for rows, columns in _tiles(hessian.shape) if rows.start <= columns.start
        ]
        for total, right in ((cross, original), (drift, lack)):
            if total is not None:
                jobs += [(total, right, rows, columns) for rows, columns in _tiles(total.shape)]

        def add_tile(job: tuple[Float64, Float32, slice, slice]) -> None:
            total, right, rows, columns = job
            total[rows, columns] += weighted[rows] @ right[:, columns]

        list((self._pool.map if self._pool else map)(add_tile, jobs))


def require_finite(moments: Moments) -> None:
    """Raise the ModelError of moments that hold NaN or infinite values."""
    for name in ("hessian", "mean", "cross", "drift"):
        values = getattr(moments, name)
        if values is not None and not np.isfinite(values).all():
            raise ModelError(
                f"The {name} of the calibration inputs has {np.count_nonzero(~np.isfinite(values)):,} NaN or infinite values.",
                "A layer before it overflows. Calibrate in float32, and check the checkpoint with `qtool inspect`.",
            )


def _tiles(shape: tuple[int, ...]) -> list[tuple[slice, slice]]:
    rows, columns = ([slice(start, min(start + _TILE, size)) for start in range(0, size, _TILE)] for size in shape)
    return [(row, column) for row in rows for column in columns]


ROWS: Final = 256
"""Rows that one thread works on at a time."""


def row_tiles(rows: int) -> list[slice]:
    """The rows in tiles that do not depend on the number of threads."""
    return [slice(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS)]
