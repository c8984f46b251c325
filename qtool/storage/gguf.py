"""Reads GGUF files: the header once, trusting none of its numbers; tensor bytes on demand."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf.constants import GGUFValueType

from qtool.errors import ModelError
from qtool.formats.ggml import GGML_TYPES, GgmlType
from qtool.storage.byte_source import ByteSource, FileBytes

# Metadata values as the format types them. A value keeps its type, so that what was read is written back bit for bit.
# Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3).


CODES: Final = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
"""The `struct` code of each type of fixed width."""


@dataclass(frozen=True)
class Value:
    """One metadata value; of an array, `kind` is the type of the elements and `data` a list."""

    kind: GGUFValueType
    data: Any
    is_array: bool = False


def uint32(number: int) -> Value:
    """A number such as a size, a count or a token id."""
    return Value(GGUFValueType.UINT32, _in_range(number, 0, 1 << 32))


def int32(number: int) -> Value:
    """A number that may be negative."""
    return Value(GGUFValueType.INT32, _in_range(number, -(1 << 31), 1 << 31))


def _in_range(number: int, first: int, end: int) -> int:
    if not isinstance(number, int | np.integer):
        raise ModelError(f"Expected a whole number, found {json.dumps(number, default=str)[:80]}.")
    if not first <= number < end:
        raise ModelError(
            f"The number {number:,} does not fit in a field of a GGUF file, which holds {first:,} to {end - 1:,}."
        )
    return number


def float32(number: float) -> Value:
    """A number with a fraction, rounded to single precision."""
    try:
        return Value(GGUFValueType.FLOAT32, struct.unpack("<f", struct.pack("<f", number))[0])
    except OverflowError:
        raise ModelError(f"The number {number:.3e} is too large for a field of a GGUF file.") from None
    except struct.error:
        raise ModelError(f"Expected a number, found {json.dumps(number, default=str)[:80]}.") from None


def boolean(flag: bool) -> Value:  # noqa: FBT001 - the value itself
    """A flag."""
    return Value(GGUFValueType.BOOL, flag)


def string(text: str) -> Value:
    """A text."""
    return Value(GGUFValueType.STRING, text)


def array(kind: GGUFValueType, elements: Iterable[Any]) -> Value:
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
    head = struct.pack("<IIQ", GGUFValueType.ARRAY, value.kind, len(value.data))
    return head + _encode_elements(value.kind, value.data)


def _encode_elements(kind: GGUFValueType, elements: Sequence[Any]) -> bytes:
    if kind is GGUFValueType.STRING:
        return b"".join(map(encode_string, elements))
    return struct.pack(f"<{len(elements)}{CODES[kind]}", *elements)


# The header: metadata and the offsets of the tensors. Every count and length is checked against the file's size before
# it is used, so that a broken or hostile header costs neither memory nor time.


MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
ALIGNMENT_KEY: Final = "general.alignment"
_ARCHITECTURE: Final = "general.architecture"

_AGAIN: Final = "Download or copy it again."
MAX_HEADER: Final = 128 << 20
"""Twenty times the header of a model with 151,936 tokens."""
_MAX_NAME: Final = 64  # ggml's own limit for tensors
_MAX_KEY: Final = (1 << 16) - 1
_MAX_DIMENSIONS: Final = 4
_MAX_ALIGNMENT: Final = 1 << 20
_SMALLEST_FIELD: Final = 8 + 1 + 4 + 1  # a key of one letter, its type, a value of one byte
_SMALLEST_TENSOR: Final = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` in numpy's order (rows first), `nbytes` bytes at `offset` of the file."""

    gguf_name: str
    type: GgmlType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """Everything that a header says. `field_spans` are the bytes of each field, key and type included."""

    name: str
    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]
    alignment: int
    data_start: int
    nbytes: int
    field_spans: Mapping[str, tuple[int, int]]

    def get(self, key: str, default: Any = None) -> Any:
        """The plain value of a metadata key."""
        return self.metadata[key].data if key in self.metadata else default


def read_gguf(path: Path) -> GgufFile:
    """The header of a local file."""
    with FileBytes(path) as source:
        return parse_gguf(source)


def parse_gguf(source: ByteSource) -> GgufFile:
    """The header of a file that may be anywhere."""
    cursor = _Cursor(source)
    version = _read_version(cursor)
    tensor_count, field_count = cursor.unpack("<QQ", "its counts")
    cursor.require(field_count * _SMALLEST_FIELD, f"{field_count:,} metadata fields")
    cursor.require(tensor_count * _SMALLEST_TENSOR, f"{tensor_count:,} tensors")
    metadata, spans = _read_metadata(cursor, field_count)
    alignment = _alignment(source.name, metadata)
    entries = _read_tensor_entries(cursor, tensor_count)
    data_start = _aligned(cursor.position, alignment)
    tensors = _placed(source, entries, data_start, alignment)
    return GgufFile(source.name, version, metadata, tensors, alignment, data_start, source.size, spans)


def read_architecture(source: ByteSource) -> str | None:
    """`general.architecture` alone; the whole header is read only where it is not the first field."""
    cursor = _Cursor(source)
    _read_version(cursor)
    _, field_count = cursor.unpack("<QQ", "its counts")
    if field_count and cursor.text("a key", _MAX_KEY) == _ARCHITECTURE:
        (kind,) = cursor.unpack("<I", "a type")
        if kind == GGUFValueType.STRING:
            return cursor.text(_ARCHITECTURE)
    value = parse_gguf(source).metadata.get(_ARCHITECTURE)
    return value.data if value is not None and value.kind is GGUFValueType.STRING and not value.is_array else None


class _Cursor:
    """Reads forward through a source; every request is checked against what is left of it."""

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self.position = 0
        self._buffer = b""
        self._buffer_start = 0

    def require(self, nbytes: int, what: str) -> None:
        """Raise ModelError unless `nbytes` more can follow."""
        if nbytes > self.source.size - self.position:
            raise ModelError(
                f"{self.source.name} is truncated or broken: {what} cannot fit after byte {self.position:,} "
                f"of {self.source.size:,}.",
                _AGAIN,
            )
        if self.position + nbytes > MAX_HEADER:
            raise ModelError(
                f"{self.source.name}: {what} would make the header larger than {MAX_HEADER:,} bytes.",
                "The file is broken: no known model has such a header. Download or copy it again.",
            )

    def take(self, nbytes: int, what: str) -> bytes:
        """The next bytes."""
        self.require(nbytes, what)
        start = self.position - self._buffer_start
        if start + nbytes > len(self._buffer):
            self._buffer = self.source.read(self.position, min(max(nbytes, self.source.chunk), self.source.size))
            self._buffer_start, start = self.position, 0
            if len(self._buffer) < nbytes:
                raise ModelError(f"{self.source.name} ended while its header was read: it changed during the run.")
        self.position += nbytes
        return self._buffer[start : start + nbytes]

    def unpack(self, layout: str, what: str) -> tuple[Any, ...]:
        """The next numbers."""
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))

    def text(self, what: str, longest: int = MAX_HEADER) -> str:
        """The next string; bytes that are no UTF-8 survive as surrogates."""
        (length,) = self.unpack("<Q", f"the length of {what}")
        if length > longest:
            raise ModelError(f"{self.source.name}: {what} has {length:,} bytes, expected at most {longest:,}.", _AGAIN)
        return self.take(length, what).decode("utf-8", "surrogateescape")

    def texts(self, count: int, what: str) -> list[str]:
        """The next `count` strings: a vocabulary has hundreds of thousands, so whole runs are read from the buffer."""
        self.require(8 * count, f"{count:,} strings of {what}")
        found: list[str] = []
        while len(found) < count:
            self._read_buffered_texts(found, count)
            if len(found) < count:
                found.append(self.text(what))  # beyond the buffer, which this fills again
        return found

    def _read_buffered_texts(self, found: list[str], count: int) -> None:
        buffer, start = self._buffer, self.position - self._buffer_start
        while len(found) < count and start + 8 <= len(buffer):
            end = start + 8 + int.from_bytes(buffer[start : start + 8], "little")
            if end > len(buffer):
                break
            found.append(buffer[start + 8 : end].decode("utf-8", "surrogateescape"))
            start = end
        self.position = self._buffer_start + start


def _read_version(cursor: _Cursor) -> int:
    name = cursor.source.name
    if cursor.take(4, "the magic number") != MAGIC:
        raise ModelError(f"{name} is not a GGUF file: it does not begin with {MAGIC.decode()}.")
    (version,) = cursor.unpack("<I", "its version")
    if version in VERSIONS:
        return int(version)
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise ModelError(f"{name} is a big-endian GGUF file, which neither llama.cpp nor qtool reads.")
    raise ModelError(f"{name} is GGUF version {version}, expected {' or '.join(map(str, VERSIONS))}.")


def _read_metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Value], dict[str, tuple[int, int]]]:
    metadata: dict[str, Value] = {}
    spans: dict[str, tuple[int, int]] = {}
    for index in range(count):
        start = cursor.position
        key = cursor.text(f"the key of metadata field {index}", _MAX_KEY)
        if key in metadata:
            raise ModelError(f"{cursor.source.name}: the metadata key {key!r} appears twice.")
        metadata[key] = _read_value(cursor, f"the value of {key!r}")
        spans[key] = (start, cursor.position)
    return metadata, spans


def _read_value(cursor: _Cursor, what: str) -> Value:
    kind = _read_kind(cursor, what)
    if kind is not GGUFValueType.ARRAY:
        return Value(kind, _read_elements(cursor, kind, 1, what)[0])
    kind = _read_kind(cursor, what)
    if kind is GGUFValueType.ARRAY:
        raise ModelError(f"{cursor.source.name}: {what} is an array of arrays, which llama.cpp does not read.")
    (count,) = cursor.unpack("<Q", f"the length of {what}")
    return Value(kind, _read_elements(cursor, kind, count, what), is_array=True)


def _read_kind(cursor: _Cursor, what: str) -> GGUFValueType:
    (number,) = cursor.unpack("<I", f"the type of {what}")
    if number not in GGUFValueType.__members__.values():
        raise ModelError(f"{cursor.source.name}: {what} has the unknown type {number}.")
    return GGUFValueType(number)


def _read_elements(cursor: _Cursor, kind: GGUFValueType, count: int, what: str) -> list[Any]:
    if kind is GGUFValueType.STRING:
        return cursor.texts(count, what)
    width = struct.calcsize(CODES[kind])
    cursor.require(width * count, f"{count:,} elements of {what}")
    return list(cursor.unpack(f"<{count}{CODES[kind]}", what))


def _alignment(name: str, metadata: Mapping[str, Value]) -> int:
    value = metadata.get(ALIGNMENT_KEY, Value(GGUFValueType.UINT32, DEFAULT_ALIGNMENT))
    number = value.data
    if (
        value.kind is not GGUFValueType.UINT32
        or value.is_array
        or not 0 < number <= _MAX_ALIGNMENT
        or number & (number - 1)
    ):
        raise ModelError(f"{name}: {ALIGNMENT_KEY} is {number!r}, expected a power of two up to {_MAX_ALIGNMENT:,}.")
    return int(number)


_Entry = tuple[str, GgmlType, tuple[int, ...], int]


def _read_tensor_entries(cursor: _Cursor, count: int) -> list[_Entry]:
    entries: dict[str, _Entry] = {}
    for index in range(count):
        entry = _read_tensor_entry(cursor, index)
        if entry[0] in entries:
            raise ModelError(f"{cursor.source.name}: the tensor {entry[0]} appears twice.")
        entries[entry[0]] = entry
    return list(entries.values())


def _read_tensor_entry(cursor: _Cursor, index: int) -> _Entry:
    gguf_name = cursor.text(f"the name of tensor {index}", _MAX_NAME)
    where = f"{cursor.source.name}: {gguf_name}"
    (dimensions,) = cursor.unpack("<I", f"the dimensions of {gguf_name}")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise ModelError(f"{where} has {dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}.")
    *sizes, number, offset = cursor.unpack(f"<{dimensions}QIQ", f"the description of {gguf_name}")
    ggml_type = GGML_TYPES.get(number)
    if ggml_type is None:
        raise ModelError(f"{where} has the unknown type {number}.", "The file is broken, or newer than this qtool.")
    if min(sizes) < 1 or prod(sizes) >= 1 << 63:
        raise ModelError(f"{where} has the impossible shape {sizes[::-1]}.")
    if sizes[0] % ggml_type.block:
        raise ModelError(
            f"{where} has rows of {sizes[0]} values; {ggml_type.name} needs a multiple of {ggml_type.block}."
        )
    return gguf_name, ggml_type, tuple(reversed(sizes)), offset


def _placed(source: ByteSource, entries: list[_Entry], data_start: int, alignment: int) -> dict[str, GgufTensor]:
    """The tensors with their places, which must follow each other without gap, as llama.cpp requires."""
    tensors: dict[str, GgufTensor] = {}
    expected = 0
    for gguf_name, ggml_type, shape, offset in entries:
        if offset != expected:
            raise ModelError(
                f"{source.name}: {gguf_name} starts at byte {offset:,} of the data; expected {expected:,}.",
                "Tensors must follow each other; llama.cpp refuses such a file.",
            )
        nbytes = ggml_type.nbytes(prod(shape))
        if data_start + offset + nbytes > source.size:
            raise ModelError(
                f"{source.name} is truncated: {gguf_name} ends at byte {data_start + offset + nbytes:,} of {source.size:,}.",
                _AGAIN,
            )
        tensors[gguf_name] = GgufTensor(gguf_name, ggml_type, shape, data_start + offset, nbytes)
        expected = _aligned(offset + nbytes, alignment)
    if source.size > max(data_start + expected, data_start):
        raise ModelError(
            f"{source.name} is longer than its header says: {source.size:,} bytes, expected {data_start + expected:,}.",
            _AGAIN,
        )
    return tensors


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
