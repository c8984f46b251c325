"""The options of a job: keyword-only dataclasses that take what a person would pass, checked and converted in one place."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from qtool.errors import UsageError
from qtool.redaction import keep_secret

_LONGEST_SHOWN: Final = 80


class Options:
    """Base of every options dataclass: a field takes a str for a Path, "embed" for Task.EMBED, one item for a tuple."""

    def __post_init__(self) -> None:
        if not is_dataclass(self):
            return
        types = get_type_hints(type(self))
        for field in fields(self):
            value = coerce(field.name, getattr(self, field.name), types[field.name])
            object.__setattr__(self, field.name, value)  # the dataclasses are frozen
            if field.name == "token":
                keep_secret(value)


def coerce(name: str, value: object, expected: Any) -> Any:
    """`value` as the type `expected`, a class or a union as written in an annotation.

    A str or an os.PathLike becomes a Path or a str, a value becomes the member of its Enum, a str becomes a class that
    parses it, and a single item becomes a tuple of one. Raises UsageError, which calls the value `name`.
    """
    for kind in _alternatives(expected):
        try:
            return _converted(name, value, kind)
        except (TypeError, ValueError):  # noqa: PERF203 - a value has a handful of kinds
            continue
    shown = repr(value)
    if len(shown) > _LONGEST_SHOWN:
        shown = f"{shown[:_LONGEST_SHOWN]}..."
    raise UsageError(f"Invalid {name} {shown}: expected {_description(expected)}.")


def _alternatives(expected: Any) -> tuple[Any, ...]:
    return get_args(expected) if get_origin(expected) in (Union, UnionType) else (expected,)


def _converted(name: str, value: object, kind: Any) -> Any:
    """`value` as one `kind`. Raises TypeError or ValueError where it is none."""
    if kind in _SIMPLE:
        return _SIMPLE[kind](value)
    if get_origin(kind) is Literal:
        return get_args(kind)[get_args(kind).index(value)]
    if get_origin(kind) is tuple:
        return _items(name, value, get_args(kind)[0])
    if issubclass(kind, Enum):
        return kind(value)
    if isinstance(value, str) and hasattr(kind, "parse"):
        return kind.parse(value)
    return _instance(value, kind)


def _instance(value: object, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _number(value: Any) -> float:
    if isinstance(value, (bool, str)):
        raise TypeError
    return float(value)


def _text(value: Any) -> str:
    text = os.fspath(value)
    if not isinstance(text, str):
        raise TypeError
    return text


def _path(value: Any) -> Path:
    if not _text(value):
        raise ValueError
    return Path(value)


_SIMPLE: Final[Mapping[Any, Callable[[Any], Any]]] = {
    type(None): lambda value: _instance(value, type(None)),
    bool: lambda value: _instance(value, bool),
    int: _whole,
    float: _number,
    str: _text,
    Path: _path,
}


def _items(name: str, value: object, kind: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, os.PathLike)) or not isinstance(value, Iterable):
        value = (value,)
    return tuple(coerce(name, item, kind) for item in value)


def _description(expected: Any) -> str:
    """What could have been passed, in words."""
    words = [_words(kind) for kind in _alternatives(expected) if kind is not type(None)]
    return _listed(words)


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return _listed([str(choice) for choice in get_args(kind)])
    if get_origin(kind) is tuple:
        return f"a list, each item {_words(get_args(kind)[0])}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _listed([str(member.value) for member in kind])
    known = {
        str: "text or a path",
        Path: "a path",
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        ByteSize: "a size such as 8GB",
    }
    return known.get(kind) or f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"


def _listed(words: list[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


_UNITS: Final = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_size(size: int | str) -> int:
    """Bytes in a number of them or a text such as 500MB, 5GB or 1GiB. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", str(size).strip().upper())
    nbytes = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if nbytes < 1:
        raise UsageError(
            f"Invalid size {str(size)!r}: expected a number with MB, MiB, GB or GiB.", "For example 500MB, 5GB or 1GiB."
        )
    return nbytes


class ByteSize(int):
    """A number of bytes as an option: a text such as 8GB is parsed."""

    @classmethod
    def parse(cls, text: str) -> ByteSize:
        """The number of bytes that `text` means. Raises UsageError."""
        return cls(parse_size(text))


Memory = Literal["auto"] | ByteSize | int
"""How much memory a job may take: bytes, a text such as 8GB, or "auto" for what is free."""
