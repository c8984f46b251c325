"""Reads safetensors checkpoints: headers once, each claim checked; tensor bytes on demand."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from qtool.arch.spec import Architecture, Config, Presence, TensorSpec
from qtool.errors import ModelError
from qtool.jsonfile import read_json
from qtool.storage.byte_source import read_exactly

# Every offset, size, name and type is checked against the files before the first byte of a weight is read.

DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # numpy has no bfloat16 and no float8: raw bits
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""Element types of safetensors and the numpy types that hold them."""

_AGAIN: Final = "Download or copy it again."
MAX_HEADER: Final = 100_000_000  # the safetensors library's own limit
INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes at `offset` of `file`."""

    hf_name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


class WeightBytes(Protocol):
    """Weight files that lie elsewhere, of which the folder has but the headers."""

    def read_into(self, file: str, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Fill `buffer` with the bytes of a file from `offset` on; safe from several threads."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's config and the whereabouts of its tensors, in file order; `weights` where the folder lacks them."""

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    weights: WeightBytes | None = None

    def read(self, hf_name: str) -> NDArray[Any]:
        """The tensor as an array of its shape; BF16 and FP8 types come as raw bits."""
        info = self.tensors[hf_name]
        data = np.empty(info.nbytes, np.uint8)
        self.read_into(info, 0, data)
        return data.view(DTYPES[info.dtype]).reshape(info.shape)

    def read_into(self, info: TensorInfo, start: int, buffer: NDArray[np.uint8]) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on; safe from several threads."""
        if self.weights is not None:
            self.weights.read_into(info.file.name, info.offset + start, buffer)
        else:
            read_exactly(info.file, info.offset + start, buffer, info.hf_name)


def open_checkpoint(directory: Path, weights: WeightBytes | None = None) -> Checkpoint:
    """Read config.json and every header in `directory`; reads no weights, which are `weights` where they lie elsewhere."""
    config = read_json(directory / "config.json")
    tensors: dict[str, TensorInfo] = {}
    for path in _weight_files(directory):
        for info in read_header(path):
            if info.hf_name in tensors:
                raise ModelError(f"{info.hf_name} is in both {tensors[info.hf_name].file.name} and {path.name}.")
            tensors[info.hf_name] = info
    _check_index(directory, tensors)
    return Checkpoint(directory, config, tensors, weights)


def _weight_files(directory: Path) -> list[Path]:
    if (directory / INDEX).is_file():
        names = sorted(set(weight_map(directory).values()))
    elif (directory / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise ModelError(f"{directory} holds neither {SINGLE} nor {INDEX}.", "Pass a safetensors checkpoint.")
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{INDEX} names {name!r}, which is not a file name.")
        try:
            is_there = (directory / name).is_file()
        except OSError:  # the name is too long for a file
            is_there = False
        if not is_there:
            raise ModelError(f"{INDEX} names {name}, which is missing from {directory}.")
    return [directory / name for name in names]


def weight_map(directory: Path) -> Mapping[str, str]:
    """The file of each tensor, as the index says. Raises ModelError."""
    files = read_json(directory / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ModelError(f"{directory / INDEX} has no `weight_map` of tensor to file names.")
    return files


def _check_index(directory: Path, tensors: Mapping[str, TensorInfo]) -> None:
    if not (directory / INDEX).is_file():
        return
    for hf_name, file_name in weight_map(directory).items():
        found = tensors.get(hf_name)
        if found is None or found.file.name != file_name:
            where = f"that file does not hold it{f' ({found.file.name} does)' if found else ''}"
            raise ModelError(f"{INDEX} says that {hf_name} is in {file_name}, but {where}.")


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, by offset; raises ModelError unless they fill it without hole or overlap."""
    header, data_start, size = _parse_header(path)
    infos = [_tensor_info(path, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    position = data_start
    for info in infos:
        if info.offset != position:
            problem = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
            raise ModelError(f"{path}: {info.hf_name} {problem} (starts at {info.offset}, expected {position}).")
        position += info.nbytes
    if position != size:
        problem = "truncated" if position > size else "longer than its header says"
        raise ModelError(f"{path} is {problem}: {size:,} bytes, the header describes {position:,}.", _AGAIN)
    return infos


def _parse_header(path: Path) -> tuple[dict[str, Any], int, int]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise ModelError(
                f"{path} is truncated or not a safetensors file: its header would end at byte {length + 8:,} of {size:,}.",
                _AGAIN,
            )
        if length > MAX_HEADER:
            raise ModelError(f"{path} has a header of {length:,} bytes, expected at most {MAX_HEADER:,}.")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} has an unreadable header: {error}.") from None
    if not isinstance(header, dict):
        raise ModelError(f"{path} has a header that is not a JSON object.")
    described = header.get("__metadata__", {})
    if not isinstance(described, dict) or not all(isinstance(text, str) for text in described.values()):
        raise ModelError(
            f"{path} has `__metadata__` that is not of texts, which the safetensors library refuses.", _AGAIN
        )
    return header, 8 + length, size


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    (name, times), *_ = Counter(key for key, _ in pairs).most_common(1) or [("", 1)]
    if times > 1:
        raise ValueError(f"{name!r} appears twice")
    return dict(pairs)


def _tensor_info(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            pass
        case _:
            raise ModelError(f"{path}: the header entry of {name} lacks dtype, shape or data_offsets.")
    if dtype not in DTYPES:
        raise ModelError(f"{path}: {name} has the unknown type {dtype!r}.", f"Known are {', '.join(DTYPES)}.")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ModelError(f"{path}: {name} has the impossible shape {shape}.")
    needed = prod(shape) * DTYPES[dtype].itemsize
    if start < 0 or end - start != needed:
        raise ModelError(f"{path}: {name} ({dtype} {shape}) needs {needed:,} bytes, its offsets span {end - start:,}.")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + start, needed)


# The files beside the weights: what else a checkpoint needs to be loaded, tokenized and scored. They are copied byte for
# byte. What qtool writes itself (config, weights, index, quantization files) is not among them.


SIDECAR_PATTERNS: Final = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
    "chat_template.*", "additional_chat_templates/**/*",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
    "generation_config.json",
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "[0-9]_*/**/*",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Glob patterns, relative to the checkpoint's folder."""


def find_sidecars(directory: Path) -> list[Path]:
    """Paths of the side files in `directory`, relative to it, sorted."""
    found = {path for pattern in SIDECAR_PATTERNS for path in directory.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(directory) for path in found)


# Which tensor of a checkpoint is which tensor of its architecture. A tensor that the architecture does not have, one that
# is missing, and one of another shape than config.json implies are errors that name it.


MOST_MISSING: Final = 10_000
"""A config.json that promises many more tensors than there are is not listed to its end."""


def named_tensors(
    sources: Iterable[TensorInfo], architecture: Architecture, config: Config
) -> dict[TensorSpec, TensorInfo]:
    """The architecture's tensors that are there, in the order of `sources`; shapes are not looked at."""
    sources = list(sources)
    declared = islice(architecture.tensors(config), len(sources) + MOST_MISSING)
    specs = {spec.hf_name: spec for spec in declared}
    found = _canonical(sources, specs, architecture)
    missing = [s.hf_name for s in specs.values() if s.presence is Presence.REQUIRED and s.hf_name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"The checkpoint lacks {missing[0]}{more}, which {architecture.name} with this config.json needs."
        )
    return {specs[hf_name]: source for hf_name, source in found.items()}


def require_shape(spec: TensorSpec, source: TensorInfo) -> None:
    """Raise ModelError unless the tensor has the shape that config.json implies."""
    if source.shape != spec.shape:
        raise ModelError(f"{source.hf_name} has shape {list(source.shape)}; config.json implies {list(spec.shape)}.")


def _canonical(
    sources: Iterable[TensorInfo], specs: Mapping[str, TensorSpec], architecture: Architecture
) -> dict[str, TensorInfo]:
    """Sources by canonical name: base-model checkpoints, as embedders are published, leave the prefix out."""
    found: dict[str, TensorInfo] = {}
    for source in sources:
        names = [n for n in (source.hf_name, architecture.prefix + source.hf_name) if n in specs]
        if not names:
            raise ModelError(
                f"{source.hf_name} {list(source.shape)} is not a tensor of {architecture.name} with this config.json.",
                "qtool handles only checkpoints of which it knows every tensor.",
            )
        if names[0] in found:
            raise ModelError(f"{source.hf_name} and {found[names[0]].hf_name} are the same tensor.")
        found[names[0]] = source
    return found
