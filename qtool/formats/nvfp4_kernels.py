"""The compiled loops of NVFP4: encoding, decoding, and checking whether blocks are rounded correctly.

What they compute is specified by the references in `nvfp4`. A weight is one flat run of blocks: blocks of 16 never span
rows, so no loop needs the shape. All loops run without the GIL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, no_type_check

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qtool.formats.floats import E4M3_VALUES, FLOAT_FORMATS, U8, Bits, Float32, FloatFormat
from qtool.formats.llvm import Emitter, constant
from qtool.formats.nvfp4 import (
    BLOCK,
    E2M1_VALUES,
    NEAREST_FROM,
    NEAREST_TO,
    SEARCHED_FROM,
    SEARCHED_TO,
    BlockCounts,
    EncodeTables,
    block_scale_codes,
)

# One block as vector instructions: 16 weights in, 8 bytes and 16 running sums out, all in registers. A code is the
# number of thresholds that a magnitude reaches; nothing is divided or rounded.

_LANES: Final = 16
_FLOATS: Final = ir.VectorType(ir.FloatType(), _LANES)
_WORDS: Final = ir.VectorType(ir.IntType(32), _LANES)


@intrinsic
@no_type_check
def block_maximum(_typing, bits, start, mask):
    """The largest `bits[start:start+16] & mask`."""

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder)
        vector = ir.VectorType(arguments[2].type, _LANES)
        words = emit.load(vector, emit.pointer(signature.args[0], arguments[0]), arguments[1])
        magnitudes = builder.and_(words, emit.splat(arguments[2], _LANES))
        name = f"llvm.vector.reduce.umax.v{_LANES}i{bits.dtype.bitwidth}"
        return emit.call(name, arguments[2].type, magnitudes)

    return bits.dtype(bits, start, mask), generate


@intrinsic
@no_type_check
def encode_blocks(_typing, bits, scales, thresholds, half_factors, packed, sums):
    """Encode `bits` [n * 16] into `packed` [n * 8] under the block scale codes `scales` [n].

    `thresholds` [127, 8, 16] are those of EncodeTables; `half_factors` [256] is half of each block scale times the
    global scale. `sums` [2, 16] receive the sums of squared errors and squared weights of each lane.
    """

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder)
        bits_at, scales_at, thresholds_at, factors_at, packed_at, sums_at = (
            emit.pointer(*pair) for pair in zip(signature.args, arguments, strict=True)
        )
        totals = [cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [0.0] * _LANES)) for _ in range(2)]
        count = emit.length(signature.args[1], arguments[1])
        vector = ir.VectorType(ir.IntType(bits.dtype.bitwidth), _LANES)
        with cgutils.for_range(builder, count) as loop:
            scale = builder.zext(emit.scalar(scales_at, loop.index), loop.index.type)
            block = _Block(emit, emit.load(vector, bits_at, emit.times(loop.index, _LANES)))
            row = emit.times(scale, 8 * _LANES)
            bounds = [emit.load(vector, thresholds_at, builder.add(row, row.type(i * _LANES))) for i in range(8)]
            codes = block.codes(bounds[:7])
            emit.store(block.packed(codes, bounds[7]), packed_at, emit.times(loop.index, _LANES // 2))
            factor = emit.splat(emit.scalar(factors_at, scale), _LANES)
            for total, square in zip(totals, block.squares(codes, factor), strict=True):
                builder.store(builder.fadd(builder.load(total), square), total)
        for row, total in enumerate(totals):
            emit.store(builder.load(total), sums_at, ir.IntType(64)(row * _LANES))
        return context.get_dummy_value()

    return types.void(bits, scales, thresholds, half_factors, packed, sums), generate


class _Block:
    def __init__(self, emit: Emitter, words: Any) -> None:
        self._emit, self._builder = emit, emit.builder
        self._words, self.vector = words, words.type
        self._width = words.type.element.width
        self._magnitudes = self._builder.and_(words, constant(self.vector, (1 << (self._width - 1)) - 1))

    def codes(self, bounds: list[Any]) -> Any:
        """The 3-bit codes, without the sign."""
        codes = constant(self.vector, 0)
        for code, bound in enumerate(bounds, 1):
            reached = self._builder.icmp_unsigned(">=", self._magnitudes, bound)
            codes = self._builder.select(reached, constant(self.vector, code), codes)
        return codes

    def _doubled(self, codes: Any) -> Any:
        """Twice the magnitudes: 0, 1, 2, 3, 4, 6, 8, 12 for the codes 0 to 7."""
        beyond_4, beyond_6 = self._beyond(codes, 4), self._beyond(codes, 6)
        return self._builder.add(codes, self._builder.add(beyond_4, self._builder.add(beyond_6, beyond_6)))

    def _beyond(self, codes: Any, limit: int) -> Any:
        name = f"llvm.usub.sat.v{_LANES}i{self._width}"
        return self._emit.call(name, self.vector, codes, constant(self.vector, limit))

    def packed(self, codes: Any, sign_from: Any) -> Any:
        """Signed codes, two in a byte; the even element takes the low nibble."""
        sign = self._builder.and_(
            self._builder.lshr(self._words, constant(self.vector, self._width - 4)), constant(self.vector, 8)
        )
        keeps_sign = self._builder.icmp_unsigned(">=", self._magnitudes, sign_from)
        nibbles = self._builder.or_(codes, self._builder.select(keeps_sign, sign, constant(self.vector, 0)))
        pairs = ir.VectorType(ir.IntType(2 * self._width), _LANES // 2)
        both = self._builder.bitcast(nibbles, pairs)  # little-endian: the even element is the lower half
        high = self._builder.lshr(both, constant(pairs, self._width - 4))
        return self._builder.trunc(self._builder.or_(both, high), ir.VectorType(ir.IntType(8), _LANES // 2))

    def squares(self, codes: Any, half_factors: Any) -> tuple[Any, Any]:
        """(weight - dequantized weight) squared, and weight squared."""
        values = self._values()
        restored = self._builder.fmul(self._builder.uitofp(self._doubled(codes), _FLOATS), half_factors)
        error = self._builder.fsub(values, restored)
        return self._builder.fmul(error, error), self._builder.fmul(values, values)

    def _values(self) -> Any:
        """The magnitudes as float32: BF16 is its upper half."""
        words = self._magnitudes
        if self._width == 16:
            words = self._builder.shl(self._builder.zext(words, _WORDS), constant(_WORDS, 16))
        return self._builder.bitcast(words, _FLOATS)


# Runs of blocks.

BLOCKS_SUMMED: Final = 1 << 10
"""Blocks whose squared errors are summed in float32 before they are added to a float64."""

_compile = numba.njit(nogil=True, cache=True, boundscheck=False)


def largest_magnitude(bits: Bits, element: FloatFormat) -> int:
    """The bits of the largest magnitude in `bits` [n]; at least `element.infinity_bits` if any is NaN or infinite."""
    return int(_largest(bits, bits.dtype.type(element.magnitude_mask)))


def encode(
    bits: Bits, tables: EncodeTables, packed: U8, block_scales: U8, search: Callable[[Float32, U8], None] | None = None
) -> tuple[float, float]:
    """Encode the run `bits` [n] into `packed` [n/2] and `block_scales` [n/16].

    `search` writes the block-scale codes of weights; without it, each is that of the block's largest magnitude.
    Returns the sums over the run of (weight - dequantized weight) squared and of weight squared.
    """
    element = tables.element
    if bits.dtype != element.bits_dtype:
        bits = FLOAT_FORMATS["F16"].widen(bits).view(element.bits_dtype)
    if search is not None:
        search(element.widen(bits), block_scales)
    else:
        maxima = np.empty(block_scales.size, bits.dtype)
        _block_maxima(bits, bits.dtype.type(element.magnitude_mask), maxima)
        if tables.scale_codes.size:
            _look_up(tables.scale_codes, maxima, block_scales)
        else:
            block_scales[:] = block_scale_codes(element.widen(maxima), tables.scale)
    half_factors = E4M3_VALUES * tables.scale * np.float32(0.5)
    error, power = _encode_run(bits, block_scales, tables.thresholds, half_factors, packed)
    return float(error), float(power)


def dequantize(packed: U8, block_scales: U8, scale: np.float32) -> Float32:
    """The float32 weights [out, in] of `packed` [out, in/2] under E4M3 `block_scales` [out, in/16]."""
    weights = np.empty((packed.shape[0], packed.shape[1] * 2), np.float32)
    factors = E4M3_VALUES * np.float32(scale)
    _decode_run(np.ascontiguousarray(packed).reshape(-1), block_scales.reshape(-1), factors, weights.reshape(-1))
    return weights


@_compile
@no_type_check
def _largest(bits, mask):
    largest = mask ^ mask
    for i in range(bits.size):
        magnitude = bits[i] & mask
        largest = max(largest, magnitude)
    return largest


@_compile
@no_type_check
def _block_maxima(bits, mask, maxima):
    for b in range(maxima.size):
        maxima[b] = block_maximum(bits, b * 16, mask)


@_compile
@no_type_check
def _look_up(scale_codes, maxima, scales):
    for b in range(maxima.size):
        scales[b] = scale_codes[np.uint32(maxima[b])]


@_compile
@no_type_check
def _encode_run(bits, scales, thresholds, half_factors, packed):
    sums = np.empty((2, 16), np.float32)
    error = power = 0.0
    for first in range(0, scales.size, BLOCKS_SUMMED):
        last = min(first + BLOCKS_SUMMED, scales.size)
        run, into = bits[first * 16 : last * 16], packed[first * 8 : last * 8]
        encode_blocks(run, scales[first:last], thresholds, half_factors, into, sums)
        error += sums[0].sum()
        power += sums[1].sum()
    return error, power


@_compile
@no_type_check
def _decode_run(packed, scales, factors, weights):
    for i in range(packed.size):
        factor = factors[scales[i // 8]]
        weights[2 * i] = E2M1_VALUES[packed[i] & 15] * factor
        weights[2 * i + 1] = E2M1_VALUES[packed[i] >> 4] * factor


# Checking that blocks are rounded to nearest.


def judge_blocks(values: Float32, packed: U8, block_scales: U8, scale: np.float32) -> BlockCounts:
    """How the blocks of `values` [n] were rounded to `packed` [n/2] and `block_scales` [n/16] under `scale`."""
    maxima = np.abs(values.reshape(-1, BLOCK)).max(axis=1)
    if not (np.isfinite(scale) and scale > 0):
        return BlockCounts(int(maxima.size), int(values.size), 0)
    ideal = block_scale_codes(maxima, scale)
    factors = E4M3_VALUES * np.float32(scale)
    return BlockCounts(*(int(each) for each in _count(values, packed, block_scales, maxima, ideal, factors)))


@numba.njit(nogil=True, cache=True, error_model="numpy")  # a block scale may be zero
@no_type_check
def _count(values, packed, block_scales, maxima, ideal, factors):
    bad_blocks = bad_codes = searched_blocks = 0
    for block in range(maxima.size):
        code = np.int64(block_scales[block])
        factor = factors[code]
        ratio = maxima[block] / factor
        is_near = abs(code - np.int64(ideal[block])) <= 1
        is_searched = not is_near and SEARCHED_FROM <= ratio <= SEARCHED_TO
        is_scale_bad = code > 126 or not (is_near or is_searched)
        wrong = 0
        for index in range(block * 16, block * 16 + 16):
            nibble = np.int64(packed[index // 2]) >> 4 * (index % 2) & 15
            magnitude = nibble & 7
            if maxima[block] == 0:
                wrong += magnitude != 0
            elif is_scale_bad:
                wrong += 1
            elif code != 0:
                quotient = abs(values[index]) / factor
                is_nearest = NEAREST_FROM[magnitude] <= quotient <= NEAREST_TO[magnitude]
                wrong += not is_nearest or (magnitude != 0 and (values[index] < 0) != (nibble > 7))
        bad_codes += wrong
        bad_blocks += wrong > 0
        searched_blocks += is_searched and maxima[block] > 0 and wrong == 0
    return bad_blocks, bad_codes, searched_blocks
