"""Rounding to NVFP4 that minimizes the error of a linear's output instead of the error of each weight.

The functions here are the specification of `kernels`, which tests compare with them bit for bit: float32 throughout,
each sum in the order that is written here, no fused multiply-add. Only the products written `@` are BLAS's.

Shapes: `target` [rows, in] are the weights to round, `hessian` [in, in] is H + λI, `feedback` [in, in] the upper
triangular U with UᵀU = (H + λI)⁻¹; codes [rows, in] and scale codes [rows, in/16].
"""

from __future__ import annotations

from typing import Final

import numpy as np

from qtool.calibration.moments import Float64
from qtool.formats.floats import E4M3_MAX, E4M3_MIN, E4M3_VALUES, U8, Float32, encode_e4m3
from qtool.formats.nvfp4 import BLOCK, E2M1_VALUES, block_scale_codes

BATCH: Final = 128
"""Columns that are rounded before what follows from them for all others is computed as one matrix product."""

ROWS_TOGETHER: Final = 32
"""Rows whose effect on each other is followed one by one; that of earlier ones comes as one matrix product."""

MIDPOINTS: Final = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
CANDIDATES: Final = np.arange(-9, 5)
"""Block scales that are tried, in E4M3 codes from the scale that the block's largest magnitude asks for.

Eight codes are a factor of two: from half the usual scale, which clips, to one and a half times."""
SMALLEST_SCALE: Final = 1
LARGEST_SCALE: Final = 126

PHASES: Final = 8
"""Global scales that are tried, in eighths of a factor of two."""


def round_reference(weights: Float32, factors: Float32) -> U8:
    """The nearest code of each weight under its block's `factors`; beyond the largest value it clips, ties go to zero."""
    magnitudes = np.abs(weights) * (np.float32(1) / factors)
    codes = (magnitudes[..., None] > MIDPOINTS).sum(axis=-1)
    signed: U8 = (codes | np.where((weights < 0) & (codes > 0), 8, 0)).astype(np.uint8)
    return signed


def _candidates(block: Float32, scale: np.float32) -> U8:
    """The codes of the scales to try [14, rows] for `block` [rows, 16]."""
    usual = block_scale_codes(np.abs(block).max(axis=1), scale)
    codes: U8 = np.clip(usual.astype(int) + CANDIDATES[:, None], SMALLEST_SCALE, LARGEST_SCALE).astype(np.uint8)
    return codes


def phase_losses_reference(weights: Float32, importance: Float32, scales: Float32) -> Float64:
    """The loss [phases] of rounding `weights` [rows, in] under each global scale of `scales`.

    Each block takes the scale with the least sum of importance · (weight - rounded)².
    """
    losses = np.zeros(len(scales))
    for phase, scale in enumerate(scales):
        for row in weights:
            for first in range(0, len(row), BLOCK):
                block, least = row[None, first : first + BLOCK], np.float32(np.inf)
                for code in _candidates(block, scale)[:, 0]:
                    factor = E4M3_VALUES[code] * scale
                    difference = block[0] - E2M1_VALUES[round_reference(block[0], factor)] * factor
                    loss = np.float32(0)
                    for j in range(BLOCK):
                        loss += importance[first + j] * (difference[j] * difference[j])
                    least = min(least, loss)
                losses[phase] += least
    return losses


def sweep_reference(target: Float32, feedback: Float32, scale: np.float32) -> tuple[U8, U8]:
    """Round column by column, each column's error passed on to those after it; block scales are chosen on the way."""
    work = target.copy()
    rows, columns = target.shape
    codes, scales = np.zeros((rows, columns), np.uint8), np.zeros((rows, columns // BLOCK), np.uint8)
    inverse = np.float32(1) / feedback.diagonal()
    for first in range(0, columns, BATCH):
        last = min(first + BATCH, columns)
        errors = np.zeros((rows, last - first), np.float32)
        for start in range(first, last, BLOCK):
            block = slice(start, start + BLOCK)
            chosen = _scale_in_the_loop(work[:, block], feedback[block, block], inverse[block], scale)
            scales[:, start // BLOCK] = chosen
            factors = E4M3_VALUES[chosen] * scale
            for j in range(start, start + BLOCK):
                codes[:, j] = round_reference(work[:, j], factors)
                error = (work[:, j] - E2M1_VALUES[codes[:, j]] * factors) * inverse[j]
                work[:, j + 1 : last] -= error[:, None] * feedback[j, j + 1 : last]
                errors[:, j - first] = error
        work[:, last:] -= errors @ feedback[first:last, last:]
    return codes, scales


def _scale_in_the_loop(block: Float32, feedback: Float32, inverse: Float32, scale: np.float32) -> U8:
    """The scale code of each row's block with the least sum of squared errors when it is rounded with feedback."""
    best, least = np.zeros(len(block), np.uint8), np.full(len(block), np.inf, np.float32)
    for chosen in _candidates(block, scale):
        factors = E4M3_VALUES[chosen] * scale
        work, loss = block.copy(), np.zeros(len(block), np.float32)
        for j in range(BLOCK):
            error = (work[:, j] - E2M1_VALUES[round_reference(work[:, j], factors)] * factors) * inverse[j]
            loss += error * error
            work[:, j + 1 :] -= error[:, None] * feedback[j, j + 1 :]
        best, least = np.where(loss < least, chosen, best), np.minimum(loss, least)
    return best


def restore(codes: U8, scales: U8, scale: np.float32) -> Float32:
    """The float32 weights [rows, in] of codes and scale codes."""
    blocks = E2M1_VALUES[codes].reshape(*scales.shape, BLOCK) * (E4M3_VALUES[scales] * scale)[..., None]
    return blocks.reshape(codes.shape)


def descend_reference(codes: U8, scales: U8, target: Float32, hessian: Float32, scale: np.float32, passes: int) -> None:
    """Coordinate descent on tr(D H Dᵀ), D = restored - target: each block's scale, then each of its codes, in place."""
    difference = restore(codes, scales, scale) - target
    for _ in range(passes):
        for first in range(0, target.shape[1], BATCH):
            batch = slice(first, min(first + BATCH, target.shape[1]))
            gradient = (difference @ hessian[:, batch]).astype(np.float32)
            _descend_batch(codes[:, batch], scales[:, first // BLOCK :], gradient, hessian[batch, batch], scale)
            blocks = slice(first // BLOCK, (batch.stop + BLOCK - 1) // BLOCK)
            difference[:, batch] = restore(codes[:, batch], scales[:, blocks], scale) - target[:, batch]


def _descend_batch(codes: U8, scales: U8, gradient: Float32, hessian: Float32, scale: np.float32) -> None:
    for start in range(0, codes.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        chosen = scales[:, start // BLOCK]
        chosen[:] = _descend_scale(codes[:, block], chosen, gradient[:, start:], hessian[block, start:], scale)
        factors = E4M3_VALUES[chosen] * scale
        for j in range(start, start + BLOCK):
            old = E2M1_VALUES[codes[:, j]] * factors
            codes[:, j] = round_reference(old - gradient[:, j] * (np.float32(1) / hessian[j, j]), factors)
            change = E2M1_VALUES[codes[:, j]] * factors - old
            gradient[:, start:] += change[:, None] * hessian[j, start:]


def _descend_scale(codes: U8, chosen: U8, gradient: Float32, hessian: Float32, scale: np.float32) -> U8:
    """The best scale of a block whose codes stay; `gradient` follows. `hessian` [16, …] begins with the block's own."""
    values, factors = E2M1_VALUES[codes], E4M3_VALUES[chosen] * scale
    product = np.zeros_like(values)
    for j in range(BLOCK):
        product += values[:, j, None] * hessian[j, :BLOCK]
    slope, curvature = np.zeros(len(codes), np.float32), np.zeros(len(codes), np.float32)
    for j in range(BLOCK):
        slope += gradient[:, j] * values[:, j]
        curvature += product[:, j] * values[:, j]
    is_used = curvature > 0
    wanted = factors - slope / np.where(is_used, curvature, np.float32(1))
    best = np.where(is_used, encode_e4m3(np.clip(wanted / scale, E4M3_MIN, E4M3_MAX)), chosen)
    new_factors = E4M3_VALUES[best] * scale
    for j in range(BLOCK):
        change = values[:, j] * new_factors - values[:, j] * factors
        gradient += change[:, None] * hessian[j]
    return best.astype(np.uint8)


def descend_two_sided_reference(
    codes: U8,
    scales: U8,
    target: Float32,
    hessian: Float32,
    covariance: Float32,
    scale: np.float32,
    passes: int,
) -> None:
    """Descent on tr(A D H Dᵀ), A = `covariance` [rows, rows] of the output's gradients: rows that act together are rounded together.

    Batch by batch of columns, and in each row by row: the gradient of row r is that of the rows before it as they are now.
    """
    difference = restore(codes, scales, scale) - target
    for _ in range(passes):
        for first in range(0, target.shape[1], BATCH):
            batch = slice(first, min(first + BATCH, target.shape[1]))
            blocks = slice(first // BLOCK, batch.stop // BLOCK)
            inside = np.ascontiguousarray(hessian[batch, batch])
            gradient = covariance @ (difference @ hessian[:, batch])
            moved = np.zeros_like(gradient)  # what the rows so far changed, times H
            for group in range(0, len(target), ROWS_TOGETHER):
                rows = slice(group, min(group + ROWS_TOGETHER, len(target)))
                gradient[rows] += covariance[rows, :group] @ moved[:group]
                for row in range(rows.start, rows.stop):
                    for before in range(group, row):
                        gradient[row] += covariance[row, before] * moved[before]
                    one = slice(row, row + 1)
                    slopes: Float32 = gradient[one] / covariance[row, row]
                    _descend_batch(codes[one, batch], scales[one, blocks], slopes, inside, scale)
                    now = restore(codes[one, batch], scales[one, blocks], scale) - target[one, batch]
                    change = now - difference[one, batch]
                    for j in range(change.shape[1]):
                        moved[row] += change[0, j] * inside[j]
                    difference[one, batch] = now
