"""The number format against literal tables, torch and ModelOpt, and the compiled kernels against their references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from qtool.formats import nvfp4, nvfp4_kernels
from qtool.formats.floats import FLOAT_FORMATS

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def encode(bits, name):
    """Encode a weight [rows, columns] of raw bits as one group; (packed, block scales, global scale, sums)."""
    element = FLOAT_FORMATS[name]
    flat = np.ascontiguousarray(bits).reshape(-1)
    largest = nvfp4_kernels.largest_magnitude(flat, element)
    scale = nvfp4.global_scale(element.widen(np.array([largest], element.bits_dtype))[0])
    packed, scales = np.empty(flat.size // 2, np.uint8), np.empty(flat.size // 16, np.uint8)
    sums = nvfp4_kernels.encode(flat, nvfp4.encode_tables(scale, element), packed, scales)
    rows, columns = bits.shape
    return packed.reshape(rows, columns // 2), scales.reshape(rows, columns // 16), scale, sums


def bits_of(tensor):
    return tensor.contiguous().view({2: torch.uint16, 4: torch.uint32}[tensor.element_size()]).numpy()


def modelopt(tensor):
    quantized, scales, scale = NVFP4QTensor.quantize(tensor.clone(), 16)
    return quantized._quantized_data.numpy(), scales.view(torch.uint8).numpy(), scale.numpy()


def assert_same_as_modelopt(tensor, name):
    packed, scales, scale, _ = encode(bits_of(tensor), name)
    expected_packed, expected_scales, expected_scale = modelopt(tensor)
    assert np.array_equal(scale, expected_scale)
    assert np.array_equal(scales, expected_scales)
    assert np.array_equal(packed, expected_packed)


def test_the_16_codes_of_e2m1():
    table = [
        (0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0), (5, 3.0), (6, 4.0), (7, 6.0),
        (8, -0.0), (9, -0.5), (10, -1.0), (11, -1.5), (12, -2.0), (13, -3.0), (14, -4.0), (15, -6.0),
    ]  # fmt: skip
    for code, value in table:
        packed, one = (
            np.full((1, 8), code | code << 4, np.uint8),
            np.full((1, 1), 0x38, np.uint8),
        )  # 0x38 is an E4M3 of 1
        decoded = nvfp4_kernels.dequantize(packed, one, np.float32(1))
        assert decoded.tolist() == [[value] * 16]
        assert np.signbit(decoded).all() == (code >= 8)


def test_e4m3_values_are_torchs():
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(nvfp4.E4M3_VALUES, expected, equal_nan=True)
    assert np.array_equal(np.signbit(nvfp4.E4M3_VALUES), np.signbit(expected))


def test_e4m3_rounding_is_torchs_on_every_midpoint_and_its_neighbours():
    middles = ((nvfp4.E4M3_VALUES[:0x7E] + nvfp4.E4M3_VALUES[1:0x7F]) / 2).astype(np.float32)
    values = np.concatenate([middles, np.nextafter(middles, 0), np.nextafter(middles, 1e9), nvfp4.E4M3_VALUES[:0x7F]])
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(nvfp4.encode_e4m3(values), expected)


@pytest.mark.parametrize("name", list(FLOAT_FORMATS))
@pytest.mark.parametrize("spread", [1e-30, 1e-4, 0.02, 300.0])
def test_normal_weights_encode_to_modelopts_bytes(name, spread):
    if name == "F16" and spread == 1e-30:
        spread = 1e-6  # below that float16 has only zeros
    tensor = (torch.randn(96, 256, generator=torch.Generator().manual_seed(1)) * spread).to(TORCH[name])
    assert_same_as_modelopt(tensor, name)


@pytest.mark.parametrize("name", list(FLOAT_FORMATS))
def test_every_tie_goes_modelopts_way(name):
    # Global scale 1 and block scale 1: the quotients are the weights themselves, on each midpoint exactly.
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    block = torch.cat([ties, -ties])
    tensor = torch.stack([block, torch.full((16,), 2688.0)]).to(TORCH[name])
    packed, _, scale, _ = encode(bits_of(tensor), name)
    assert scale == 1
    assert_same_as_modelopt(tensor, name)
    codes = np.stack((packed & 15, packed >> 4), -1).reshape(2, 16)[0]
    assert codes.tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 8, 10, 10, 12, 12, 14, 14, 15]


@pytest.mark.parametrize("name", list(FLOAT_FORMATS))
def test_zero_blocks_negative_zeros_denormals_and_extremes(name):
    limits = torch.finfo(TORCH[name])
    tensor = torch.randn(8, 64, generator=torch.Generator().manual_seed(2)).to(TORCH[name])
    tensor[0, :16] = 0
    tensor[1, :16] = -0.0
    tensor[2, :16] = limits.smallest_normal / 4
    tensor[3, :16] = -limits.smallest_normal / 4
    tensor[4, 0], tensor[4, 1] = limits.max, limits.min
    assert_same_as_modelopt(tensor, name)


@settings(max_examples=200)
@given(data=st.data(), name=st.sampled_from(list(FLOAT_FORMATS)), blocks=st.integers(1, 6))
def test_any_finite_bits_encode_to_modelopts_bytes(data, name, blocks):
    element = FLOAT_FORMATS[name]
    top = element.infinity_bits - 1
    sign = 1 << (8 * element.itemsize - 1)
    magnitudes = st.integers(0, top) | st.sampled_from([0, 1, top, top // 2])
    words = data.draw(st.lists(st.tuples(magnitudes, st.booleans()), min_size=16 * blocks, max_size=16 * blocks))
    bits = np.array([m | sign * s for m, s in words], element.bits_dtype).reshape(1, -1)
    amax = element.widen(np.array([int((bits & element.magnitude_mask).max())], element.bits_dtype))[0]
    if nvfp4.is_usable_scale(nvfp4.global_scale(amax)):
        tensor = torch.from_numpy(bits.view(np.int16 if element.itemsize == 2 else np.int32)).view(TORCH[name])
        with np.errstate(all="ignore"):
            assert_same_as_modelopt(tensor, name)


def test_an_all_zero_group_has_no_usable_scale():
    assert not nvfp4.is_usable_scale(nvfp4.global_scale(np.float32(0)))
    assert not nvfp4.is_usable_scale(nvfp4.global_scale(np.float32(1e-44)))
    assert nvfp4.is_usable_scale(nvfp4.global_scale(np.float32(1e-30)))


@pytest.mark.parametrize("name", list(FLOAT_FORMATS))
def test_the_measured_error_is_that_of_the_dequantized_weights(name):
    tensor = (torch.randn(70, 480, generator=torch.Generator().manual_seed(3)) * 0.02).to(
        TORCH[name]
    )  # spans two tiles
    packed, scales, scale, (error, power) = encode(bits_of(tensor), name)
    restored = nvfp4_kernels.dequantize(packed, scales, scale).astype(np.float64)
    weights = tensor.double().numpy()
    assert error == pytest.approx(((weights - restored) ** 2).sum(), rel=1e-4)
    assert power == pytest.approx((weights**2).sum(), rel=1e-4)


def test_dequantization_is_modelopts():
    tensor = torch.randn(32, 64, generator=torch.Generator().manual_seed(4))
    quantized, scales, scale = NVFP4QTensor.quantize(tensor.clone(), 16)
    expected = quantized.dequantize(dtype=torch.float32, scale=scales, double_scale=scale, block_sizes={-1: 16})
    restored = nvfp4_kernels.dequantize(
        quantized._quantized_data.numpy(), scales.view(torch.uint8).numpy(), scale.numpy()
    )
    assert np.array_equal(restored, expected.numpy())


def test_nonfinite_weights_are_counted():
    for name, element in FLOAT_FORMATS.items():
        bits = bits_of(torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 0.0]).to(TORCH[name]))
        assert element.count_nonfinite(bits) == 3
        assert nvfp4_kernels.largest_magnitude(bits, element) >= element.infinity_bits


# The kernels compute what their NumPy references say, bit for bit. Blocks are drawn with ties, zeros and both signs; a
# run longer than BLOCKS_SUMMED shows the order in which errors are summed.

ELEMENTS = st.sampled_from(list(FLOAT_FORMATS.values()))


def random_bits(seed, element, blocks):
    """Finite bits of weights that spread over some powers of two, some of them zero or on a tie."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(blocks * 16) * 2.0 ** random.integers(-6, 6, blocks * 16)
    values[random.random(values.size) < 0.1] = 0
    is_tie = random.random(values.size) < 0.3
    values[is_tie] = random.choice([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.0], is_tie.sum())
    if element.name == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype({"F16": np.float16, "F32": np.float32}[element.name]).view(element.bits_dtype)


@given(seed=st.integers(0, 1 << 32), element=ELEMENTS, blocks=st.integers(1, 40), is_broken=st.booleans())
def test_the_largest_magnitude_is_its_reference(seed, element, blocks, is_broken):
    bits = random_bits(seed, element, blocks)
    bits[seed % bits.size] = element.infinity_bits + is_broken if seed % 2 else bits[seed % bits.size]
    assert nvfp4_kernels.largest_magnitude(bits, element) == nvfp4.largest_magnitude_reference(bits, element)


@given(
    seed=st.integers(0, 1 << 32), element=ELEMENTS, blocks=st.integers(1, 2500), scale=st.floats(2**-20, 1024, width=32)
)
def test_encoding_and_its_errors_are_their_references(seed, element, blocks, scale):
    bits, scale = random_bits(seed, element, blocks), np.float32(scale)
    packed, scales = np.empty(bits.size // 2, np.uint8), np.empty(bits.size // 16, np.uint8)
    sums = nvfp4_kernels.encode(bits, nvfp4.encode_tables(scale, element), packed, scales)
    weights = element.widen(bits)
    expected_packed, expected_scales = nvfp4.encode_reference(weights, scale)
    assert np.array_equal(scales, expected_scales)
    assert np.array_equal(packed, expected_packed)
    restored = nvfp4.dequantize_reference(packed, scales, scale)
    assert sums == nvfp4.squared_sums_reference(weights.reshape(-1, 16), restored, nvfp4_kernels.BLOCKS_SUMMED)


@given(seed=st.integers(0, 1 << 32), blocks=st.integers(1, 40), scale=st.floats(0, float("inf"), width=32))
def test_dequantization_is_its_reference_for_any_bytes(seed, blocks, scale):
    random = np.random.default_rng(seed)
    packed, scales = random.integers(0, 256, blocks * 8, np.uint8), random.integers(0, 256, blocks, np.uint8)
    with np.errstate(all="ignore"):
        found = nvfp4_kernels.dequantize(packed.reshape(1, -1), scales.reshape(1, -1), np.float32(scale))
        expected = nvfp4.dequantize_reference(packed, scales, np.float32(scale))
    assert np.array_equal(found.reshape(-1, 16), expected, equal_nan=True)


@given(
    seed=st.integers(0, 1 << 32),
    blocks=st.integers(1, 60),
    scale=st.sampled_from([1.0, 0.01, 3.7, 0.0, float("nan"), float("inf")]),
    damage=st.floats(0, 1),
)
def test_blocks_are_judged_as_the_reference_does(seed, blocks, scale, damage):
    random, scale = np.random.default_rng(seed), np.float32(scale)
    values = FLOAT_FORMATS["F32"].widen(random_bits(seed, FLOAT_FORMATS["F32"], blocks))
    values[:16] = 0
    packed, scales = nvfp4.encode_reference(values, np.float32(scale if 0 < scale < 10 else 1))
    is_hit = random.random(packed.size) < damage / 8
    packed[is_hit] = random.integers(0, 256, is_hit.sum(), np.uint8)
    is_hit = random.random(scales.size) < damage
    scales[is_hit] += random.integers(0, 256, is_hit.sum(), np.uint8) >> np.uint8(random.integers(0, 8))
    found = nvfp4_kernels.judge_blocks(values, packed, scales, scale)
    assert found == nvfp4.judge_blocks_reference(values, packed, scales, scale)


def test_what_rounding_to_nearest_makes_is_right():
    values = FLOAT_FORMATS["F32"].widen(random_bits(5, FLOAT_FORMATS["F32"], 3000))
    scale = nvfp4.global_scale(np.abs(values).max())
    assert nvfp4.judge_blocks_reference(values, *nvfp4.encode_reference(values, scale), scale) == (0, 0, 0)


@pytest.mark.parametrize("tails", [1, 3])
def test_scales_with_the_least_error_are_taken_for_a_search(tails):
    values = (np.random.default_rng(tails).normal(size=(4000, 16)) ** tails * 0.01).astype(np.float32)
    scale = nvfp4.global_scale(np.abs(values).max())
    best, error = np.zeros((4000, 16), np.uint8), np.full(4000, np.inf)
    chosen = np.zeros(4000, np.uint8)
    for code in range(1, 127):
        quotients = values / (nvfp4.E4M3_VALUES[code] * scale)
        codes = np.abs(np.abs(quotients)[..., None] - nvfp4.E2M1_VALUES[:8]).argmin(axis=-1)
        codes += np.where(quotients < 0, 8, 0)
        lost = ((nvfp4.E2M1_VALUES[codes] - quotients) ** 2).sum(axis=1) * float(nvfp4.E4M3_VALUES[code]) ** 2
        is_better = lost < error
        best[is_better], error[is_better], chosen[is_better] = codes[is_better], lost[is_better], code
    packed = (best[:, ::2] | best[:, 1::2] << 4).reshape(-1)
    counts = nvfp4.judge_blocks_reference(values.reshape(-1), packed, chosen, scale)
    assert (counts.blocks, counts.codes) == (0, 0)
    assert counts.searched > 500
