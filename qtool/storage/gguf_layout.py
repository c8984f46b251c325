"""Lays out GGUF files, to the byte, before anything is written."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGUFValueType

from qtool.formats.ggml import GgmlType
from qtool.storage.gguf import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, Value, encode_string, encode_value
from qtool.storage.output_files import FileLayout

_VERSION = 3
_ARCHITECTURE = "general.architecture"


@dataclass(frozen=True)
class GgufOutputTensor:
    """A tensor to be written; `shape` in numpy's order."""

    gguf_name: str
    type: GgmlType
    shape: tuple[int, ...]
    nbytes: int


def lay_out(
    file_name: str, metadata: Mapping[str, Value], tensors: Sequence[GgufOutputTensor], max_bytes: int | None = None
) -> list[FileLayout]:
    """One file, or several of at most `max_bytes` of tensors each (a larger tensor has its own), as llama.cpp splits them."""
    groups = _divided(tensors, max_bytes) if max_bytes else [list(tensors)]
    if len(groups) == 1:
        return [lay_out_encoded(file_name, encode_metadata(metadata), len(metadata), groups[0], _alignment(metadata))]
    return [_split_file(file_name, metadata, groups, number) for number in range(len(groups))]


def encode_metadata(metadata: Mapping[str, Value]) -> bytes:
    """The fields of a header, one after the other."""
    return b"".join(encode_string(key) + encode_value(value) for key, value in metadata.items())


def encode_header(fields: bytes, field_count: int, tensors: Sequence[GgufOutputTensor], alignment: int) -> bytes:
    """Everything before the data, padded to where that begins; `fields` are encoded already."""
    counts = struct.pack("<IQQ", _VERSION, len(tensors), field_count)
    entries, offset = [], 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]  # ggml counts from the innermost dimension
        numbers = struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, tensor.type.number, offset)
        entries.append(encode_string(tensor.gguf_name) + numbers)
        offset += padded(tensor.nbytes, alignment)
    header = MAGIC + counts + fields + b"".join(entries)
    return header + bytes(padded(len(header), alignment) - len(header))


def padded(nbytes: int, alignment: int) -> int:
    """The next multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment


def _alignment(metadata: Mapping[str, Value]) -> int:
    return int(metadata[ALIGNMENT_KEY].data) if ALIGNMENT_KEY in metadata else DEFAULT_ALIGNMENT


def lay_out_encoded(
    file_name: str, fields: bytes, field_count: int, tensors: Sequence[GgufOutputTensor], alignment: int
) -> FileLayout:
    """One file whose metadata is encoded already."""
    header = encode_header(fields, field_count, tensors, alignment)
    ranges: dict[str, tuple[int, int]] = {}
    position = len(header)
    for tensor in tensors:
        ranges[tensor.gguf_name] = position, tensor.nbytes
        position += padded(tensor.nbytes, alignment)
    return FileLayout(file_name, header, ranges, position)


def _split_file(
    file_name: str, metadata: Mapping[str, Value], groups: Sequence[Sequence[GgufOutputTensor]], number: int
) -> FileLayout:
    """The first part has all the metadata; the others only what ties them to it."""
    ties = {
        "split.no": Value(GGUFValueType.UINT16, number),
        "split.count": Value(GGUFValueType.UINT16, len(groups)),
        "split.tensors.count": Value(GGUFValueType.INT32, sum(map(len, groups))),
    }
    own = {**metadata, **ties} if number == 0 else {_ARCHITECTURE: metadata[_ARCHITECTURE], **ties}
    name = f"{Path(file_name).stem}-{number + 1:05}-of-{len(groups):05}.gguf"
    return lay_out_encoded(name, encode_metadata(own), len(own), groups[number], _alignment(metadata))


def _divided(tensors: Sequence[GgufOutputTensor], max_bytes: int) -> list[list[GgufOutputTensor]]:
    groups: list[list[GgufOutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return groups
