"""Panels out of data sets: a Hugging Face id, a folder or a file that the package `datasets` reads."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from qtool.errors import NetworkError, QtoolError, UsageError
from qtool.extras import require_extra
from qtool.inputs.items import is_text
from qtool.inputs.media import is_url, opened, shown
from qtool.inputs.panel_lines import HIGHEST_GRADE
from qtool.inputs.panels import Panel, panel_of

# The rows of a data set, streamed by the package `datasets`. No more is fetched than is read, and pictures come as
# the bytes that the data set holds.


_SPLITS: Final = ("test", "validation", "train")
_PICTURE_BYTES: Final = 128 << 20
_PICTURE_SECONDS: Final = 60.0
_FORMATS: Final = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Rows:
    """Rows with the names by which messages call them, and the licence of the data set as far as it tells."""

    rows: Iterator[tuple[str, Mapping[str, Any]]]
    license: str


def open_rows(path: str, config: str | None, split: str | None, revision: str | None) -> Rows:
    """The rows of one split. Raises UsageError where there is none, NetworkError where the hub does not answer."""
    try:
        splits = _opened(path, config, revision)
    except Exception as error:  # `datasets` and what it stands on share no base class below Exception
        raise _explained(path, error) from error
    found = _split(path, splits, split)
    return Rows(_rows(path, _undecoded(found)), str(found.info.license or ""))


def read_picture(path: str) -> bytes:
    """A picture that a data set keeps in a file of its own, here or on the hub, perhaps within an archive."""
    if "://" not in path:
        found = opened(path, _PICTURE_BYTES, _PICTURE_SECONDS)
        return found.read_bytes() if isinstance(found, Path) else found.getvalue()
    from datasets.utils.file_utils import xopen

    try:
        with xopen(path, "rb") as file:
            content: bytes = file.read()
    except Exception as error:  # as above
        raise _explained(path, error) from error
    return content


def _opened(path: str, config: str | None, revision: str | None) -> Any:
    require_extra("datasets", f"Reading data set {path}")
    import datasets

    local = Path(path)
    if not local.exists() and (local.suffix in _FORMATS or path.startswith((".", "~", "/"))):
        raise UsageError(f"There is no file or folder {path}.")
    if not local.is_file():
        return datasets.load_dataset(path, config, revision=revision, streaming=True)
    if local.suffix not in _FORMATS:
        raise UsageError(f"{path} is no data set.", f"Files of one end in {', '.join(_FORMATS)}.")
    return datasets.load_dataset(_FORMATS[local.suffix], data_files=path, streaming=True)


def _split(path: str, splits: Mapping[str, Any], wanted: str | None) -> Any:
    for name in (wanted,) if wanted else (*_SPLITS, *splits):
        if name in splits:
            return splits[name]
    raise UsageError(f"Data set {path} has no split {wanted!r}.", f"It has {', '.join(splits)}.")


def _undecoded(rows: Any) -> Any:
    import datasets

    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return rows


def _rows(path: str, rows: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    number = 0
    try:
        for number, values in enumerate(rows, start=1):
            yield f"Data set {path}, row {number}", values
    except QtoolError:
        raise
    except Exception as error:  # as above
        raise _explained(f"{path}, after row {number}", error) from error


def _explained(path: str, error: Exception) -> QtoolError:
    import httpx

    if isinstance(error, QtoolError):
        return error
    if isinstance(error, ConnectionError | httpx.TransportError | TimeoutError):
        return NetworkError(f"Data set {path} could not be read: {error}", "Check the network.")
    return UsageError(f"Data set {path} could not be read: {error}")


# A row of a data set as a query with its documents. Strict. A column that is missing, empty or of another kind than
# its role asks for is an error that names the row; only that nothing is negative may be.


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


# Panels out of data sets: a Hugging Face id, a folder or a file that the package `datasets` reads. What is taken
# becomes the lines of a panel file, pictures included, so that its hash covers all that is scored; the same data set,
# columns, limit and seed give the same lines.


ROLES: Final = (
    *("id", "query", "query_image", "positive", "positive_image", "negative", "negative_image"),
    *("documents", "documents_image", "labels"),
)
_SPELLING: Final = re.compile(r"(?P<path>[^#]+?)(:(?P<config>[^:#/]+))?(#(?P<split>[^#]+))?")


@dataclass(frozen=True)
class DatasetSpec:
    """Which rows of a data set make a panel.

    `columns` maps a role (ROLES) to the columns that play it: a query, and either `documents`, with `labels` if there
    are any, or `positive` and `negative`. For a query without a negative `negatives` are drawn from the other queries'
    positives. A column holds a value or a list of them; rows of equal queries are one query. Without `split` it is the
    first of test, validation and train that there is. `limit` counts queries.
    """

    path: str
    columns: Mapping[str, tuple[str, ...]]
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    limit: int = 100
    seed: int = 0
    negatives: int = 7
    instruction: str | None = None

    @property
    def name(self) -> str:
        """As the command line spells it."""
        return "".join((self.path, (self.config and f":{self.config}") or "", (self.split and f"#{self.split}") or ""))


def parse_dataset(text: str, columns: str, **options: Any) -> DatasetSpec:
    """`ID[:CONFIG][#SPLIT]` and `query=COLUMN,positive=COLUMN,…` as --dataset and --columns take them."""
    match = _SPELLING.fullmatch(text)
    if not match:
        raise UsageError(f"{text!r} is no data set.", "Write it as ID, ID:CONFIG, ID#SPLIT or ID:CONFIG#SPLIT.")
    spec = DatasetSpec(match["path"], _columns(columns), match["config"], match["split"], **options)
    _check(spec)
    return spec


def load_dataset_panel(spec: DatasetSpec) -> Panel:
    """The panel that `spec` describes; its hash is that of its lines. Raises UsageError, or NetworkError from the hub."""
    _check(spec)
    lines, licence = dataset_lines(spec)
    panel = replace(panel_of(lines, Path(spec.name)), name=spec.name, license=licence)
    if spec.instruction is None:
        return panel
    told = (replace(query, item=query.item.with_instruction(spec.instruction)) for query in panel.queries)
    return replace(panel, queries=tuple(told))


def dataset_lines(spec: DatasetSpec) -> tuple[bytes, str]:
    """The lines of a panel file without a header, and the data set's licence."""
    source = open_rows(spec.path, spec.config, spec.split, spec.revision)
    rows = _taken((read_row(values, spec.columns, where) for where, values in source.rows), spec.limit)
    if not rows:
        raise UsageError(f"Data set {spec.name} holds no row.")
    return b"".join(json_line(row, place) for place, row in enumerate(_judged(rows, spec), start=1)), source.license


def _columns(text: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for part in text.split(","):
        role, _, column = (piece.strip() for piece in part.partition("="))
        if role not in ROLES or not column:
            raise UsageError(f"{part!r} maps no column.", f"Write role=column; roles are {', '.join(ROLES)}.")
        found[role] = (*found.get(role, ()), column)
    return found


def _check(spec: DatasetSpec) -> None:
    has = spec.columns.keys()
    if not has & {"query", "query_image"}:
        raise UsageError("No column is the query.", "Name it with --columns query=COLUMN.")
    listed, sorted_out = has & {"documents", "documents_image"}, has & {"positive", "positive_image"}
    if bool(listed) == bool(sorted_out):
        raise UsageError("Either documents or positive needs a column.", "Name one with --columns positive=COLUMN.")
    if "labels" in has and not listed:
        raise UsageError("Labels belong to documents.", "Name their column with --columns documents=COLUMN.")
    if spec.limit < 1 or spec.negatives < 1:
        raise UsageError(f"A limit of {spec.limit} queries with {spec.negatives} negatives leaves nothing to rank.")


def _taken(rows: Iterator[Row], limit: int) -> list[Row]:
    """The first `limit` queries, each with the documents of all rows that came before the next one too many."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.key not in found and len(found) == limit:
            break
        found[row.key] = found[row.key].joined(row) if row.key in found else row
    return list(found.values())


def _judged(rows: Sequence[Row], spec: DatasetSpec) -> Iterator[Row]:
    """Each row, those without a negative with some of the others' positives."""
    pool = list({document.key: document for row in rows for document in row.positives}.values())
    for place, row in enumerate(rows):
        yield row if row.negatives or row.is_listed else replace(row, negatives=_drawn(row, place, pool, spec))


def _drawn(row: Row, place: int, pool: Sequence[Side], spec: DatasetSpec) -> tuple[Side, ...]:
    own = {document.key for document in row.positives}
    others = [document for document in pool if document.key not in own]
    if not others:
        raise UsageError(
            f"Data set {spec.name}: there is nothing to draw negatives from.", "Take more queries with --limit."
        )
    # Each query has a generator of its own, so that a longer panel does not change how it begins to choose.
    chosen = random.Random(f"{spec.seed}/{place}").sample(others, min(spec.negatives, len(others)))
    return tuple(chosen)
