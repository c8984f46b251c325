"""Calibrated rounding of one fused group, from its weights and the second moments of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final

import numpy as np

from qtool.calibration.hessian import damped, feedback_factor, predicted_bound, predicted_gain, row_tiles, target
from qtool.calibration.kernels import descend, descend_two_sided, phase_losses, sweep
from qtool.calibration.moments import Float64, Moments, require_finite
from qtool.calibration.rounding import PHASES, restore
from qtool.errors import ModelError
from qtool.formats.floats import U8, Float32
from qtool.formats.nvfp4 import BLOCK, encode_reference, global_scale, is_usable_scale
from qtool.formats.nvfp4_kernels import dequantize

FEW_TOKENS: Final = 5
"""Tokens an input column below which calibration plainly overfits."""
_SAMPLED_ROWS: Final = 256  # of a weight, from which its global scale is chosen and its errors are measured


@dataclass(frozen=True)
class Effort:
    """How much is done for a group; `passes` of coordinate descent, `damping` of H over the mean of its diagonal.

    `asymmetric`: the share of what the quantized layers before it changed that a group makes up for.
    """

    passes: int = 4
    damping: float = 0.01
    asymmetric: float = 0.5


FAST: Final = Effort(passes=0)
STANDARD: Final = Effort()


@dataclass(frozen=True)
class CalibratedWeight:
    """One weight of the group: `packed` [rows, in/2] and `block_scales` [rows, in/16], as in `formats.nvfp4`.

    `error`: RMS of what the rounding changes in the output on the calibration inputs, over the RMS of the output;
    `max_error` the same for the `max` recipe. Both are measured on at most 256 rows.
    """

    packed: U8
    block_scales: U8
    error: float
    max_error: float


@dataclass(frozen=True)
class GroupResult:
    """The group's weights in the order given, under one global scale, and what the moments predicted for them (see `Prediction`).

    `warnings`: sentences for people, about the calibration data.
    """

    global_scale: np.float32
    weights: tuple[CalibratedWeight, ...]
    predicted_gain: float
    predicted_bound: float
    warnings: tuple[str, ...]


def calibrate_group(
    weights: Sequence[Float32],
    moments: Moments,
    effort: Effort,
    *,
    pool: Executor,
    output_covariances: Sequence[Float64] | None = None,
) -> GroupResult:
    """Round `weights` ([rows, in] each) so that the group's output on the calibration inputs changes least.

    `output_covariances` ([rows, rows] each): mean of g gᵀ, g the gradient of the answer by the weight's output. With
    them, the last descent is two-sided.
    """
    _check(weights, moments)
    hessian = damped(moments.hessian, effort.damping)
    factor = feedback_factor(hessian)
    gain, bound = predicted_gain(factor, hessian), predicted_bound(factor, hessian)
    matrix = hessian.astype(np.float32)
    del hessian
    targets = _targets(weights, moments, factor, effort.asymmetric, pool)
    problem = _Problem(matrix, factor.astype(np.float32), effort.passes, pool)
    del factor
    usual = global_scale(np.float32(max(np.abs(each).max(initial=0) for each in weights)))
    scale = problem.choose_global_scale(targets)
    results = []
    for index, (original, wanted) in enumerate(zip(weights, targets, strict=True)):
        codes, scales = problem.round(wanted, scale)
        if output_covariances is not None:
            covariance = damped(output_covariances[index], effort.damping).astype(np.float32)
            descend_two_sided(codes, scales, wanted, problem.hessian, covariance, scale, effort.passes, pool)
        error, max_error = _errors(original, usual, restore(codes, scales, scale) - wanted, moments.hessian)
        packed = codes[:, ::2] | codes[:, 1::2] << np.uint8(4)
        results.append(CalibratedWeight(packed, scales, error, max_error))
    return GroupResult(scale, tuple(results), gain, bound, _warnings(moments))


@dataclass(frozen=True)
class _Problem:
    """What the rounding of every weight of a group shares."""

    hessian: Float32
    feedback: Float32
    passes: int
    pool: Executor

    def choose_global_scale(self, targets: Sequence[Float32]) -> np.float32:
        """The one of eight scales under which the blocks round best, each input weighted by its second moment."""
        largest = np.float32(max(np.abs(each).max(initial=0) for each in targets))
        scales = (global_scale(largest) * 2 ** (np.arange(PHASES) / 8)).astype(np.float32)
        if not all(map(is_usable_scale, scales)):
            raise ModelError(
                f"The largest magnitude of a fused group is {largest:g}, for which no global scale can be stored.",
                "The layer was never trained or not saved. Quantize a checkpoint with its weights.",
            )
        importance = self.hessian.diagonal().copy()
        jobs = [(_sample(each), scales[phase : phase + 1]) for phase in range(PHASES) for each in targets]
        losses = list(self.pool.map(lambda job: phase_losses(job[0], importance, job[1])[0], jobs))
        return np.float32(scales[np.argmin(np.reshape(losses, (PHASES, -1)).sum(axis=1))])

    def round(self, wanted: Float32, scale: np.float32) -> tuple[U8, U8]:
        """The codes [rows, in] and scale codes [rows, in/16] of a weight; its rows are independent of each other."""

        def round_rows(rows: slice) -> tuple[U8, U8]:
            codes, scales = sweep(wanted[rows], self.feedback, scale)
            descend(codes, scales, wanted[rows], self.hessian, scale, self.passes)
            return codes, scales

        codes, scales = zip(*self.pool.map(round_rows, row_tiles(len(wanted))), strict=True)
        return np.concatenate(codes), np.concatenate(scales)


def _targets(
    weights: Sequence[Float32], moments: Moments, factor: Float64, share: float, pool: Executor
) -> list[Float32]:
    targets, start = [], 0
    for each in weights:
        drift = None if moments.drift is None else moments.drift[:, start : start + len(each)]
        targets.append(target(each, drift, moments, factor, share, pool))
        start += len(each)
    return targets


def _check(weights: Sequence[Float32], moments: Moments) -> None:
    columns, rows = len(moments.hessian), sum(map(len, weights))
    if columns % BLOCK or any(each.shape[1] != columns for each in weights):
        raise ValueError(f"weights {[each.shape for each in weights]} do not fit moments of {columns} inputs")
    if moments.drift is not None and moments.drift.shape != (columns, rows):
        raise ValueError(f"the drift is {moments.drift.shape}, expected {(columns, rows)}")
    require_finite(moments)
    if not all(np.isfinite(each).all() for each in weights):
        raise ModelError("A weight has NaN or infinite values.", "Quantize a checkpoint that was saved whole.")


def _sample(weights: Float32) -> Float32:
    return weights[:: max(1, len(weights) // _SAMPLED_ROWS)][:_SAMPLED_ROWS]


def _errors(original: Float32, usual: np.float32, difference: Float32, hessian: Float64) -> tuple[float, float]:
    """The errors of the output over its RMS: for `difference`, and for `max` rounding under the global scale `usual`."""
    rows = _sample(original)
    packed, scales = encode_reference(rows.reshape(-1), usual)
    plain = dequantize(packed.reshape(len(rows), -1), scales.reshape(len(rows), -1), usual) - rows
    power = _power(rows, hessian)
    if not power:
        return 0.0, 0.0
    return float(np.sqrt(_power(_sample(difference), hessian) / power)), float(np.sqrt(_power(plain, hessian) / power))


def _power(rows: Float32, hessian: Float64) -> float:
    wide = rows.astype(np.float64)
    return float(np.einsum("ij,ij->", wide @ hessian, wide))


def _warnings(moments: Moments) -> tuple[str, ...]:
    columns = len(moments.hessian)
    if moments.tokens >= FEW_TOKENS * columns:
        return ()
    return (f"{moments.tokens:,} tokens for {columns:,} inputs; calibration needs at least {FEW_TOKENS * columns:,}.",)
