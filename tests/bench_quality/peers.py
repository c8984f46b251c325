"""What the calibrated recipes are compared with: `max`, searched scales, and GPTQ as ModelOpt does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import numba
import numpy as np

from qtool.calibration.hessian import damped, feedback_factor
from qtool.calibration.moments import Moments
from qtool.calibration.rounding import BATCH, MIDPOINTS
from qtool.formats.floats import E4M3_MAX, E4M3_MIN, E4M3_VALUES, FLOAT_FORMATS, encode_e4m3
from qtool.formats.nvfp4 import (
    BLOCK,
    E2M1_VALUES,
    FOUR_OVER_SIX_MAX,
    block_scale_codes,
    encode_reference,
    encode_tables,
    global_scale,
)
from qtool.formats.nvfp4_kernels import dequantize, encode
from qtool.formats.nvfp4_search_kernels import search_few, search_four_over_six, search_mse

Weights = Sequence[np.ndarray]


def _group_scale(weights: Weights) -> np.float32:
    return global_scale(np.float32(max(np.abs(each).max() for each in weights)))


def plain(
    weights: Weights, _moments: Moments, _pool: Executor, _covariances: Weights | None = None
) -> list[np.ndarray]:
    """`max`: what nvfp4-w4a16 writes."""
    scale = _group_scale(weights)
    found = []
    for weight in weights:
        packed, scales = encode_reference(weight.reshape(-1), scale)
        found.append(dequantize(packed.reshape(len(weight), -1), scales.reshape(len(weight), -1), scale))
    return found


def gptq(weights: Weights, moments: Moments, pool: Executor, _covariances: Weights | None = None) -> list[np.ndarray]:
    """Error feedback under the scales of `max`, as ModelOpt's gptq: damping 1 %, columns in order, original inputs."""
    scale = _group_scale(weights)
    feedback = feedback_factor(damped(moments.hessian, 0.01)).astype(np.float32)

    def rows_of(work: np.ndarray) -> np.ndarray:
        codes = block_scale_codes(np.abs(work.reshape(len(work), -1, BLOCK)).max(axis=2), scale)
        factors, work, result = E4M3_VALUES[codes] * scale, work.copy(), np.empty_like(work)
        for first in range(0, work.shape[1], BATCH):
            last = min(first + BATCH, work.shape[1])
            errors = np.empty((len(work), last - first), np.float32)
            _feed_back(work, first, np.ascontiguousarray(feedback[first:last, first:last]), factors, result, errors)
            work[:, last:] -= errors @ feedback[first:last, last:]
        return result

    return [
        np.concatenate(list(pool.map(rows_of, np.array_split(weight, -(-len(weight) // 256))))) for weight in weights
    ]


@numba.njit(nogil=True, cache=True)
def _feed_back(work, start, feedback, factors, result, errors):
    for row in range(work.shape[0]):
        for j in range(errors.shape[1]):
            factor = factors[row, (start + j) // 16]
            quotient, nearest = abs(work[row, start + j]) / factor, 0
            for code in range(1, 8):
                if quotient > MIDPOINTS[code - 1]:
                    nearest = code
            value = E2M1_VALUES[nearest] * factor
            value = -value if work[row, start + j] < 0 else value
            result[row, start + j] = value
            errors[row, j] = (work[row, start + j] - value) / feedback[j, j]
            for k in range(j + 1, errors.shape[1]):
                work[row, start + k] -= errors[row, j] * feedback[j, k]


def _encoded(weights: Weights, amax: np.float32, scale: np.float32, search: Callable[..., None]) -> list[np.ndarray]:
    """The weights as `quantize` writes them with block scales that `search` finds."""
    found = []
    for weight in weights:
        tables = encode_tables(scale, FLOAT_FORMATS["F32"])
        packed, scales = np.empty(weight.size // 2, np.uint8), np.empty(weight.size // BLOCK, np.uint8)
        bits = np.ascontiguousarray(weight).reshape(-1).view(np.uint32)
        encode(bits, tables, packed, scales, lambda values, codes: search(values, amax, codes))
        found.append(dequantize(packed.reshape(len(weight), -1), scales.reshape(len(weight), -1), scale))
    return found


def mse(weights: Weights, _moments: Moments, _pool: Executor, _covariances: Weights | None = None) -> list[np.ndarray]:
    """The recipe nvfp4-w4a16-mse."""
    amax = np.float32(max(np.abs(each).max() for each in weights))
    return _encoded(weights, amax, global_scale(amax), search_mse)


def four_over_six(
    weights: Weights, _moments: Moments, _pool: Executor, _covariances: Weights | None = None
) -> list[np.ndarray]:
    """The recipe nvfp4-w4a16-4over6."""
    amax = np.float32(max(np.abs(each).max() for each in weights))
    return _encoded(weights, amax, global_scale(amax, FOUR_OVER_SIX_MAX), search_four_over_six)


EXPANSIONS = np.arange(0.8, 1.81, 0.05, dtype=np.float32)
"""Multiples of a block's largest magnitude that llm-compressor's nvfp4_expanded_mse tries."""


def expanded_mse(
    weights: Weights, _moments: Moments, _pool: Executor, _covariances: Weights | None = None
) -> list[np.ndarray]:
    """llm-compressor's expanded search: 0.8 to 1.8 times the largest magnitude of a block; scales above 448 clip."""
    scale = _group_scale(weights)

    def search(values: np.ndarray, _amax: np.float32, codes: np.ndarray) -> None:
        usual = np.abs(values.reshape(-1, BLOCK)).max(axis=1) / (6 * scale)
        tried = encode_e4m3(np.clip(usual * EXPANSIONS[:, None], E4M3_MIN, E4M3_MAX))
        search_few(values, tried, E4M3_VALUES[tried] * scale, codes)

    return _encoded(weights, np.float32(0), scale, search)
