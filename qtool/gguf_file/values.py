"""Metadata values of a GGUF file, as the format types them.

Rule: a value keeps its type; what was read is written back bit for bit.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final


class Kind(IntEnum):
    """Type of a metadata value."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


CODES: Final = {
    Kind.UINT8: "B",
    Kind.INT8: "b",
    Kind.UINT16: "H",
    Kind.INT16: "h",
    Kind.UINT32: "I",
    Kind.INT32: "i",
    Kind.FLOAT32: "f",
    Kind.BOOL: "?",
    Kind.UINT64: "Q",
    Kind.INT64: "q",
    Kind.FLOAT64: "d",
}
"""The `struct` code of each type of fixed width."""


@dataclass(frozen=True)
class Value:
    """One metadata value; of an array, `kind` is the type of the elements and `data` a list."""

    kind: Kind
    data: Any
    is_array: bool = False


def uint32(number: int) -> Value:
    """A number such as a size, a count or a token id."""
    return Value(Kind.UINT32, number)


def int32(number: int) -> Value:
    """A number that may be negative."""
    return Value(Kind.INT32, number)


def float32(number: float) -> Value:
    """A number with a fraction, rounded to single precision."""
    return Value(Kind.FLOAT32, struct.unpack("<f", struct.pack("<f", number))[0])


def boolean(flag: bool) -> Value:  # noqa: FBT001 - the value itself
    """A flag."""
    return Value(Kind.BOOL, flag)


def string(text: str) -> Value:
    """A text."""
    return Value(Kind.STRING, text)


def array(kind: Kind, elements: Iterable[Any]) -> Value:
    """A list of values of one type."""
    return Value(kind, list(elements), is_array=True)


def encode_string(text: str) -> bytes:
    """Length and UTF-8 bytes."""
    data = text.encode("utf-8", "surrogateescape")  # what was read undecodable goes back as it was
    return struct.pack("<Q", len(data)) + data


def encode_value(value: Value) -> bytes:
    """A value with its type before it."""
    if not value.is_array:
        return struct.pack("<I", value.kind) + _encode_elements(value.kind, [value.data])
    head = struct.pack("<IIQ", Kind.ARRAY, value.kind, len(value.data))
    return head + _encode_elements(value.kind, value.data)


def _encode_elements(kind: Kind, elements: Sequence[Any]) -> bytes:
    if kind is Kind.STRING:
        return b"".join(map(encode_string, elements))
    return struct.pack(f"<{len(elements)}{CODES[kind]}", *elements)
