"""The compiled loops of `rounding`, which specifies what they compute. All run without the GIL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, no_type_check

import numba
import numpy as np

from qtool.calibration.moments import Float64
from qtool.calibration.rounding import BATCH, CANDIDATES, LARGEST_SCALE, ROWS_TOGETHER, SMALLEST_SCALE
from qtool.formats.floats import E4M3_VALUES, U8, Float32
from qtool.formats.nvfp4 import BLOCK, E2M1_VALUES

_LANES: Final = 16
"""The candidates of a block are rounded at once, one a vector lane; the last two lanes repeat the last candidate."""
_OFFSETS: Final = np.append(CANDIDATES, [CANDIDATES[-1]] * (_LANES - len(CANDIDATES)))
_E4M3_MIDPOINTS: Final = ((E4M3_VALUES[:0x7E] + E4M3_VALUES[1:0x7F]) / 2).astype(np.float32)  # exact

# Never fastmath: sums keep their order, and products are rounded before they are added.
_compile = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")


def phase_losses(weights: Float32, importance: Float32, scales: Float32) -> Float64:
    """See `phase_losses_reference`."""
    losses: Float64 = np.zeros(len(scales))
    _phase_losses(weights, importance, scales, losses)
    return losses


def sweep(target: Float32, feedback: Float32, scale: np.float32) -> tuple[U8, U8]:
    """See `sweep_reference`."""
    work = target.copy()
    rows, columns = target.shape
    codes, scales = np.empty((rows, columns), np.uint8), np.empty((rows, columns // BLOCK), np.uint8)
    inverse = np.float32(1) / feedback.diagonal()
    for first in range(0, columns, BATCH):
        last = min(first + BATCH, columns)
        errors = np.empty((rows, last - first), np.float32)
        inside = np.ascontiguousarray(feedback[first:last, first:last])
        _sweep_batch(work, first, inside, inverse[first:last], scale, codes, scales, errors)
        work[:, last:] -= errors @ feedback[first:last, last:]
    return codes, scales


def descend(codes: U8, scales: U8, target: Float32, hessian: Float32, scale: np.float32, passes: int) -> None:
    """See `descend_reference`."""
    difference = np.empty_like(target)
    _subtract(codes, scales, scale, target, 0, target.shape[1], difference)
    inverse = np.float32(1) / hessian.diagonal()
    for _ in range(passes):
        for first in range(0, target.shape[1], BATCH):
            last = min(first + BATCH, target.shape[1])
            gradient = difference @ hessian[:, first:last]
            inside = np.ascontiguousarray(hessian[first:last, first:last])
            _descend_batch(codes, scales, first, gradient, inside, inverse[first:last], scale)
            _subtract(codes, scales, scale, target, first, last, difference)


def descend_two_sided(
    codes: U8,
    scales: U8,
    target: Float32,
    hessian: Float32,
    covariance: Float32,
    scale: np.float32,
    passes: int,
    product: Callable[[Float32, Float32], Float32],
) -> None:
    """See `descend_two_sided_reference`. Rows depend on each other, so only the large products, by `product`, are divided."""
    difference = np.empty_like(target)
    _subtract(codes, scales, scale, target, 0, target.shape[1], difference)
    inverse = np.float32(1) / hessian.diagonal()

    for _ in range(passes):
        for first in range(0, target.shape[1], BATCH):
            last = min(first + BATCH, target.shape[1])
            gradient = product(covariance, product(difference, np.ascontiguousarray(hessian[:, first:last])))
            inside = np.ascontiguousarray(hessian[first:last, first:last])
            moved = np.zeros_like(gradient)
            for group in range(0, len(target), ROWS_TOGETHER):
                rows = slice(group, min(group + ROWS_TOGETHER, len(target)))
                gradient[rows] += covariance[rows, :group] @ moved[:group]
                mixing = np.ascontiguousarray(covariance[rows, rows])
                _descend_together(
                    codes[rows],
                    scales[rows],
                    first,
                    gradient[rows],
                    inside,
                    inverse[first:last],
                    scale,
                    target[rows],
                    difference[rows],
                    mixing,
                    moved[rows],
                )


@_compile
@no_type_check
def _magnitude(quotient):
    """The nearest E2M1 magnitude; written as a sum of comparisons so that it becomes vector instructions."""
    half = np.float32(0.5)
    return (
        half * np.float32(quotient > np.float32(0.25))
        + half * np.float32(quotient > np.float32(0.75))
        + half * np.float32(quotient > np.float32(1.25))
        + half * np.float32(quotient > np.float32(1.75))
        + np.float32(quotient > np.float32(2.5))
        + np.float32(quotient > np.float32(3.5))
        + np.float32(2) * np.float32(quotient > np.float32(5))
    )


@_compile
@no_type_check
def _code(weight, factor):
    """The nearest code of `weight`."""
    quotient = abs(weight) * (np.float32(1) / factor)
    code = (
        np.int64(quotient > np.float32(0.25))
        + np.int64(quotient > np.float32(0.75))
        + np.int64(quotient > np.float32(1.25))
        + np.int64(quotient > np.float32(1.75))
        + np.int64(quotient > np.float32(2.5))
        + np.int64(quotient > np.float32(3.5))
        + np.int64(quotient > np.float32(5))
    )
    return code + 8 * np.int64(weight < 0 and code > 0)


@_compile
@no_type_check
def _nearest_scale(ratio):
    """The E4M3 code of `ratio` in 2⁻⁹…448, ties to even."""
    low, high = 0, _E4M3_MIDPOINTS.size
    while low < high:
        middle = (low + high) // 2
        if _E4M3_MIDPOINTS[middle] < ratio:
            low = middle + 1
        else:
            high = middle
    if low < _E4M3_MIDPOINTS.size and _E4M3_MIDPOINTS[low] == ratio and low % 2 == 1:
        low += 1
    return low


@_compile
@no_type_check
def _clip(ratio):
    return min(max(ratio, np.float32(2.0**-9)), np.float32(448))


@_compile
@no_type_check
def _set_candidates(weights, scale, chosen, factors):
    """The codes to try for the scale of `weights` [16], and their values times `scale`."""
    largest = np.float32(0)
    for j in range(16):
        largest = max(largest, abs(weights[j]))
    ratio = largest / (np.float32(6) * scale)
    if ratio == 0:
        ratio = np.float32(1)
    usual = _nearest_scale(_clip(ratio))
    for lane in range(_LANES):
        chosen[lane] = min(max(usual + _OFFSETS[lane], SMALLEST_SCALE), LARGEST_SCALE)
        factors[lane] = E4M3_VALUES[chosen[lane]] * scale


@_compile
@no_type_check
def _phase_losses(weights, importance, scales, losses):
    chosen, factors = np.empty(_LANES, np.int64), np.empty(_LANES, np.float32)
    inverse, loss = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    for phase in range(scales.size):
        for row in range(weights.shape[0]):
            for first in range(0, weights.shape[1], 16):
                _set_candidates(weights[row, first : first + 16], scales[phase], chosen, factors)
                for lane in range(_LANES):
                    inverse[lane] = np.float32(1) / factors[lane]
                    loss[lane] = np.float32(0)
                for j in range(first, first + 16):
                    weight = abs(weights[row, j])
                    for lane in range(_LANES):
                        difference = weight - _magnitude(weight * inverse[lane]) * factors[lane]
                        loss[lane] += importance[j] * (difference * difference)
                losses[phase] += loss.min()


@_compile
@no_type_check
def _sweep_batch(work, start, feedback, inverse, scale, codes, scales, errors):
    width = errors.shape[1]
    chosen, factors = np.empty(_LANES, np.int64), np.empty(_LANES, np.float32)
    inverse_factors, loss = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    lanes, error = np.empty((16, _LANES), np.float32), np.empty(_LANES, np.float32)
    for row in range(work.shape[0]):
        weights = work[row, start : start + width]
        for first in range(0, width, 16):
            _set_candidates(weights[first : first + 16], scale, chosen, factors)
            for lane in range(_LANES):
                inverse_factors[lane] = np.float32(1) / factors[lane]
                loss[lane] = np.float32(0)
            for j in range(16):
                for lane in range(_LANES):
                    lanes[j, lane] = weights[first + j]
            for j in range(16):
                for lane in range(_LANES):
                    weight = lanes[j, lane]
                    magnitude = _magnitude(abs(weight) * inverse_factors[lane]) * factors[lane]
                    rest = abs(weight) - magnitude
                    rest = (-rest if weight < 0 else rest) * inverse[first + j]
                    loss[lane] += rest * rest
                    error[lane] = rest
                for k in range(j + 1, 16):
                    share = feedback[first + j, first + k]
                    for lane in range(_LANES):
                        lanes[k, lane] -= error[lane] * share
            best = 0
            for lane in range(_LANES):
                if loss[lane] < loss[best]:
                    best = lane
            scales[row, (start + first) // 16] = chosen[best]
            factor = factors[best]
            for j in range(first, first + 16):
                code = _code(weights[j], factor)
                codes[row, start + j] = code
                rest = (weights[j] - E2M1_VALUES[code] * factor) * inverse[j]
                errors[row, j] = rest
                for k in range(j + 1, width):
                    weights[k] -= rest * feedback[j, k]


@_compile
@no_type_check
def _subtract(codes, scales, scale, target, first, last, difference):
    for row in range(codes.shape[0]):
        for j in range(first, last):
            factor = E4M3_VALUES[scales[row, j // 16]] * scale
            difference[row, j] = E2M1_VALUES[codes[row, j]] * factor - target[row, j]


@_compile
@no_type_check
def _descend_batch(codes, scales, start, gradient, hessian, inverse, scale):
    product, values = np.empty(16, np.float32), np.empty(16, np.float32)
    for row in range(gradient.shape[0]):
        _descend_row(codes[row], scales[row], start, gradient[row], hessian, inverse, scale, product, values)


@_compile
@no_type_check
def _descend_together(codes, scales, start, gradient, hessian, inverse, scale, target, difference, mixing, moved):
    width = gradient.shape[1]
    product, values = np.empty(16, np.float32), np.empty(16, np.float32)
    slopes = np.empty(width, np.float32)
    for row in range(gradient.shape[0]):
        for before in range(row):
            for k in range(width):
                gradient[row, k] += mixing[row, before] * moved[before, k]
        for k in range(width):
            slopes[k] = gradient[row, k] / mixing[row, row]
        _descend_row(codes[row], scales[row], start, slopes, hessian, inverse, scale, product, values)
        for j in range(width):
            column = start + j
            factor = E4M3_VALUES[scales[row, column // 16]] * scale
            now = E2M1_VALUES[codes[row, column]] * factor - target[row, column]
            change = now - difference[row, column]
            difference[row, column] = now
            if change != 0:
                for k in range(width):
                    moved[row, k] += change * hessian[j, k]


@_compile
@no_type_check
def _descend_row(codes, scales, start, slopes, hessian, inverse, scale, product, values):
    width = slopes.size
    for first in range(0, width, 16):
        block = (start + first) // 16
        factor = E4M3_VALUES[scales[block]] * scale
        for j in range(16):
            values[j] = E2M1_VALUES[codes[start + first + j]]
            product[j] = np.float32(0)
        for j in range(16):
            for k in range(16):
                product[k] += values[j] * hessian[first + j, first + k]
        slope, curvature = np.float32(0), np.float32(0)
        for j in range(16):
            slope += slopes[first + j] * values[j]
            curvature += product[j] * values[j]
        if curvature > 0:
            best = _nearest_scale(_clip((factor - slope / curvature) / scale))
            if best != scales[block]:
                scales[block] = best
                new_factor = E4M3_VALUES[best] * scale
                for j in range(16):
                    change = values[j] * new_factor - values[j] * factor
                    for k in range(first, width):
                        slopes[k] += change * hessian[first + j, k]
                factor = new_factor
        for j in range(first, first + 16):
            code = codes[start + j]
            old = E2M1_VALUES[code] * factor
            new_code = _code(old - slopes[j] * inverse[j], factor)
            if new_code != code:
                codes[start + j] = new_code
                change = E2M1_VALUES[new_code] * factor - old
                for k in range(first, width):
                    slopes[k] += change * hessian[j, k]
