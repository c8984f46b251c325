"""The rounding's steps as torch, on the CPU here, against the compiled loops: the same codes but for ties."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from qtool.calibration.group import STANDARD, calibrate_group
from qtool.calibration.hessian import damped, feedback_factor
from qtool.calibration.loops import CompiledLoops
from qtool.calibration.moments import MomentSums, single_threaded_blas
from qtool.calibration.on_torch import TorchLoops, TorchSums
from qtool.errors import ModelError
from qtool.formats.floats import E4M3_VALUES
from qtool.formats.nvfp4 import global_scale

CPU = torch.device("cpu")
ROWS, COLUMNS = 96, 272  # a batch does not divide them


@pytest.fixture(scope="module")
def problem():
    random = np.random.default_rng(5)
    mixing = random.normal(size=(COLUMNS, COLUMNS)) * np.exp(-np.arange(COLUMNS) / 20)[:, None]
    original = (random.normal(size=(2500, COLUMNS)) @ mixing).astype(np.float32)
    quantized = original + 0.05 * random.normal(size=original.shape).astype(np.float32)
    weights = random.standard_t(4, size=(ROWS, COLUMNS)).astype(np.float32) * np.float32(0.02)
    weights[3], weights[:, 32:48] = 0, 0
    return original, quantized, weights


@pytest.fixture
def compiled():
    with ThreadPoolExecutor(2) as pool, single_threaded_blas():
        yield CompiledLoops(pool)


def test_sums_are_equal_up_to_rounding(problem):
    original, quantized, weights = problem
    counts = np.random.default_rng(6).uniform(0, 2, len(original)).astype(np.float32)
    ours, theirs = MomentSums(COLUMNS, cross=True, drift=ROWS), TorchSums(COLUMNS, cross=True, drift=ROWS, device=CPU)
    lack = (original - quantized) @ weights.T
    for part in np.array_split(np.arange(len(original)), 3):
        given = quantized[part], original[part], lack[part]
        ours.add(*given, counts[part])
        theirs.add(*map(torch.from_numpy, given), counts[part])
    for name in ("hessian", "mean", "cross", "drift"):
        mine, other = getattr(ours.moments(), name), getattr(theirs.moments(), name)
        np.testing.assert_allclose(other, mine, rtol=1e-5, atol=1e-6 * np.abs(mine).max())


def test_factor_target_and_losses_are_equal_up_to_rounding(problem, compiled):
    original, quantized, weights = problem
    hessian = damped((quantized.T @ quantized).astype(np.float64) / len(quantized), 0.01)
    loops, factor = TorchLoops(CPU), feedback_factor(hessian)
    np.testing.assert_allclose(loops.factor(hessian), factor, rtol=1e-9, atol=1e-9 * np.abs(factor).max())
    pull, drift = (quantized.T @ original).astype(np.float64), (original.T @ original[:, :ROWS]).astype(np.float64)
    for given in ((pull, None), (None, drift), (pull, drift)):
        expected = compiled.solve(weights, *given, factor)
        np.testing.assert_allclose(loops.solve(weights, *given, factor), expected, rtol=1e-9, atol=1e-9)
    scales = (global_scale(np.abs(weights).max()) * 2 ** (np.arange(8) / 8)).astype(np.float32)
    importance = hessian.diagonal().astype(np.float32)
    expected = compiled.phase_losses(weights, importance, scales)
    np.testing.assert_allclose(loops.phase_losses(weights, importance, scales), expected, rtol=1e-6)
    with pytest.raises(ModelError, match="not positive definite"):
        loops.factor(-hessian)


@pytest.mark.parametrize(("passes", "most"), [(0, 0.002), (2, 0.005)])
def test_codes_differ_in_counted_ties_only(passes, most, problem, compiled):
    """Sums in another order move a weight by a part in ten million; where it lay between two codes its row goes another way."""
    _, quantized, weights = problem
    hessian = damped((quantized.T @ quantized).astype(np.float64) / len(quantized), 0.01)
    matrix, feedback = hessian.astype(np.float32), feedback_factor(hessian).astype(np.float32)
    scale = global_scale(np.abs(weights).max())
    codes, scales = compiled.round(weights, matrix, feedback, scale, passes)
    found, found_scales = TorchLoops(CPU).round(weights, matrix, feedback, scale, passes)
    assert np.mean(codes != found) <= most
    assert np.mean(scales != found_scales) <= most


def test_two_sided_descent_differs_in_counted_ties_only(problem, compiled):
    _, quantized, weights = problem
    hessian = damped((quantized.T @ quantized).astype(np.float64) / len(quantized), 0.01)
    gradients = np.random.default_rng(7).normal(size=(40, ROWS))
    covariance = damped(gradients.T @ gradients / 40, 0.01).astype(np.float32)
    scale, feedback = global_scale(np.abs(weights).max()), feedback_factor(hessian).astype(np.float32)
    begun = compiled.round(weights, hessian.astype(np.float32), feedback, scale, 0)
    results = []
    for loops in (compiled, TorchLoops(CPU)):
        codes, scales = (each.copy() for each in begun)
        loops.descend_two_sided(codes, scales, weights, hessian.astype(np.float32), covariance, scale, 2)
        results.append((codes, scales))
    (codes, scales), (found, found_scales) = results
    assert np.mean(codes != begun[0]) > 0.05
    assert np.mean(codes != found) <= 0.005
    assert np.mean(scales != found_scales) <= 0.005


def test_a_group_is_rounded_alike(problem):
    original, quantized, weights = problem
    sums = MomentSums(COLUMNS, cross=True)
    sums.add(quantized, original)
    with ThreadPoolExecutor(2) as pool, single_threaded_blas():
        one = calibrate_group([weights, weights[:32]], sums.moments(), STANDARD, pool=pool)
        other = calibrate_group([weights, weights[:32]], sums.moments(), STANDARD, pool=pool, loops=TorchLoops(CPU))
    assert one.global_scale == other.global_scale
    for mine, theirs in zip(one.weights, other.weights, strict=True):
        assert np.mean(mine.packed != theirs.packed) <= 0.01
        assert theirs.error == pytest.approx(mine.error, rel=0.01)


def test_scales_halfway_between_two_go_to_the_even_one():
    halfway = (E4M3_VALUES[1:0x7E] + E4M3_VALUES[2:0x7F]) / 2
    found = TorchLoops(CPU)._nearest_scales(torch.from_numpy(halfway.astype(np.float32)))
    assert all(code % 2 == 0 for code in found.tolist())
