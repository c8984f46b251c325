"""JSON from files, servers and texts, read by one reader with errors that say what is wrong; and the text to write."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from qtool.errors import ModelError, reason
from qtool.escaping import json_escaped
from qtool.redaction import redacted

MAX_BYTES: Final = 64 << 20
"""The tokenizers of the supported families have 11 MB, the largest known 35 MB."""
_CHUNK: Final = 1 << 20
_HALF_CHARACTER: Final = re.compile("[\ud800-\udfff]")
"""What JSON can escape and UTF-8 cannot encode."""
_MOST_DIGITS: Final = 308
"""Of a whole number: any float can hold it. Transformers writes 10**30 for "no limit"."""
_DEEPEST: Final = 200
"""Brackets within brackets: so few that whoever walks through the value needs no care for the stack."""


class JsonError(ValueError):
    """What is wrong with a JSON text, as the end of a sentence without its full stop."""


def json_value(content: str | bytes | bytearray, *, allow_nan: bool = False) -> Any:
    """The value of a JSON text. Raises JsonError, and nothing else, for any content.

    Numbers that no float holds and nesting deeper than 200 brackets are refused, NaN and infinity unless `allow_nan`.
    """
    try:
        text = content if isinstance(content, str) else bytes(content).decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonError(f"it is not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        constant = float if allow_nan else _refused_constant
        value = json.loads(text, parse_int=_whole, parse_float=_number, parse_constant=constant)
    except RecursionError:
        raise JsonError("it is nested too deeply") from None
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(str(error)) from None
    if _is_deeper(value, _DEEPEST):
        raise JsonError("it is nested too deeply")
    return value


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise JsonError(f"it contains a number of {len(digits):,} digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise JsonError(f"it contains the number {digits[:40]}, which is too large")
    return value


def _refused_constant(name: str) -> NoReturn:
    raise JsonError(f"it contains {name}, which is no JSON")


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether the value has more than `levels` levels; without recursion, since the depth is what is in question."""
    level = [value]
    for _ in range(levels + 1):
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON object (or list) in `path`. Raises ModelError with the file and what is wrong with it."""
    try:
        data = read_bounded(path, MAX_BYTES)
    except FileNotFoundError:
        raise ModelError(f"{path.name} is missing from {path.parent}.") from None
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {reason(error)}.") from None
    return parse_json(data, path, kind)


def parse_json(data: bytes, name: object, kind: type = dict) -> Any:
    """The JSON object (or list) in the bytes of the file `name`. Raises ModelError."""
    try:
        value = json_value(data)
    except JsonError as error:
        raise ModelError(f"{name} is not valid JSON: {error}.") from None
    if not isinstance(value, kind):
        raise ModelError(f"{name} contains a JSON {type(value).__name__}; expected a {kind.__name__}.")
    return value


def read_bounded(path: Path, limit: int, *, may_be_pipe: bool = False) -> bytes:
    """The bytes of a file of at most `limit` bytes. Raises OSError, for a device or a larger file too.

    A pipe, which `<(command)` passes, is read with `may_be_pipe` only: one in a model's folder would never end.
    """
    try:
        mode = path.stat().st_mode
    except ValueError:  # NUL in the name
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or (may_be_pipe and stat.S_ISFIFO(mode))):
        raise OSError(errno.EINVAL, "it is a device or pipe")
    chunks: list[bytes] = []
    left = limit
    with path.open("rb") as file:
        while left >= 0 and (chunk := file.read(_CHUNK)):
            chunks.append(chunk)
            left -= len(chunk)
    if left < 0:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes")
    return b"".join(chunks)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """`value` as the indented UTF-8 text that model repositories keep."""
    text = json.dumps(value, indent=4, ensure_ascii=False) + "\n"
    return _HALF_CHARACTER.sub(lambda half: f"\\u{ord(half[0]):04x}", text).encode()


def json_line(value: Mapping[str, Any]) -> str:
    """`value` as one line of a JSON Lines file, without its end: readable, safe to show, and UTF-8 can encode it."""
    return json_escaped(json.dumps(redacted(value), ensure_ascii=False))
