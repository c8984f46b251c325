"""Secrets, and text without them: the one place that decides what a key or token looks like in what qtool shows or writes.

A secret is registered where it is read. It is found again as it was sent and as servers echo it: in another case,
escaped for JSON, HTML or a URL, in hexadecimal, in the base64 of basic authentication, and in part where a text was cut.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import unquote

REPLACEMENT: Final = "[redacted]"
API_KEY: Final = "QTOOL_API_KEY"
"""The only variable whose value is sent to a scoring server: a key for another service must not reach it."""
_VARIABLES: Final = (API_KEY, "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")

_SHORTEST: Final = 4
"""A shorter value is no secret: it stands in every text, and can be guessed."""
_WHOLE_WORD: Final = 8
"""A shorter one is found as a whole word only."""
_LEAST_START: Final = 8
_LEAST_RUN: Final = 12
"""How many characters of a secret are redacted: those that it begins with, and any others in a row."""
_BLOCK: Final = 6
"""A run of `_LEAST_RUN` characters contains a whole block, wherever it begins."""

_secrets: set[str] = set()
_needles: dict[str, tuple[str, ...]] = {}


def keep_secret(value: object) -> None:
    """From now on, `value` is redacted wherever it would be shown or written."""
    if isinstance(value, str) and _is_secret(value.strip()):
        _secrets.add(value.strip())


def _is_secret(value: str) -> bool:
    """Whether a value can be told from other text; a few digits would be found in scores."""
    return len(value) >= _SHORTEST and not (len(value) < _WHOLE_WORD and value.isdecimal())


T = TypeVar("T")


@cache
def _stored_tokens() -> frozenset[str]:
    """The token that `hf auth login` keeps, which huggingface_hub sends without being asked."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    path = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    try:
        token = path.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, ValueError, RuntimeError):
        return frozenset()
    return frozenset({token}) if _is_secret(token) else frozenset()


def redacted(value: T) -> T:
    """`value` without secrets: a text, or all texts in mappings, sequences and dataclasses."""
    known = _known()
    return map_texts(value, lambda text: _without(text, known)) if known else value


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text in it changed; the same object where nothing changed. Enums and arrays stay."""
    if isinstance(value, str):
        changed = value if isinstance(value, Enum) else change(value)
        return value if changed == value else changed
    if isinstance(value, Mapping):
        entries = {map_texts(key, change): map_texts(each, change) for key, each in value.items()}
        same = all(a is c and b is d for (a, b), (c, d) in zip(value.items(), entries.items(), strict=False))
        return value if same and len(entries) == len(value) else entries
    if isinstance(value, list | tuple):
        items = [map_texts(each, change) for each in value]
        if all(before is after for before, after in zip(value, items, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        before = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        after = {name: map_texts(each, change) for name, each in before.items()}
        return value if all(before[name] is after[name] for name in before) else replace(value, **after)
    return value


def _known() -> list[str]:
    found = _secrets | _stored_tokens()
    for name in _VARIABLES:
        value = os.environ.get(name, "").strip()
        if _is_secret(value):
            found.add(value)
    return sorted(found, key=len, reverse=True)


def _without(text: str, secrets: list[str]) -> str:
    if len(text) < _SHORTEST:
        return text
    plain, places = _unescaped(text)
    spans = [span for secret in secrets for span in _spans(plain, secret)]
    if not spans:
        return text
    pieces, end = [], 0
    for first, last in sorted(spans):
        start, stop = places[first], places[last]
        if start >= end:
            pieces += [text[end:start], REPLACEMENT]
        end = max(end, stop)
    return "".join([*pieces, text[end:]])


# Escapes, undone: one unit of a text is a character or the escape of one, and nested escapes are undone twice.

_ESCAPE: Final = re.compile(
    r"""(?:%[0-9a-f]{2})+ | \\+u[0-9a-f]{4} | \\+x[0-9a-f]{2} | \\+["'/\\] | &\#x?[0-9a-f]{1,7};? | &[a-z]{2,8};""",
    re.IGNORECASE | re.VERBOSE,
)
_TIMES: Final = 2


def _unescaped(text: str) -> tuple[str, list[int] | range]:
    """The text without escapes, and where in `text` each of its characters begins, and at last the end of `text`."""
    places: list[int] | range = range(len(text) + 1)
    for _ in range(_TIMES):
        if not _ESCAPE.search(text):
            break
        pieces: list[str] = []
        starts: list[int] = []
        end = 0
        for match in _ESCAPE.finditer(text):
            meaning = _meaning(match[0])
            pieces += [text[end : match.start()], meaning]
            starts += places[end : match.start()]
            starts += [places[match.start()]] * len(meaning)
            end = match.end()
        starts += places[end:]
        text, places = "".join(pieces) + text[end:], starts
    return text, places


def _meaning(escape: str) -> str:
    if escape[0] == "%":
        return unquote(escape, errors="replace")
    if escape[0] == "&":
        return unescape(escape)
    body = escape.lstrip("\\")
    if len(body) > 1:
        return chr(int(body[1:], 16))
    return body


# Where a secret stands in a plain text. Blocks of it are looked for, and each find is extended to both sides.


def _spans(text: str, secret: str) -> list[tuple[int, int]]:
    if len(secret) < _WHOLE_WORD:
        word = rf"(?<![^\W_]){re.escape(secret)}(?![^\W_])"
        return [match.span() for match in re.finditer(word, text, re.IGNORECASE)]
    if secret not in _needles:
        _needles[secret] = _forms(secret)
    lowered = _lowered(text)
    return [span for needle in _needles[secret] for span in _runs(lowered, needle)]


def _lowered(text: str) -> str:
    """The text in lower case, of the same length: that of a few letters, such as İ, has more characters."""
    lowered = text.lower()
    return lowered if len(lowered) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _forms(secret: str) -> tuple[str, ...]:
    content = secret.encode("utf-8", "surrogateescape")
    forms = [secret, content.hex()]
    for before in range(3):  # base64 depends on how many bytes precede, such as those of a user's name
        encoded = base64.b64encode(bytes(before) + content).decode().rstrip("=")
        core = encoded[(0, 2, 3)[before] : len(encoded) - ((before + len(content)) % 3 != 0)]
        forms += [core, core.replace("+", "-").replace("/", "_")]
    return tuple(dict.fromkeys(_lowered(form) for form in forms if len(form) >= _WHOLE_WORD))


def _runs(text: str, needle: str) -> list[tuple[int, int]]:
    found = []
    for at in range(0, len(needle) - _BLOCK + 1, _BLOCK):
        block, place = needle[at : at + _BLOCK], -1
        while (place := text.find(block, place + 1)) >= 0:
            before = 0
            while before < min(at, place) and text[place - before - 1] == needle[at - before - 1]:
                before += 1
            after = _BLOCK
            while at + after < len(needle) and text[place + after : place + after + 1] == needle[at + after]:
                after += 1
            length = before + after
            is_start = before == at and length >= _LEAST_START
            if is_start or length >= min(_LEAST_RUN, len(needle)):
                found.append((place - before, place + after))
    return found
