"""The compiled loops that encode weights in ggml's element types, bit for bit as gguf-py and llama.cpp do.

Weights are raw bits of BF16 or F32 (F16 is widened first) in one flat run of whole blocks.
"""

from __future__ import annotations

from typing import Final, no_type_check

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qtool.formats.floats import FLOAT_FORMATS, U8, Bits, FloatFormat
from qtool.formats.ggml import BF16, F16, F32, Q8_0, GgmlType
from qtool.formats.llvm import Emitter, constant

F16_MAX: Final = np.float32(65504)
_LANES: Final = 16
_FLOATS: Final = ir.VectorType(ir.FloatType(), _LANES)
_WORDS: Final = ir.VectorType(ir.IntType(32), _LANES)
_compile = numba.njit(nogil=True, cache=True, boundscheck=False)


def encode_run(bits: Bits, element: FloatFormat, target: GgmlType) -> U8:
    """The bytes of the run `bits` [n], stored as `element`, in the type `target` (one of F32, F16, BF16 and Q8_0)."""
    if element.name == target.name:
        return bits.view(np.uint8)
    if element.name == "F16":
        bits = element.widen(bits).view(np.uint32)
    if target is F32:
        return (bits if bits.itemsize == 4 else FLOAT_FORMATS["BF16"].widen(bits)).view(np.uint8)
    encoders = {F16: _encode_f16, BF16: _encode_bf16, Q8_0: _encode_q8_0}
    return encoders[target](bits)


def repack_nvfp4(packed: U8, block_scales: U8) -> U8:
    """ModelOpt's NVFP4 in ggml's blocks of 64, as `repack_nvfp4_reference` describes them; no value changes."""
    groups = block_scales.size
    out = np.empty((groups // 4, 36), np.uint8)
    out[:, :4] = block_scales.reshape(-1, 4) & 0x7F
    _repack(packed.reshape(-1), out.reshape(-1))
    return out.reshape(-1)


def _encode_f16(bits: Bits) -> U8:
    out = np.empty(bits.size, np.uint16)
    whole = bits.size // _LANES * _LANES
    _narrow_run(bits[:whole], out[:whole])
    tail = bits[whole:]
    values = FLOAT_FORMATS["BF16" if bits.itemsize == 2 else "F32"].widen(tail)
    out[whole:] = values.astype(np.float16).view(np.uint16)
    return out.view(np.uint8)


def _encode_bf16(bits: Bits) -> U8:
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return rounded.astype(np.uint16).view(np.uint8)


def _encode_q8_0(bits: Bits) -> U8:
    out = np.empty(Q8_0.nbytes(bits.size), np.uint8)
    _quantize_q8_0(bits, out)
    return out


@no_type_check
def _loaded(emit, array_type, array, start):
    """16 weights as float32: BF16 is its upper half."""
    width = array_type.dtype.bitwidth
    words = emit.load(ir.VectorType(ir.IntType(width), _LANES), emit.pointer(array_type, array), start)
    if width == 16:
        words = emit.builder.shl(emit.builder.zext(words, _WORDS), constant(_WORDS, 16))
    return emit.builder.bitcast(words, _FLOATS)


@intrinsic
@no_type_check
def _narrow_block(_typing, bits, start, out):
    """`out[start:start+16]` = `bits[start:start+16]` (BF16, or float32 as its bits) as F16."""

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder)
        values = _loaded(emit, signature.args[0], arguments[0], arguments[1])
        halves = builder.fptrunc(values, ir.VectorType(ir.HalfType(), _LANES))
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
def _quantize_block(_typing, bits, block, out):
    """Q8_0: a scale in F16, then 32 signed bytes, rounded with halves away from zero."""

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder)
        out_at = emit.pointer(signature.args[2], arguments[2])
        first = emit.times(arguments[1], 32)
        starts = [first, builder.add(first, first.type(_LANES))]
        parts = [_loaded(emit, signature.args[0], arguments[0], start) for start in starts]
        scale = builder.fdiv(_largest(emit, parts), ir.FloatType()(127))
        is_zero = builder.fcmp_ordered("==", scale, ir.FloatType()(0))
        inverse = builder.select(is_zero, ir.FloatType()(0), builder.fdiv(ir.FloatType()(1), scale))
        position = emit.times(arguments[1], 34)
        emit.store(builder.fptrunc(scale, ir.HalfType()), out_at, position)
        for index, part in enumerate(parts):
            rounded = emit.call("llvm.round.v16f32", _FLOATS, builder.fmul(part, emit.splat(inverse, _LANES)))
            codes = builder.trunc(builder.fptosi(rounded, _WORDS), ir.VectorType(ir.IntType(8), _LANES))
            emit.store(codes, out_at, builder.add(position, position.type(2 + index * _LANES)))
        return context.get_dummy_value()

    return types.void(bits, block, out), generate


@no_type_check
def _largest(emit, parts):
    """The largest magnitude, by comparing bits: they order as the values do, and integers have no NaN."""
    words = [emit.builder.bitcast(part, _WORDS) for part in parts]
    magnitudes = [emit.builder.and_(word, constant(_WORDS, 0x7FFFFFFF)) for word in words]
    larger = emit.call("llvm.umax.v16i32", _WORDS, *magnitudes)
    return emit.builder.bitcast(emit.call("llvm.vector.reduce.umax.v16i32", ir.IntType(32), larger), ir.FloatType())


@_compile
@no_type_check
def _quantize_q8_0(bits, out):
    for block in range(bits.size // 32):
        _quantize_block(bits, block, out)


@_compile
@no_type_check
def _repack(packed, out):
    for group in range(packed.size // 8):
        target = group // 4 * 36 + 4 + group % 4 * 8
        for j in range(4):
            low, high = packed[group * 8 + j], packed[group * 8 + 4 + j]
            out[target + 2 * j] = (low & 15) | ((high & 15) << 4)
            out[target + 2 * j + 1] = (low >> 4) | (high & 0xF0)
