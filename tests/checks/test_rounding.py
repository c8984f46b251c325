"""Codes of llama.cpp's types: those that it writes are the nearest under the stored scales, and any other is seen."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from qtool.checks.rounding import coded_misfits, misfits
from qtool.formats.ggml import GGML_TYPES
from qtool.storage.gguf_model import decode
from tests.upstream import PROGRAMS

KINDS = {kind.name: kind for kind in GGML_TYPES.values()}
CODED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q4_0", "Q5_0")
SCALES = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210), "IQ4_NL": (0, 2),
          "IQ4_XS": (0, 2), "Q4_0": (0, 2), "Q5_0": (0, 2)}  # fmt: skip
"""Where the F16 scales of a block lie."""
CODE_AT = {
    "Q2_K": 40,
    "Q3_K": 50,
    "Q4_K": 100,
    "Q5_K": 100,
    "Q6_K": 60,
    "IQ4_NL": 9,
    "IQ4_XS": 70,
    "Q4_0": 9,
    "Q5_0": 12,
}
"""A byte of low code bits."""


def random_blocks(kind, seed, count=50):
    """Blocks of any codes under scales of a usual size."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (count, kind.block_bytes), np.uint8)
    first, last = SCALES[kind.name]
    scales = random.uniform(1e-3, 1e-2, (count, (last - first) // 2)).astype(np.float16)
    blocks[:, first:last] = scales.view(np.uint8)
    return blocks


def values_of(blocks, kind):
    return decode(blocks.reshape(1, -1), kind).reshape(-1)


@pytest.mark.parametrize("name", CODED)
def test_any_codes_are_right_for_the_values_that_they_stand_for(name):
    kind = KINDS[name]
    blocks = random_blocks(kind, 1)
    found = values_of(blocks, kind)
    assert coded_misfits(kind, blocks, found, found).values == 0


@pytest.mark.parametrize("name", CODED)
def test_another_code_is_seen(name):
    kind = KINDS[name]
    blocks = random_blocks(kind, 2)
    expected = values_of(blocks, kind)
    blocks[7, CODE_AT[name]] ^= 0x02 if kind.block == 256 and name != "IQ4_XS" else 0x04
    found = values_of(blocks, kind)
    assert (found != expected).any()
    assert coded_misfits(kind, blocks, expected, found).values > 0


@pytest.mark.parametrize("name", ["IQ2_XS", "IQ3_S", "TQ2_0", "MXFP4", "Q4_1", "Q5_1"])
def test_types_without_a_rule_are_not_judged_by_one(name):
    kind = KINDS[name]
    stored = np.zeros((1, kind.block_bytes), np.uint8)
    found = np.zeros(kind.block, np.float32)
    assert coded_misfits(kind, stored, found + 1, found).values == 0


def bf16(values):
    return ((values.astype(np.float32).view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32)


WEIGHTS = {
    "normal": lambda random: random.normal(0, 0.02, (64, 1024)),
    "heavy tails": lambda random: random.normal(0, 1, (64, 1024)) ** 3 * 0.01,
    "tiny": lambda random: random.normal(0, 1e-4, (64, 1024)),
    "mostly zeros": lambda random: random.normal(0, 0.05, (64, 1024)) * (random.random((64, 1024)) < 0.1),
    "rows of all sizes": lambda random: random.normal(0, 1, (64, 1024)) * 10.0 ** random.uniform(-5, 0, (64, 1)),
}


@pytest.mark.engines
class TestLlamaCpp:
    """ggml's own quantizer, with and without importances."""

    @pytest.mark.parametrize("name", [*CODED, "Q8_0"])
    @pytest.mark.parametrize("weights", WEIGHTS)
    @pytest.mark.parametrize("importance", [None, 0, 5])
    def test_what_llama_cpp_writes_alarms_nobody(self, name, weights, importance):
        random = np.random.default_rng(3)
        values = bf16(WEIGHTS[weights](random))
        columns = None if importance is None else (10.0 ** random.uniform(-importance, 0, 1024)).astype(np.float32)
        stored = quantized(KINDS[name], values, columns)
        assert strays(KINDS[name], stored, values) == 0

    @pytest.mark.parametrize("name", [*CODED, "Q8_0"])
    def test_half_a_percent_of_noise_is_seen(self, name):
        random = np.random.default_rng(4)
        values = bf16(WEIGHTS["normal"](random))
        noise = (1 + 0.005 * random.normal(size=values.shape)).astype(np.float32)
        assert strays(KINDS[name], quantized(KINDS[name], values * noise, None), values) > 10


def quantized(kind, values, columns):
    """The blocks that llama.cpp writes."""
    library = PROGRAMS / "libggml-base.so"
    if not library.exists():
        library = PROGRAMS.parent / "build/bin/libggml-base.so"
    if not library.exists():
        pytest.skip("no libggml-base.so in .engines: run `make engines`")
    base = ctypes.CDLL(str(library))
    base.ggml_quantize_init(kind.number)
    chunk = base.ggml_quantize_chunk
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *3 * [ctypes.c_int64], ctypes.c_void_p]
    stored = np.empty(kind.nbytes(values.size), np.uint8)
    values = np.ascontiguousarray(values)
    guide = None if columns is None else columns.ctypes.data
    chunk(kind.number, values.ctypes.data, stored.ctypes.data, 0, *values.shape, guide)
    return stored.reshape(-1, kind.block_bytes)


def strays(kind, stored, values):
    expected, found = values.reshape(-1), values_of(stored, kind)
    if kind.name == "Q8_0":
        return misfits("Q8_0", "BF16", expected, found).values
    return coded_misfits(kind, stored, expected, found).values
