"""The compiled loops that turn weights into ggml's element types, bit for bit as gguf-py and llama.cpp do.

Rule: weights come as raw bits of BF16 or F32 (F16 is widened first) in one flat run of whole blocks.
"""

from __future__ import annotations

from typing import Any, Final, no_type_check

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from qtool.formats.floats import Bits, Float32, FloatFormat
from qtool.formats.ggml import BF16, F16, F32, Q8_0, GgmlType
from qtool.formats.vectors import Emitter, constant

U8 = NDArray[np.uint8]

F16_MAX: Final = np.float32(65504)
_LANES: Final = 16
_FLOATS: Final = ir.VectorType(ir.FloatType(), _LANES)
_compile = numba.njit(nogil=True, cache=True, boundscheck=False)


def encode_run(bits: Bits, element: FloatFormat, target: GgmlType) -> U8:
    """The bytes of the run `bits` [n], stored as `element`, in the type `target` (one of F32, F16, BF16 and Q8_0)."""
    if element.name == target.name:
        return bits.view(np.uint8)
    if target is F16 and element.name == "BF16":
        return _narrowed(bits)
    values = element.widen(bits)
    if target is F32:
        return values.view(np.uint8)
    encoders = {F16: _narrowed, BF16: _rounded_to_bf16, Q8_0: _blocks_of_q8_0}
    return encoders[target](values)


def repack_nvfp4(packed: U8, block_scales: U8) -> U8:
    """ModelOpt's `packed` [rows, columns/2] and E4M3 `block_scales` [rows, columns/16] in ggml's blocks of 64.

    A block is four scales without their sign bit, then four groups of 8 bytes in which byte j holds element j in its
    low nibble and element j + 8 in its high one. No value changes. Source: llama.cpp `ggml-common.h`, `block_nvfp4`.
    """
    groups = block_scales.size
    out = np.empty((groups // 4, 36), np.uint8)
    out[:, :4] = block_scales.reshape(-1, 4) & 0x7F
    _repack(packed.reshape(-1), out.reshape(-1))
    return out.reshape(-1)


def _narrowed(values: Any) -> U8:
    """F16 from BF16 bits or float32 values, rounded to nearest even."""
    out = np.empty(values.size, np.uint16)
    whole = values.size // _LANES * _LANES
    _narrow_run(values.view(f"u{values.itemsize}")[:whole], out[:whole])
    tail = values[whole:]
    if values.itemsize == 2:
        tail = (tail.astype(np.uint32) << 16).view(np.float32)
    out[whole:] = tail.astype(np.float16).view(np.uint16)
    return out.view(np.uint8)


def _rounded_to_bf16(values: Float32) -> U8:
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return rounded.astype(np.uint16).view(np.uint8)


def _blocks_of_q8_0(values: Float32) -> U8:
    out = np.empty(values.size // Q8_0.block * Q8_0.block_bytes, np.uint8)
    _quantize_q8_0(values, out)
    return out


@intrinsic
@no_type_check
def _narrow_block(_typing, bits, start, out):
    """`out[start:start+16]` = `bits[start:start+16]` (BF16, or float32 as its bits) as F16."""

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder)
        words = ir.VectorType(ir.IntType(32), _LANES)
        loaded = emit.load(
            ir.VectorType(ir.IntType(bits.dtype.bitwidth), _LANES),
            emit.pointer(signature.args[0], arguments[0]),
            arguments[1],
        )
        if bits.dtype.bitwidth == 16:
            loaded = builder.shl(builder.zext(loaded, words), constant(words, 16))
        halves = builder.fptrunc(builder.bitcast(loaded, _FLOATS), ir.VectorType(ir.HalfType(), _LANES))
        narrow = builder.bitcast(halves, ir.VectorType(ir.IntType(16), _LANES))
        emit.store(narrow, emit.pointer(signature.args[2], arguments[2]), arguments[1])
        return context.get_dummy_value()

    return types.void(bits, start, out), generate


@_compile
@no_type_check
def _narrow_run(bits, out):
    for start in range(0, bits.size, _LANES):
        _narrow_block(bits, start, out)


@intrinsic
@no_type_check
def _quantize_block(_typing, values, block, out):
    """Q8_0: a scale in F16, then 32 signed bytes, rounded with halves away from zero."""

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder)
        values_at, out_at = (emit.pointer(signature.args[i], arguments[i]) for i in (0, 2))
        starts = [emit.times(arguments[1], 32), builder.add(emit.times(arguments[1], 32), arguments[1].type(_LANES))]
        parts = [emit.load(_FLOATS, values_at, start) for start in starts]
        scale = builder.fdiv(_largest(emit, parts), ir.FloatType()(127))
        is_zero = builder.fcmp_ordered("==", scale, ir.FloatType()(0))
        inverse = builder.select(is_zero, ir.FloatType()(0), builder.fdiv(ir.FloatType()(1), scale))
        place = emit.times(arguments[1], 34)
        emit.store(builder.fptrunc(scale, ir.HalfType()), out_at, place)
        for index, part in enumerate(parts):
            rounded = emit.call("llvm.round.v16f32", _FLOATS, builder.fmul(part, emit.splat(inverse, _LANES)))
            codes = builder.fptosi(rounded, ir.VectorType(ir.IntType(8), _LANES))
            emit.store(codes, out_at, builder.add(place, place.type(2 + index * _LANES)))
        return context.get_dummy_value()

    return types.void(values, block, out), generate


@no_type_check
def _largest(emit, parts):
    magnitudes = [emit.call("llvm.fabs.v16f32", _FLOATS, part) for part in parts]
    return emit.call(
        "llvm.vector.reduce.fmax.v16f32", ir.FloatType(), emit.call("llvm.maxnum.v16f32", _FLOATS, *magnitudes)
    )


@_compile
@no_type_check
def _quantize_q8_0(values, out):
    for block in range(values.size // 32):
        _quantize_block(values, block, out)


@_compile
@no_type_check
def _repack(packed, out):
    for group in range(packed.size // 8):
        target = group // 4 * 36 + 4 + group % 4 * 8
        for j in range(4):
            low, high = packed[group * 8 + j], packed[group * 8 + 4 + j]
            out[target + 2 * j] = (low & 15) | ((high & 15) << 4)
            out[target + 2 * j + 1] = (low >> 4) | (high & 0xF0)
