"""The vocabulary in which an architecture is declared: tasks, tensors and their shapes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from qtool.errors import ModelError

Config = Mapping[str, Any]


class Task(str, Enum):
    """What a model is for; reranker and embedder share their architectures."""

    RERANK = "rerank"
    EMBED = "embed"


class Presence(Enum):
    """Whether a checkpoint must hold a tensor."""

    REQUIRED = "required"
    OPTIONAL = "optional"
    DUPLICATE = "duplicate"  # may lie in the file but no engine reads it: the tied head beside its embedding


@dataclass(frozen=True)
class TensorSpec:
    """One tensor an architecture may have.

    `fused_group` names the matrix product into which engines merge this weight with its partners: they must share
    one global scale, since vLLM takes the maximum of a group without rescaling the others.
    """

    hf_name: str
    shape: tuple[int, ...]
    fused_group: str = ""
    presence: Presence = Presence.REQUIRED

    @property
    def module(self) -> str:
        """The module that owns the tensor, as recipes and `exclude_modules` name it."""
        return self.hf_name.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One value of `architectures` in config.json. `tensors` states every tensor that such a checkpoint may have.

    `family` is the key of its family, `head` the module that ranks: `lm_head` or `score`. `prefix` is what canonical names start with and base-model checkpoints (Qwen3-Embedding) leave out.
    `unquantized` are the modules, or one pattern for many, that no engine reads quantized: `exclude_modules`.
    `kept_pattern` gives the pattern by which an engine that renames the decoder finds a fused group that stays, and
    `renamed` how it changes the beginnings of names in `exclude_modules`.
    """

    name: str
    family: str
    is_vision: bool
    head: str
    unquantized: tuple[str, ...]
    prefix: str
    tensors: Callable[[Config], Iterator[TensorSpec]]
    kept_pattern: Callable[[str], str] | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)


def dimension(config: Config, field: str, default: int | None = None) -> int:
    """The positive integer `field` of a config, or a ModelError that names it."""
    value = config.get(field, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config.json: {field} is {_shown(value)}, expected a positive integer.")
    return value


def real_number(config: Config, field: str, default: float) -> float:
    """The number `field` of a config, or a ModelError that names it."""
    value = config.get(field, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ModelError(f"config.json: {field} is {_shown(value)}, expected a number.")
    return value


def layers(config: Config, field: str) -> list[int]:
    """The list of layers `field` of a config, empty where there is none, or a ModelError that names it."""
    value = config.get(field, [])
    if not isinstance(value, list) or not all(type(layer) is int for layer in value):
        raise ModelError(f"config.json: {field} is {_shown(value)}, expected a list of layers.")
    return value


def as_json(value: object) -> str:
    """A value of a file as JSON writes it, shortened, for messages."""
    return json.dumps(value, default=str)[:80]


def _shown(value: object) -> str:
    return "missing or null" if value is None else as_json(value)


def section(config: Config, field: str) -> Config:
    """The object `field` of a config, or a ModelError that names it."""
    value = config.get(field)
    if not isinstance(value, Mapping):
        raise ModelError(f"config.json: {field} is missing or not an object.")
    return value
