"""The number format against literal tables, torch and ModelOpt."""

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
        packed, one = np.full((1, 8), code | code << 4, np.uint8), np.full((1, 1), nvfp4.E4M3_ONE, np.uint8)
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
