"""Lays out GGUF files, and opens them for several writers."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gguf.constants import GGUFValueType

from qtool.formats.ggml import GgmlType
from qtool.storage.gguf import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, Value, encode_string, encode_value
from qtool.storage.hashing import Extent
from qtool.storage.output_files import OutputFiles, Place, created, open_outputs

# Lays out GGUF files. Every offset of every file is known before the first byte is written.


_VERSION = 3
_ARCHITECTURE = "general.architecture"


@dataclass(frozen=True)
class GgufOutputTensor:
    """A tensor to be written; `shape` in numpy's order."""

    gguf_name: str
    type: GgmlType
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class GgufLayout:
    """One file: its header, and where each tensor lies in it (`offset`, `nbytes`)."""

    file_name: str
    header: bytes
    places: Mapping[str, tuple[int, int]]
    nbytes: int


def lay_out(
    file_name: str, metadata: Mapping[str, Value], tensors: Sequence[GgufOutputTensor], max_bytes: int | None = None
) -> list[GgufLayout]:
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
) -> GgufLayout:
    """One file whose metadata is encoded already."""
    header = encode_header(fields, field_count, tensors, alignment)
    places: dict[str, tuple[int, int]] = {}
    position = len(header)
    for tensor in tensors:
        places[tensor.gguf_name] = position, tensor.nbytes
        position += padded(tensor.nbytes, alignment)
    return GgufLayout(file_name, header, places, position)


def _split_file(
    file_name: str, metadata: Mapping[str, Value], groups: Sequence[Sequence[GgufOutputTensor]], number: int
) -> GgufLayout:
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


# Opens GGUF files for several writers. Every tensor is hashed by itself, and the header too. One file has one stream
# of SHA-256 but many tensors, which are hashed side by side; their hashes together say as much as the file's.


HEADER: Final = "header of {}"
"""The name under which a file's header is hashed."""


SLICE: Final = 64 << 20
"""Larger tensors are hashed in slices of this size, or the embedding would take longer than all the rest."""


def hash_names(name: str, nbytes: int) -> list[str]:
    """Under which names the hashes of a tensor's slices go; a small one has just its own."""
    slices = max(1, -(-nbytes // SLICE))
    return [name] if slices == 1 else [f"{name} {number}/{slices}" for number in range(1, slices + 1)]


@contextmanager
def open_gguf(layouts: Sequence[GgufLayout], folder: Path) -> Iterator[OutputFiles]:
    """Create the parts of one GGUF file; tensors are written by their names."""
    with ExitStack() as stack:
        extents: dict[str, Extent] = {}
        places: dict[str, Place] = {}
        for layout in layouts:
            descriptor = stack.enter_context(created(folder / layout.file_name, layout.nbytes))
            whole = {HEADER.format(layout.file_name): (0, len(layout.header)), **layout.places}
            for name, (offset, nbytes) in whole.items():
                places[name] = Place(descriptor, offset, len(extents), 0, SLICE)
                for number, part in enumerate(hash_names(name, nbytes)):
                    start = number * SLICE
                    extents[part] = Extent(descriptor, offset + start, min(SLICE, nbytes - start))
        headers = [(HEADER.format(layout.file_name), layout.header) for layout in layouts]
        yield stack.enter_context(open_outputs(places, extents, headers))
