"""The compiled loops of the calibration against their literal references, bit for bit."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.calibration import kernels, rounding
from qtool.calibration.hessian import damped, feedback_factor
from qtool.formats.nvfp4 import global_scale


@st.composite
def problems(draw):
    """Weights, H + λI, U and a global scale; columns on both sides of a batch, outliers, zero blocks and rows."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, columns = draw(st.integers(1, 6)), 16 * draw(st.sampled_from([1, 2, 7, 8, 9, 17]))
    rank = draw(st.integers(1, 2 * columns))
    inputs = random.normal(size=(rank, columns)) * np.exp(random.normal(size=columns) * draw(st.floats(0, 3)))
    hessian = damped(inputs.T @ inputs / rank, draw(st.sampled_from([0.001, 0.01, 0.1])))
    weights = random.standard_t(3, size=(rows, columns)).astype(np.float32) * np.float32(
        10.0 ** draw(st.integers(-6, 2))
    )
    if draw(st.booleans()):
        weights[random.integers(rows)] = 0
        weights[:, 16 * random.integers(columns // 16) :][:, :16] = 0
    scale = global_scale(np.abs(weights).max() or np.float32(1)) * np.float32(draw(st.sampled_from([1, 1.5, 0.1])))
    return weights, hessian.astype(np.float32), feedback_factor(hessian).astype(np.float32), scale


@settings(max_examples=15, deadline=None)
@given(problems())
def test_sweep_and_descent_equal_their_references(problem):
    weights, hessian, feedback, scale = problem
    codes, scales = kernels.sweep(weights, feedback, scale)
    expected, expected_scales = rounding.sweep_reference(weights, feedback, scale)
    assert np.array_equal(scales, expected_scales)
    assert np.array_equal(codes, expected)
    kernels.descend(codes, scales, weights, hessian, scale, 2)
    rounding.descend_reference(expected, expected_scales, weights, hessian, scale, 2)
    assert np.array_equal(scales, expected_scales)
    assert np.array_equal(codes, expected)
    assert scales.min() >= rounding.SMALLEST_SCALE
    assert scales.max() <= rounding.LARGEST_SCALE
    assert codes.max() <= 15
    assert not (codes == 8).any()  # no negative zero


@settings(max_examples=4, deadline=None)
@given(problems())
def test_losses_of_global_scales_equal_their_reference(problem):
    weights, hessian, _, scale = problem
    scales = (scale * 2 ** (np.arange(3) / 8)).astype(np.float32)
    importance = hessian.diagonal().copy()
    few = weights[:1, :32].copy()
    assert np.array_equal(
        kernels.phase_losses(few, importance, scales), rounding.phase_losses_reference(few, importance, scales)
    )


@settings(max_examples=5, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_two_sided_descent_equals_its_reference(problem, seed):
    weights, hessian, feedback, scale = problem
    weights = np.tile(weights, (12, 1))[:40]  # more rows than are followed one by one
    gradients = np.random.default_rng(seed).normal(size=(9, len(weights)))
    covariance = damped(gradients.T @ gradients, 0.01).astype(np.float32)
    codes, scales = kernels.sweep(weights, feedback, scale)
    expected, expected_scales = codes.copy(), scales.copy()
    kernels.descend_two_sided(codes, scales, weights, hessian, covariance, scale, 1, np.matmul)
    rounding.descend_two_sided_reference(expected, expected_scales, weights, hessian, covariance, scale, 1)
    assert np.array_equal(scales, expected_scales)
    assert np.array_equal(codes, expected)
