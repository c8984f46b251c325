"""The compiled loop of SHA-256 (FIPS 180-4) for eight streams in lockstep, one a vector lane.

Rule: only whole blocks come here; how streams begin and end is known to `sha256`.
"""

from __future__ import annotations

from math import isqrt
from typing import Final, no_type_check

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qtool.formats.vectors import Emitter, constant

LANES: Final = 8
BLOCK: Final = 64
_WORDS: Final = ir.VectorType(ir.IntType(32), LANES)
_PRIMES: Final = [p for p in range(2, 312) if all(p % d for d in range(2, p))]


def _cube_root(number: int) -> int:
    root = 1 << -(-number.bit_length() // 3)
    while (better := (2 * root + number // root**2) // 3) < root:
        root = better
    return root


# The first 32 bits of the fractions of the primes' square and cube roots (FIPS 180-4, 4.2.2 and 5.3.3).
INITIAL: Final = np.array([isqrt(p << 64) & 0xFFFFFFFF for p in _PRIMES[:8]], np.uint32)
_ROUND: Final = [_cube_root(p << 96) & 0xFFFFFFFF for p in _PRIMES]


@numba.njit(nogil=True, cache=True, boundscheck=False)
@no_type_check
def compress(state, data):
    """Put the words `data` [LANES, n] into the state [8, LANES]."""
    for first in range(0, data.shape[1], BLOCK // 4):
        _compress_block(state, data, first, data.shape[1])


@intrinsic
@no_type_check
def _compress_block(_typing, state, data, first, stride):
    """Put the words `data[:, first : first + 16]` into the state [8, LANES] (FIPS 180-4, 6.2.2, with its letters)."""

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder)
        state_at, data_at = (emit.pointer(signature.args[i], arguments[i]) for i in (0, 1))
        rows = [ir.IntType(64)(row * LANES) for row in range(8)]
        before = [emit.load(_WORDS, state_at, row) for row in rows]
        schedule = _message(emit, data_at, arguments[2], arguments[3])
        for row, old, new in zip(rows, before, _rounds(emit, schedule, before), strict=True):
            emit.store(builder.add(old, new), state_at, row)
        return context.get_dummy_value()

    return types.void(state, data, first, stride), generate


@no_type_check
def _message(emit, data_at, first, stride):
    """The 16 words of a block, each for all lanes."""
    builder = emit.builder
    words = []
    for half in (0, LANES):
        start = builder.add(first, first.type(half))
        lanes = [builder.add(start, builder.mul(stride, stride.type(lane))) for lane in range(LANES)]
        rows = [emit.load(_WORDS, data_at, index) for index in lanes]
        words += [emit.call(f"llvm.bswap.v{LANES}i32", _WORDS, word) for word in _transposed(builder, rows)]
    return words


@no_type_check
def _transposed(builder, rows):
    """Lane by lane becomes word by word: shuffle the upper half of the rows into the lower one, three times."""
    low = [lane // 2 + lane % 2 * LANES for lane in range(LANES)]
    masks = [ir.Constant(_WORDS, [lane + half for lane in low]) for half in (0, LANES // 2)]
    for _ in range(LANES.bit_length() - 1):
        pairs = zip(rows[: LANES // 2], rows[LANES // 2 :], strict=True)
        rows = [builder.shuffle_vector(upper, lower, mask) for upper, lower in pairs for mask in masks]
    return rows


@no_type_check
def _rounds(emit, schedule, before):
    builder = emit.builder
    a, b, c, d, e, f, g, h = before
    for t in range(64):
        word = schedule[t] if t < 16 else _next_word(emit, schedule)
        choice = builder.xor(g, builder.and_(e, builder.xor(f, g)))
        majority = builder.or_(builder.and_(a, b), builder.and_(c, builder.or_(a, b)))
        early = _sum(builder, h, word, constant(_WORDS, _ROUND[t]))  # what the round before does not hold up
        t1 = _sum(builder, early, choice, _rotated(emit, e, 6, 11, 25))
        t2 = builder.add(_rotated(emit, a, 2, 13, 22), majority)
        a, b, c, d, e, f, g, h = builder.add(t1, t2), a, b, c, builder.add(d, t1), e, f, g
    return a, b, c, d, e, f, g, h


@no_type_check
def _next_word(emit, schedule):
    builder = emit.builder
    early, late = schedule[-15], schedule[-2]
    sigma0 = builder.xor(_rotated(emit, early, 7, 18), builder.lshr(early, constant(_WORDS, 3)))
    sigma1 = builder.xor(_rotated(emit, late, 17, 19), builder.lshr(late, constant(_WORDS, 10)))
    schedule.append(_sum(builder, schedule[-16], sigma0, schedule[-7], sigma1))
    return schedule[-1]


@no_type_check
def _sum(builder, first, *others):
    for other in others:
        first = builder.add(first, other)
    return first


@no_type_check
def _rotated(emit, word, *counts):
    """The exclusive or of `word` rotated right by each of `counts`."""
    name = f"llvm.fshr.v{LANES}i32"
    first, *others = (emit.call(name, _WORDS, word, word, constant(_WORDS, count)) for count in counts)
    for other in others:
        first = emit.builder.xor(first, other)
    return first
