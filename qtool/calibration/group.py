"""Calibrated rounding of one fused group, from its weights and the second moments of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final

import numpy as np

from qtool.calibration.hessian import damped, predicted_bound, predicted_gain
from qtool.calibration.loops import CompiledLoops, Loops
from qtool.calibration.moments import Float64, Moments, require_finite
from qtool.calibration.rounding import PHASES, restore
from qtool.errors import ModelError
from qtool.formats.floats import U8, Float32
from qtool.formats.nvfp4 import BLOCK, encode_reference, global_scale, is_usable_scale
from qtool.formats.nvfp4_kernels import dequantize

FEW_TOKENS: Final = 5
"""Tokens an input column below which calibration plainly overfits."""
FARTHEST: Final = 0.25
"""How far a target may be from its weight, over the weight's norm. The trained models at hand stay below 0.2, rounding included;
without a limit a weight that is small beside the stream's error becomes what makes up for that on the calibration data."""
_SAMPLED_ROWS: Final = 256  # of a weight, from which its global scale is chosen and its errors are measured


@dataclass(frozen=True)
class Effort:
    """How much is done for a group; `passes` of coordinate descent, `damping` of H over the mean of its diagonal.

    `asymmetric`: the share of what the quantized layers before it changed that a group makes up for. `gradients`: whether
    tokens and outputs count by the gradient of the answer.

    Eight passes and not four: the error of the demo reranker's log-odds over that of `max` fell from 0.185 to 0.157 and from
    0.151 to 0.144 on two twins and stayed 0.184 on the model itself; MiniLM stayed at 0.453. A pass takes 1 % of the time.
    """

    passes: int = 8
    damping: float = 0.01
    asymmetric: float = 0.5
    gradients: bool = False


FAST: Final = Effort(passes=0)
STANDARD: Final = Effort()
BEST: Final = Effort(gradients=True)


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
    output_covariance: Callable[[int], Float32 | Float64] | None = None,
    loops: Loops | None = None,
) -> GroupResult:
    """Round `weights` ([rows, in] each) so that the group's output on the calibration inputs changes least.

    `output_covariance` gives for the index of a weight the mean of g gᵀ [rows, rows], g the gradient of the answer by the
    weight's output. With it, the last descent is two-sided. `loops` are by default the compiled ones.
    """
    _check(weights, moments)
    loops = loops or CompiledLoops(pool)
    hessian = damped(moments.hessian, effort.damping)
    factor = loops.factor(hessian)
    gain, bound = predicted_gain(factor, hessian), predicted_bound(factor, hessian)
    matrix = hessian.astype(np.float32)
    del hessian
    targets = _targets(weights, moments, factor, effort.asymmetric, loops)
    feedback = factor.astype(np.float32)
    del factor
    usual = global_scale(np.float32(max(np.abs(each).max(initial=0) for each in weights)))
    scale = _choose_global_scale(targets, matrix.diagonal().copy(), loops)
    results = []
    for index, (original, wanted) in enumerate(zip(weights, targets, strict=True)):
        codes, scales = loops.round(wanted, matrix, feedback, scale, effort.passes)
        if output_covariance is not None:
            covariance = damped(output_covariance(index).astype(np.float64), effort.damping).astype(np.float32)
            loops.descend_two_sided(codes, scales, wanted, matrix, covariance, scale, effort.passes)
        error, max_error = _errors(original, usual, restore(codes, scales, scale) - wanted, moments.hessian)
        packed = codes[:, ::2] | codes[:, 1::2] << np.uint8(4)
        results.append(CalibratedWeight(packed, scales, error, max_error))
    return GroupResult(scale, tuple(results), gain, bound, _warnings(moments))


def _choose_global_scale(targets: Sequence[Float32], importance: Float32, loops: Loops) -> np.float32:
    """The one of eight scales under which the blocks round best, each input weighted by its second moment."""
    largest = np.float32(max(np.abs(each).max(initial=0) for each in targets))
    scales = (global_scale(largest) * 2 ** (np.arange(PHASES) / 8)).astype(np.float32)
    if not all(map(is_usable_scale, scales)):
        raise ModelError(
            f"The largest magnitude of a fused group is {largest:g}, for which no global scale can be stored.",
            "The layer was never trained or not saved. Quantize a checkpoint with its weights.",
        )
    losses = sum(loops.phase_losses(_sample(each), importance, scales) for each in targets)
    return np.float32(scales[np.argmin(losses)])


def _targets(
    weights: Sequence[Float32], moments: Moments, factor: Float64, share: float, loops: Loops
) -> list[Float32]:
    """W* [rows, in] = W + `share` · T (H + λI)⁻¹ with T = W (C - H)ᵀ + `drift`ᵀ: the weights that bring x̂ to the original output."""
    if moments.cross is None and moments.drift is None:
        return list(weights)
    pull = None if moments.cross is None else (moments.cross - moments.hessian).T
    targets, start = [], 0
    for each in weights:
        drift = None if moments.drift is None else moments.drift[:, start : start + len(each)]
        correction = share * loops.solve(each, pull, drift, factor)
        targets.append((each + _limited(correction, FARTHEST * float(np.linalg.norm(each)))).astype(np.float32))
        start += len(each)
    return targets


def _limited(correction: Float64, most: float) -> Float64:
    """A correction of a weight, shortened to the norm `most` if it is longer."""
    size = float(np.linalg.norm(correction))
    return correction * (most / size) if size > most else correction


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
