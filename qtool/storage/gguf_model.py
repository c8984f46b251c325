"""A GGUF model, of one file or of several parts: its fields by type, its tensors, and their bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType, LlamaFileType
from gguf.quants import dequantize

from qtool.errors import ModelError
from qtool.formats.floats import U8, Float32
from qtool.formats.ggml import NVFP4, GgmlType
from qtool.storage.gguf import GgufFile, GgufTensor, Value, parse_gguf
from qtool.storage.location import ArtefactLocation, LocalLocation

# The names of llama.cpp that are the same in every architecture.

SUFFIX: Final = ".gguf"
PROJECTOR: Final = "clip"
"""The `general.architecture` of every vision projector."""
PROJECTOR_NAME: Final = "mmproj"
"""What llama.cpp looks for in the names of files to tell projectors from language models."""

RANK_HEAD: Final = "cls.output.weight"
TOKEN_EMBEDDING: Final = "token_embd.weight"
OUTPUT: Final = "output.weight"
TOKENS_KEY: Final = "tokenizer.ggml.tokens"
RERANK_KEY: Final = "tokenizer.chat_template.rerank"

_PART: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_INTEGERS: Final = frozenset(
    {
        GGUFValueType.UINT8,
        GGUFValueType.INT8,
        GGUFValueType.UINT16,
        GGUFValueType.INT16,
        GGUFValueType.UINT32,
        GGUFValueType.INT32,
        GGUFValueType.UINT64,
        GGUFValueType.INT64,
    }
)
_FLOATS: Final = frozenset({GGUFValueType.FLOAT32, GGUFValueType.FLOAT64})
_NO_VALUE: Final = Value(GGUFValueType.UINT8, None)


@dataclass(frozen=True)
class GgufModel:
    """One or more parts under one `name`; the first part's fields speak for all. `parts` are by their names in `location`.

    A field is used only if it has the type that llama.cpp expects; another counts as missing.
    """

    name: str
    location: ArtefactLocation
    parts: Mapping[str, GgufFile]
    missing_parts: tuple[str, ...]

    @property
    def target(self) -> str:
        """How a command names it: by its first part."""
        return self.location.path_of(next(iter(self.parts)))

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its files on this disk."""
        return tuple(Path(self.location.path_of(part)) for part in self.parts)

    @property
    def path(self) -> Path:
        """The first of them, by which engines load the model."""
        return self.paths[0]

    @property
    def header(self) -> GgufFile:
        """The first part's header."""
        return next(iter(self.parts.values()))

    @property
    def metadata(self) -> Mapping[str, Value]:
        """The fields."""
        return self.header.metadata

    @cached_property
    def tensors(self) -> Mapping[str, GgufTensor]:
        """The tensors of all parts."""
        return {name: tensor for part in self.parts.values() for name, tensor in part.tensors.items()}

    @cached_property
    def part_of(self) -> Mapping[str, str]:
        """The part that each tensor lies in."""
        return {name: part for part, file in self.parts.items() for name in file.tensors}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def require_whole(self) -> None:
        """Raise ModelError if a part is missing."""
        if self.missing_parts:
            count = len(self.parts) + len(self.missing_parts)
            raise ModelError(
                f"{self.target} is split into {count} parts, and {self.missing_parts[0]} is missing.",
                f"Download it: hf download ORG/NAME {self.missing_parts[0]} --local-dir FOLDER",
            )

    # Fields.

    @property
    def architecture(self) -> str | None:
        """What llama.cpp calls the family."""
        return self.text("general.architecture")

    def key(self, name: str) -> str:
        """The full key of one of the architecture's fields."""
        return f"{self.architecture}.{name}"

    def integer(self, key: str) -> int | None:
        """A whole number."""
        value = self.metadata.get(key, _NO_VALUE)
        return value.data if value.kind in _INTEGERS and not value.is_array else None

    def number(self, key: str) -> float | None:
        """A number with a fraction."""
        value = self.metadata.get(key, _NO_VALUE)
        return value.data if value.kind in _FLOATS and not value.is_array else None

    def text(self, key: str) -> str | None:
        """A text."""
        value = self.metadata.get(key, _NO_VALUE)
        return value.data if value.kind is GGUFValueType.STRING and not value.is_array else None

    def flag(self, key: str) -> bool | None:
        """A yes or no."""
        value = self.metadata.get(key, _NO_VALUE)
        return value.data if value.kind is GGUFValueType.BOOL and not value.is_array else None

    def elements(self, key: str, kinds: frozenset[GGUFValueType]) -> Sequence[Any]:
        """A list whose elements are of one of `kinds`; empty where there is none."""
        value = self.metadata.get(key, _NO_VALUE)
        return value.data if value.is_array and value.kind in kinds else ()

    def integers(self, key: str) -> Sequence[int]:
        """A list of whole numbers."""
        return self.elements(key, _INTEGERS)

    def floats(self, key: str) -> Sequence[float]:
        """A list of numbers with fractions."""
        return self.elements(key, _FLOATS)

    def texts(self, key: str) -> Sequence[str]:
        """A list of texts."""
        return self.elements(key, frozenset({GGUFValueType.STRING}))

    def flags(self, key: str) -> Sequence[bool]:
        """A list of yes or no."""
        return self.elements(key, frozenset({GGUFValueType.BOOL}))

    @property
    def file_type(self) -> str:
        """What `general.file_type` stands for, such as Q4_K_M."""
        number = self.integer("general.file_type")
        known = {int(each): each.name for each in LlamaFileType}
        return re.sub("^(MOSTLY|ALL)_", "", known[number]) if number in known else "unknown"

    # Tensors.

    def read_into(self, tensor: GgufTensor, start: int, buffer: U8) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on; safe from several threads."""
        self.location.read_into(self.part_of[tensor.gguf_name], tensor.offset + start, buffer, tensor.gguf_name)

    def read(self, tensor: GgufTensor, start: int = 0, nbytes: int | None = None) -> U8:
        """The tensor's bytes from `start` on, `nbytes` of them or all."""
        buffer = np.empty(tensor.nbytes - start if nbytes is None else nbytes, np.uint8)
        self.read_into(tensor, start, buffer)
        return buffer

    def read_rows(self, tensor: GgufTensor, rows: Sequence[int]) -> U8:
        """Some rows of a matrix as they are stored [rows, bytes]."""
        width = tensor.nbytes // tensor.shape[0]
        return np.stack([self.read(tensor, row * width, width) for row in rows])

    def read_numbers(self, gguf_names: Sequence[str]) -> Mapping[str, float] | None:
        """The first number of each F32 tensor, in few requests; None where the hub would be asked too often."""
        numbers: dict[str, float] = {}
        for part, file in self.parts.items():
            wanted = [file.tensors[name] for name in gguf_names if self.part_of[name] == part]
            data = self.location.read_spans(part, [(each.offset, 4) for each in wanted])
            if data is None:
                return None
            numbers |= {
                each.gguf_name: float(np.frombuffer(raw, "<f4")[0]) for each, raw in zip(wanted, data, strict=True)
            }
        return numbers

    @property
    def nvfp4_scales(self) -> list[str]:
        """The names that the global scales of the NVFP4 tensors have, or should have."""
        return [scale_of(name) for name, tensor in self.tensors.items() if tensor.type is NVFP4]


def scale_of(gguf_name: str) -> str:
    """The name of the global scale of an NVFP4 tensor."""
    return gguf_name.removesuffix(".weight") + ".scale"


def decode(stored: U8, kind: GgmlType) -> Float32:
    """The weights in stored rows [rows, bytes]. Raises NotImplementedError for a type that the gguf package cannot read."""
    with np.errstate(all="ignore"):  # the scales of a broken file may be no numbers
        return np.asarray(dequantize(stored, GGMLQuantizationType(kind.number)), np.float32)


# Which files make a model. Names alone tell: the parts of a split model have numbers in them. Letter case is ignored,
# since llama.cpp loads a file by its contents.


def is_gguf(name: str) -> bool:
    """Whether a file's name says that it is a GGUF file."""
    return name.lower().endswith(SUFFIX)


def is_projector(name: str) -> bool:
    """Whether a file's name says that it is a vision projector, as llama.cpp tells them apart on the hub."""
    return PROJECTOR_NAME in PurePosixPath(name).name.lower()


def model_files(names: Sequence[str], selected: str | None = None) -> dict[str, list[str]]:
    """The GGUF files among `names` by model, parts in order; with `selected` the one model that this file is of."""
    models: dict[str, list[str]] = {}
    for name in sorted({*filter(is_gguf, names), *([selected] if selected is not None else [])}):
        models.setdefault(_model_name(name), []).append(name)
    if selected is not None:
        return {_model_name(selected): models[_model_name(selected)]}
    return models


def open_gguf_model(location: ArtefactLocation, files: Sequence[str]) -> GgufModel:
    """Read the headers of the `files` that make one model, parts in order."""
    parts = {}
    for file in files:
        with location.open(file) as source:
            parts[file] = parse_gguf(source)
    return GgufModel(_model_name(files[0]), location, parts, tuple(missing_parts(files)))


def missing_parts(files: Sequence[str]) -> list[str]:
    """The parts of a split model that are not among its `files`, by their names."""
    return [part for part in _expected_parts(files) if part not in files]


def open_gguf_file(path: Path) -> GgufModel:
    """Read the headers of the model that a local file is, or is a part of."""
    location = LocalLocation(path.parent, path.name)
    names = location.names if _PART.fullmatch(path.name) else ()
    return open_gguf_model(location, next(iter(model_files(names, path.name).values())))


def _expected_parts(names: Sequence[str]) -> list[str]:
    """The names that all parts of a model have, by the number in the name of the first."""
    match = _PART.fullmatch(names[0])
    if match is None:
        return list(names)
    return [f"{match[1]}-{number:05}-of-{match[3]}{match[4]}" for number in range(1, int(match[3]) + 1)]


def _model_name(file_name: str) -> str:
    match = _PART.fullmatch(file_name)
    return f"{match[1]}{match[4]}" if match else file_name
