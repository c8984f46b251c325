"""Calibrated groups: legal, better than `max`, the same whatever the threads and batches, and honest about bad data."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from qtool.calibration.group import FARTHEST, FAST, STANDARD, calibrate_group
from qtool.calibration.hessian import damped, feedback_factor, predict
from qtool.calibration.moments import MomentSums, single_threaded_blas
from qtool.errors import ModelError
from qtool.formats.nvfp4_kernels import dequantize

COLUMNS, ROWS = 160, 300  # more than a batch, more than a tile


@pytest.fixture(scope="module")
def tokens():
    """Inputs with a few strong directions, as real ones have, and what a quantized prefix makes of them."""
    random = np.random.default_rng(1)
    mixing = random.normal(size=(COLUMNS, COLUMNS)) * np.exp(-np.arange(COLUMNS) / 12)[:, None]
    original = (random.normal(size=(1500, COLUMNS)) @ mixing + 0.5).astype(np.float32)
    return original, original + 0.05 * random.normal(size=original.shape).astype(np.float32)


@pytest.fixture(scope="module")
def weights():
    random = np.random.default_rng(2)
    return [random.standard_t(5, size=(rows, COLUMNS)).astype(np.float32) * np.float32(0.02) for rows in (ROWS, 40)]


@pytest.fixture(scope="module")
def moments(tokens):
    original, quantized = tokens
    sums = MomentSums(COLUMNS, cross=True)
    sums.add(quantized, original)
    return sums.moments()


def calibrated(weights, moments, effort=STANDARD, workers=2, **options):
    with ThreadPoolExecutor(workers) as pool, single_threaded_blas():
        return calibrate_group(weights, moments, effort, pool=pool, **options)


def restored(result):
    return [dequantize(each.packed, each.block_scales, result.global_scale) for each in result.weights]


def test_moments_are_the_same_whatever_the_batches_and_threads(tokens, moments):
    original, quantized = tokens
    with ThreadPoolExecutor(3) as pool:
        sums = MomentSums(COLUMNS, cross=True, pool=pool)
        for part in np.array_split(np.arange(len(original)), 7):
            sums.add(quantized[part], original[part])
            found = sums.moments()  # looking at them changes nothing
    for name in ("hessian", "mean", "cross"):
        assert np.array_equal(getattr(found, name), getattr(moments, name))
    wide = quantized.astype(np.float64)
    assert np.allclose(moments.hessian, wide.T @ wide / len(wide), rtol=1e-5, atol=1e-5)
    assert np.allclose(moments.cross, wide.T @ original / len(wide), rtol=1e-5, atol=1e-5)
    assert np.allclose(moments.mean, wide.mean(axis=0), atol=1e-6)


def test_token_weights_count_tokens_more_than_once(tokens):
    _, quantized = tokens
    twice, weighted = MomentSums(COLUMNS), MomentSums(COLUMNS)
    twice.add(np.concatenate([quantized[:200], quantized[:50]]))
    weighted.add(quantized[:200], token_weights=np.repeat(np.float32([2, 1]), [50, 150]) * np.float32(200 / 250))
    assert np.allclose(twice.moments().hessian, weighted.moments().hessian, rtol=1e-5, atol=1e-6)


def test_drift_contains_what_cross_says(tokens, weights):
    """For a linear that is added to the stream: e = x Wᵀ - x̂ Wᵀ alone gives the target that the cross moments give."""
    original, quantized = tokens
    lack = (original - quantized) @ weights[0].T
    by_drift, by_cross = MomentSums(COLUMNS, drift=ROWS), MomentSums(COLUMNS, cross=True)
    by_drift.add(quantized, lack=lack)
    by_cross.add(quantized, original)
    one, other = (calibrated(weights[:1], sums.moments(), FAST) for sums in (by_drift, by_cross))
    equal = np.mean(one.weights[0].packed == other.weights[0].packed)
    assert equal > 0.99  # two ways to sum the same


def test_bytes_do_not_depend_on_the_number_of_threads(weights, moments):
    one, three = (calibrated(weights, moments, workers=workers) for workers in (1, 3))
    assert one.global_scale == three.global_scale
    for ours, theirs in zip(one.weights, three.weights, strict=True):
        assert np.array_equal(ours.packed, theirs.packed)
        assert np.array_equal(ours.block_scales, theirs.block_scales)


def test_outputs_change_less_than_under_max_and_descent_helps(weights, moments):
    fast, standard = (calibrated(weights, moments, effort) for effort in (FAST, STANDARD))
    for quick, slow in zip(fast.weights, standard.weights, strict=True):
        assert slow.error < quick.error < 0.7 * quick.max_error
    assert 0 < standard.predicted_bound < standard.predicted_gain < 1
    prediction = predict(moments)
    assert prediction.gain == standard.predicted_gain
    assert prediction.gain != prediction.gain_centred


def test_the_quantized_output_follows_the_original_not_the_quantized_prefix(tokens, weights, moments):
    original, quantized = tokens
    wanted = original @ weights[0].T
    asymmetric, symmetric = (
        restored(calibrated(weights, moments, replace(STANDARD, asymmetric=share)))[0] for share in (0.5, 0.0)
    )
    assert np.std(quantized @ asymmetric.T - wanted) < np.std(quantized @ symmetric.T - wanted)


def test_two_sided_descent_follows_the_gradients_of_the_answer(weights, moments):
    random = np.random.default_rng(3)
    gradients = [random.normal(size=(5, len(each))) for each in weights]
    covariances = [each.T @ each / 5 for each in gradients]
    plain, two_sided = (
        calibrated(weights, moments),
        calibrated(weights, moments, output_covariance=covariances.__getitem__),
    )
    assert plain.global_scale == two_sided.global_scale
    for gradient, weight, one, both in zip(gradients, weights, restored(plain), restored(two_sided), strict=True):
        pull = moments.cross - moments.hessian
        wanted = weight + 0.5 * (weight @ pull.T) @ np.linalg.inv(damped(moments.hessian, 0.01))
        losses = [
            np.trace(gradient @ (each - wanted) @ moments.hessian @ (each - wanted).T @ gradient.T)
            for each in (one, both)
        ]
        assert losses[1] < 0.5 * losses[0]


def test_codes_are_legal_where_weights_and_inputs_are_not_ordinary(tokens):
    _, quantized = tokens
    inputs = quantized.copy()
    inputs[:, 16:40] = 0  # dead inputs
    sums = MomentSums(COLUMNS)
    sums.add(inputs)
    random = np.random.default_rng(4)
    odd = random.normal(size=(64, COLUMNS)).astype(np.float32)
    odd[0], odd[:, :16], odd[1, 20], odd[2, 50:60] = 0, 0, 1e4, 1e-30
    result = calibrated([odd], sums.moments())
    (weight,) = result.weights
    assert weight.block_scales.min() >= 1
    assert weight.block_scales.max() <= 126
    (values,) = restored(result)
    assert np.isfinite(values).all()
    assert not values[0].any()
    assert not (weight.packed & 15 == 8).any()  # negative zero
    assert weight.error <= weight.max_error


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_a_weight_that_is_small_beside_the_streams_error_is_not_replaced_by_it(tokens, weights, size):
    original, quantized = tokens
    sums = MomentSums(COLUMNS, drift=ROWS)
    sums.add(quantized, None, (original - quantized) @ np.ones((COLUMNS, ROWS), np.float32))
    given = [weights[0] * np.float32(size)]
    (found,) = restored(calibrated(given, sums.moments(), FAST))
    assert np.linalg.norm(found - given[0]) <= (FARTHEST + 0.12) * np.linalg.norm(given[0])


def test_few_tokens_are_a_warning_that_names_them(tokens, weights):
    sums = MomentSums(COLUMNS)
    sums.add(tokens[1][:100])
    (warning,) = calibrated(weights, sums.moments(), FAST).warnings
    assert "100 tokens for 160 inputs" in warning


def test_inputs_that_are_not_finite_are_refused(tokens, weights, moments):
    broken = tokens[1].copy()
    broken[7, 3] = np.nan
    sums = MomentSums(COLUMNS)
    sums.add(broken)
    with pytest.raises(ModelError, match="NaN or infinite"):
        sums.moments()
    with pytest.raises(ModelError, match="NaN or infinite"):
        calibrated(weights, replace(moments, hessian=moments.hessian * np.inf), FAST)
    with pytest.raises(ModelError, match="NaN or infinite"):
        calibrated([weights[0] * np.float32(np.inf)], moments, FAST)


def test_a_group_without_weights_is_refused(weights, moments):
    with pytest.raises(ModelError, match="no global scale"):
        calibrated([np.zeros_like(weights[0])], replace(moments, cross=None), FAST)


def test_no_tokens_at_all_still_rounds(weights):
    result = calibrated(weights, MomentSums(COLUMNS).moments(), FAST)
    assert "0 tokens" in result.warnings[0]
    assert all(np.isfinite(each).all() for each in restored(result))


def test_the_feedback_factor_is_that_of_the_inverse(moments):
    hessian = damped(moments.hessian, 0.01)
    factor = feedback_factor(hessian)
    assert np.allclose(np.triu(factor), factor)
    assert np.allclose(factor.T @ factor @ hessian, np.eye(COLUMNS), atol=1e-6)
