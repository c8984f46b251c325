"""A row of a data set as a query with its documents.

Rule: strict. A column that is missing, empty or of another kind than its role asks for is an error that names the row;
only that nothing is negative may be.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qtool.errors import QtoolError, UsageError
from qtool.inputs.dataset_source import read_picture
from qtool.inputs.items import is_text
from qtool.inputs.panel_lines import HIGHEST_GRADE
from qtool.inputs.sources import is_url, shown

Columns = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Side:
    """A query or a document, a text or a picture's address or both, with its grade."""

    text: str | None = None
    image: str | None = None
    label: float | None = None

    @property
    def key(self) -> str:
        """Equal for sides of equal content."""
        return hashlib.sha256(json.dumps([self.text, self.image]).encode()).hexdigest()

    @property
    def line(self) -> dict[str, Any]:
        """As a panel file writes it."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Row:
    """A query with its documents: `positives` and `negatives`, or, where `is_listed`, all of them as positives."""

    id: str | None
    query: Side
    positives: tuple[Side, ...]
    negatives: tuple[Side, ...] = ()
    is_listed: bool = False

    @property
    def key(self) -> str:
        """Equal for rows of equal queries."""
        return self.query.key

    def joined(self, other: Row) -> Row:
        """This row with the documents that another one of its query adds; one that is positive there is not negative."""
        added = replace(
            self,
            positives=(*self.positives, *other.positives),
            negatives=(*self.negatives, *other.negatives),
        )
        return added.distinct

    @property
    def distinct(self) -> Row:
        """This row with each document once, by the best that is said of it: as a positive, and with its highest label."""
        positives: dict[str, Side] = {}
        for side in self.positives:
            known = positives.setdefault(side.key, side)
            if (side.label or 0) > (known.label or 0):
                positives[side.key] = side
        negatives = {side.key: side for side in self.negatives if side.key not in positives}
        return replace(self, positives=tuple(positives.values()), negatives=tuple(negatives.values()))


def json_line(row: Row, place: int) -> bytes:
    """The row as a line of a panel file, newline included; `place` names queries that have no id."""
    positives = row.positives if row.is_listed else tuple(replace(side, label=1.0) for side in row.positives)
    documents = [*positives, *(replace(side, label=0.0) for side in row.negatives)]
    content = {"id": row.id or f"q{place}", "query": row.query.line, "documents": [side.line for side in documents]}
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def read_row(values: Mapping[str, Any], columns: Columns, where: str) -> Row:
    """Read a row by its columns; `where` opens error messages."""
    for column in (column for named in columns.values() for column in named):
        if column not in values:
            raise UsageError(f"{where}: there is no column {column!r}.", f"There are {', '.join(values)}.")
    (query,) = _sides(values, columns, "query", where)[:1]
    found = _values(values, columns, "id")
    row_id = str(found[0]) if found and found[0] is not None else None
    if "positive" in columns or "positive_image" in columns:
        negatives = () if _has_none(values, columns, "negative") else _sides(values, columns, "negative", where)
        return Row(row_id, query, _sides(values, columns, "positive", where), negatives).distinct
    documents = _sides(values, columns, "documents", where)
    return Row(row_id, query, _labelled(documents, values, columns, where), is_listed=True).distinct


def _has_none(values: Mapping[str, Any], columns: Columns, role: str) -> bool:
    """Whether the role has no column, or none that holds anything in this row."""
    found = (values[column] for name in (role, f"{role}_image") for column in columns.get(name, ()))
    return all(value is None or value == [] for value in found)


def _labelled(documents: tuple[Side, ...], values: Mapping[str, Any], columns: Columns, where: str) -> tuple[Side, ...]:
    if "labels" not in columns:
        return documents
    labels = _values(values, columns, "labels")
    if len(labels) != len(documents):
        raise UsageError(f"{where}: {len(labels)} labels for {len(documents)} documents.")
    return tuple(
        replace(document, label=_grade(label, where)) for document, label in zip(documents, labels, strict=True)
    )


def _grade(value: Any, where: str) -> float:
    if isinstance(value, bool | int | float) and 0 <= value <= HIGHEST_GRADE:
        return float(value)
    raise UsageError(f"{where}: the label {value!r} is no grade from 0 to {HIGHEST_GRADE}.")


def _sides(values: Mapping[str, Any], columns: Columns, role: str, where: str) -> tuple[Side, ...]:
    """The sides that play a role: texts, pictures, or both by twos."""
    texts: list[str | None] = [_text(value, role, where) for value in _values(values, columns, role)]
    images: list[str | None] = [_image(value, role, where) for value in _values(values, columns, f"{role}_image")]
    if texts and images and len(texts) != len(images):
        raise UsageError(f"{where}: {len(texts)} texts and {len(images)} pictures for {role}.")
    if not texts and not images:
        raise UsageError(f"{where}: nothing for {role}.")
    count = max(len(texts), len(images))
    return tuple(Side(*pair) for pair in zip(texts or [None] * count, images or [None] * count, strict=True))


def _values(values: Mapping[str, Any], columns: Columns, role: str) -> list[Any]:
    found: list[Any] = []
    for column in columns.get(role, ()):
        value = values[column]
        found += value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    return found


def _text(value: Any, role: str, where: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{where}: {role} is no text but {_kind(value)}.")
    if not is_text(value):
        raise UsageError(f"{where}: {role} holds half of a character (a lone surrogate).")
    return value


def _image(value: Any, role: str, where: str) -> str:
    """An address; the bytes of a picture, or of the file that it is kept in, become a `data:` URL."""
    if isinstance(value, str) and is_url(value):
        return value
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (None, None)
    if content is None and isinstance(path, str):
        content = _stored(path, f"{where}: {role}_image")
    if isinstance(content, bytes):
        return f"data:;base64,{base64.b64encode(content).decode()}"
    raise UsageError(f"{where}: {role}_image is no picture or http(s) address but {_kind(value)}.")


def _stored(path: str, where: str) -> bytes:
    try:
        return read_picture(path)
    except QtoolError as error:
        raise type(error)(f"{where}: cannot read {shown(path)}: {error.message}", error.hint) from error


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
