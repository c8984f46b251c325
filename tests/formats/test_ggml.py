"""ggml's element types, bit for bit against gguf-py."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from qtool.formats import nvfp4
from qtool.formats.floats import FLOAT_FORMATS
from qtool.formats.ggml import BF16, F16, F32, NVFP4, Q8_0, encode_reference, repack_nvfp4_reference
from qtool.formats.ggml_kernels import encode_run, repack_nvfp4

TARGETS = {t.name: t for t in (F32, F16, BF16, Q8_0)}


def theirs(values, target):
    with np.errstate(over="ignore", under="ignore"):
        encoded = quants.quantize(values.reshape(-1, 32), GGMLQuantizationType(target.number))
    return np.ascontiguousarray(encoded).view(np.uint8).reshape(-1)


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
@pytest.mark.parametrize("name", list(FLOAT_FORMATS))
@given(seed=st.integers(0, 1 << 32))
def test_weights_of_any_bits_encode_as_gguf_py_does(name, target, seed):
    element = FLOAT_FORMATS[name]
    random = np.random.default_rng(seed)
    bits = random.integers(0, element.infinity_bits, 256, element.bits_dtype)
    bits |= random.integers(0, 2, 256, element.bits_dtype) << (8 * element.itemsize - 1)
    values = element.widen(bits)
    if target is Q8_0:  # beyond that the scale, or its reciprocal, is no normal float32
        bits[(np.abs(values) > 1e36) | (np.abs(values) < 1e-30)] = 0
    encoded = encode_run(bits, element, target)
    assert np.array_equal(encoded, theirs(element.widen(bits), target))
    with np.errstate(over="ignore"):
        assert np.array_equal(encoded, encode_reference(element.widen(bits), target))


def test_q8_0_rounds_halves_away_from_zero():
    values = np.zeros(32, np.float32)
    values[:5] = [127, 0.5, -0.5, 2.5, -126.5]
    encoded = encode_run(values.view(np.uint32), FLOAT_FORMATS["F32"], Q8_0)
    assert encoded[:2].view("<f2")[0] == 1
    assert encoded[2:7].view(np.int8).tolist() == [127, 1, -1, 3, -127]


@given(st.lists(st.floats(-4, 4, width=32), min_size=32, max_size=32))
def test_q8_0_is_its_reference_on_every_float(values):
    block = np.array(values, np.float32)
    block[np.abs(block) < 1e-30] = 0
    encoded = encode_run(block.view(np.uint32), FLOAT_FORMATS["F32"], Q8_0)
    assert np.array_equal(encoded, encode_reference(block, Q8_0))


def test_a_tail_shorter_than_a_vector_is_narrowed_too():
    values = np.linspace(-3, 3, 37, dtype=np.float32)
    assert np.array_equal(
        encode_run(values.view(np.uint32), FLOAT_FORMATS["F32"], F16), values.astype("<f2").view(np.uint8)
    )


@given(st.integers(0, 1 << 32), st.integers(1, 3))
def test_repacked_nvfp4_decodes_to_the_same_weights(seed, rows):
    random = np.random.default_rng(seed)
    packed = random.integers(0, 256, (rows, 64), np.uint8)
    scales = random.integers(0, 0x7F, (rows, 8), np.uint8)
    decoded = quants.dequantize(repack_nvfp4(packed, scales).reshape(rows, -1), GGMLQuantizationType.NVFP4)
    codes = np.stack((packed & 15, packed >> 4), axis=-1).reshape(rows, 8, 16)
    expected = nvfp4.E2M1_VALUES[codes] * nvfp4.E4M3_VALUES[scales][..., None]
    assert np.array_equal(decoded, expected.reshape(rows, 128))
    assert NVFP4.nbytes(128) == 72
    assert np.array_equal(repack_nvfp4(packed, scales), repack_nvfp4_reference(packed, scales))
