"""One NVFP4 block as vector instructions: 16 weights in, 8 bytes and 16 running sums out, all in registers.

Rule: a code is the number of thresholds that a magnitude reaches; nothing is divided and nothing is rounded here.
"""

from __future__ import annotations

from typing import Any, Final, no_type_check

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qtool.formats.vectors import Emitter, constant

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

    `thresholds` [127, 8, 16] are those of EncodeTables; `half_factors` [256] is what a code's doubled magnitude is worth
    under each block scale. `sums` [2, 16] become, lane by lane, the squared error and the squared weight.
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
        """Twice the magnitudes: codes 0..4 are 0, 1, 2, 3, 4; from there it goes on to 6, 8, 12."""
        beyond_4, beyond_6 = self._beyond(codes, 4), self._beyond(codes, 6)
        return self._builder.add(codes, self._builder.add(beyond_4, self._builder.add(beyond_6, beyond_6)))

    def _beyond(self, codes: Any, limit: int) -> Any:
        name = f"llvm.usub.sat.v{_LANES}i{self._width}"
        return self._emit.call(name, self.vector, codes, constant(self.vector, limit))

    def packed(self, codes: Any, shows_sign: Any) -> Any:
        """Signed codes, two in a byte; the even element takes the low nibble."""
        sign = self._builder.and_(
            self._builder.lshr(self._words, constant(self.vector, self._width - 4)), constant(self.vector, 8)
        )
        shown = self._builder.icmp_unsigned(">=", self._magnitudes, shows_sign)
        nibbles = self._builder.or_(codes, self._builder.select(shown, sign, constant(self.vector, 0)))
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
