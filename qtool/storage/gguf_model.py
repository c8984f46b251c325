"""A GGUF model, of one file or of several parts, as its headers describe it.

Rule: a field is used only if it has the type that llama.cpp expects; another counts as missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from gguf.constants import GGUFValueType, LlamaFileType

from qtool.storage.gguf import GgufFile, GgufTensor, Value

_PART: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
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
NO_VALUE: Final = Value(GGUFValueType.UINT8, None)


@dataclass(frozen=True)
class GgufModel:
    """One or more parts under one name; the first part's fields speak for all. `target` is how a command names it."""

    name: str
    target: str
    parts: Mapping[str, GgufFile]
    missing_parts: tuple[str, ...]

    @property
    def metadata(self) -> Mapping[str, Value]:
        """The fields."""
        return next(iter(self.parts.values())).metadata

    @cached_property
    def tensors(self) -> Mapping[str, GgufTensor]:
        """The tensors of all parts."""
        return {name: tensor for part in self.parts.values() for name, tensor in part.tensors.items()}

    def integer(self, key: str) -> int | None:
        """A whole number."""
        value = self.metadata.get(key, NO_VALUE)
        return value.data if value.kind in _INTEGERS and not value.is_array else None

    def number(self, key: str) -> float | None:
        """A number with a fraction."""
        value = self.metadata.get(key, NO_VALUE)
        return value.data if value.kind in _FLOATS and not value.is_array else None

    def text(self, key: str) -> str | None:
        """A text."""
        value = self.metadata.get(key, NO_VALUE)
        return value.data if value.kind is GGUFValueType.STRING and not value.is_array else None

    def flag(self, key: str) -> bool | None:
        """A yes or no."""
        value = self.metadata.get(key, NO_VALUE)
        return value.data if value.kind is GGUFValueType.BOOL and not value.is_array else None

    def elements(self, key: str, kinds: frozenset[GGUFValueType]) -> Sequence[Any]:
        """A list whose elements are of one of `kinds`; empty where there is none."""
        value = self.metadata.get(key, NO_VALUE)
        return value.data if value.is_array and value.kind in kinds else ()

    def integers(self, key: str) -> Sequence[int]:
        """A list of whole numbers."""
        return self.elements(key, _INTEGERS)

    def texts(self, key: str) -> Sequence[str]:
        """A list of texts."""
        return self.elements(key, frozenset({GGUFValueType.STRING}))

    @property
    def file_type(self) -> str:
        """What `general.file_type` stands for, such as Q4_K_M."""
        number = self.integer("general.file_type")
        known = {int(each): each.name for each in LlamaFileType}
        return re.sub("^(MOSTLY|ALL)_", "", known[number]) if number in known else "unknown"


def model_files(names: Sequence[str], selected: str | None) -> dict[str, list[str]]:
    """The GGUF files among `names` by model, parts in order; with `selected` the one model that this file is of."""
    models: dict[str, list[str]] = {}
    for name in sorted(name for name in {*names, selected} if name and (name.endswith(".gguf") or name == selected)):
        models.setdefault(_model_name(name), []).append(name)
    if selected is not None:
        return {_model_name(selected): models[_model_name(selected)]}
    return models


def expected_parts(names: Sequence[str]) -> list[str]:
    """The names that all parts of a model have, by the number in the name of the first."""
    match = _PART.fullmatch(names[0])
    if match is None:
        return list(names)
    return [f"{match[1]}-{number:05}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1)]


def _model_name(file_name: str) -> str:
    match = _PART.fullmatch(file_name)
    return f"{match[1]}.gguf" if match else file_name
