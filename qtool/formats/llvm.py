"""Vector instructions for the compiled kernels, where LLVM's vectorizer cannot handle the loop.

LLVM maps the vectors to whatever registers the processor has (AVX-512, AVX2, NEON).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils


class Emitter:
    """Emits vector operations into a compiled function."""

    def __init__(self, context: Any, builder: ir.IRBuilder) -> None:
        self.builder = builder
        self._context = context

    def pointer(self, array_type: Any, array: Any) -> ir.Value:
        """The address of a contiguous array's first element."""
        return self._context.make_array(array_type)(self._context, self.builder, array).data

    def length(self, array_type: Any, array: Any) -> ir.Value:
        """The number of elements of an array."""
        return self._context.make_array(array_type)(self._context, self.builder, array).nitems

    def load(self, vector: ir.VectorType, start: ir.Value, index: ir.Value) -> ir.Value:
        """The vector of elements from `start[index]` on."""
        address = self.builder.gep(start, [index])
        return self.builder.load(self.builder.bitcast(address, vector.as_pointer()), align=1)

    def store(self, value: ir.Value, start: ir.Value, index: ir.Value) -> None:
        """Write a vector to the elements from `start[index]` on."""
        address = self.builder.gep(start, [index])
        self.builder.store(value, self.builder.bitcast(address, value.type.as_pointer()), align=1)

    def scalar(self, start: ir.Value, index: ir.Value) -> ir.Value:
        """The element `start[index]`."""
        return self.builder.load(self.builder.gep(start, [index]))

    def times(self, index: ir.Value, factor: int) -> ir.Value:
        """An index times a constant."""
        return self.builder.mul(index, index.type(factor))

    def splat(self, value: ir.Value, lanes: int) -> ir.Value:
        """A vector with `value` in every lane."""
        vector = ir.VectorType(value.type, lanes)
        first = self.builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
        return self.builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)

    def call(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        """Call one of LLVM's intrinsic functions."""
        signature = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, signature, name), arguments)


def constant(vector: ir.VectorType, value: int) -> ir.Constant:
    """A vector with the number `value` in every lane."""
    return ir.Constant(vector, [value] * vector.count)
