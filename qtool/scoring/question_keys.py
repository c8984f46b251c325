"""The key of a question: a hash of all that a scorer is shown of it.

Ids, labels and origins do not count, files count by their bytes and pictures in memory by their pixels. What lies behind
an http(s) address is not fetched: the address counts instead, and such a key is not kept from one run to the next.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Final

from PIL.Image import Image

from qtool.errors import UsageError
from qtool.inputs.items import Item, Pair
from qtool.inputs.pictures import to_rgb

_NOT_SHOWN: Final = ("id", "label", "origin")
_BLOCK: Final = 1 << 20
_ELSEWHERE: Final = ("http://", "https://")
_ADDRESSES: Final = ("data:", *_ELSEWHERE)


def names_content(question: Pair | Item) -> bool:
    """Whether the question's key stands for its content for ever: no picture or video lies behind an http(s) address."""
    items = (question.query, question.document) if isinstance(question, Pair) else (question,)
    sources = [source for item in items for source in (*item.image, *(video.source for video in item.video))]
    flat = [part for source in sources for part in (source if isinstance(source, tuple) else (source,))]
    return not any(isinstance(source, str) and source.startswith(_ELSEWHERE) for source in flat)


class QuestionKeys:
    """Keys of questions that are asked together; a file or picture that recurs is read once."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}
        self._pictures: dict[int, tuple[Image, str]] = {}

    def key(self, question: Pair | Item) -> str:
        """SHA-256 of the question. Raises UsageError where a file cannot be read."""
        if isinstance(question, Pair):
            # A prompt shows the query's instruction, never the document's.
            document = question.document.with_instruction(None)
            return _sha256(["pair", self._item(question.query), self._item(document)])
        return _sha256(["item", self._item(question)])

    def _item(self, item: Item) -> dict[str, Any]:
        shown = {field.name: getattr(item, field.name) for field in fields(item) if field.name not in _NOT_SHOWN}
        try:
            return {
                name: value if name in ("text", "instruction") else self._media(value) for name, value in shown.items()
            }
        except OSError as error:
            raise UsageError(f"{item.name}: cannot read {error.filename}: {error.strerror}.") from error

    def _media(self, value: Any) -> Any:
        if isinstance(value, str):
            return value if value.startswith(_ADDRESSES) else self._file(value)
        if isinstance(value, Image):
            return self._picture(value)
        if isinstance(value, tuple | list):
            return [self._media(each) for each in value]
        if is_dataclass(value):
            return {field.name: self._media(getattr(value, field.name)) for field in fields(value)}
        return value

    def _file(self, path: str) -> str:
        if path not in self._files:
            digest = hashlib.sha256()
            with Path(path).open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
            self._files[path] = digest.hexdigest()
        return self._files[path]

    def _picture(self, picture: Image) -> str:
        if id(picture) not in self._pictures:
            seen = to_rgb(picture)
            digest = hashlib.sha256(f"{seen.size} ".encode() + seen.tobytes()).hexdigest()
            self._pictures[id(picture)] = picture, digest  # the picture is kept, so that no other gets its id
        return self._pictures[id(picture)][1]


def _sha256(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
