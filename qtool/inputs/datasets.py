"""Panels from data sets: a Hugging Face id, a folder or a file that the package `datasets` reads."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from qtool.errors import NetworkError, QtoolError, UsageError, reason
from qtool.extras import require_extra
from qtool.inputs.items import is_text
from qtool.inputs.media import DISTRUST, MediaAccess, allowed_file, is_url, open_media, quoted
from qtool.inputs.panel_lines import HIGHEST_GRADE
from qtool.inputs.panels import Panel, panel_of

# Rows, streamed by the package `datasets`: only what is read is fetched. Pictures are the bytes in the data set.

_SPLITS: Final = ("test", "validation", "train")
_PICTURE_BYTES: Final = 128 << 20
_PICTURE_SECONDS: Final = 60.0
_FORMATS: Final = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Rows:
    """Rows with their names for messages, and the licence that the data set declares, if any."""

    rows: Iterator[tuple[str, Mapping[str, Any]]]
    license: str


def open_rows(path: str, config: str | None, split: str | None, revision: str | None) -> Rows:
    """The rows of one split. Raises UsageError for a wrong name, NetworkError where the hub cannot be reached."""
    try:
        splits = _open_splits(path, config, revision)
    except Exception as error:  # the errors of `datasets` and its dependencies share no base class below Exception
        raise _explained(path, error) from error
    found = _split(path, splits, split)
    return Rows(_rows(path, _undecoded(found)), str(found.info.license or ""))


def read_picture(path: str, dataset: str, access: MediaAccess) -> bytes:
    """A picture in a file of `dataset`: in its folder, on the hub, or inside an archive there.

    A row may name any file. Raises UsageError for one that is not the data set's, unless `access` has it otherwise.
    """
    if "://" not in path:
        folder = Path(dataset) if Path(dataset).is_dir() else Path(dataset).parent
        media = open_media(allowed_file(Path(path), folder, access), _PICTURE_BYTES, _PICTURE_SECONDS)
        return media.read_bytes() if isinstance(media, Path) else media.getvalue()
    from datasets.utils.file_utils import xopen

    if not _is_on_the_hub(path):
        raise UsageError("The file is not on the Hub.", "Download the data set, or pass another.")
    try:
        with xopen(path, "rb") as file:
            content: bytes = file.read(_PICTURE_BYTES + 1)
    except Exception as error:  # as above
        raise _explained(path, error) from error
    if len(content) > _PICTURE_BYTES:
        raise UsageError(f"The file has more than {_PICTURE_BYTES:,} bytes.")
    return content


def _is_on_the_hub(path: str) -> bool:
    """Whether the last of fsspec's chained addresses, such as `zip://a.png::hf://datasets/org/name/b.zip`, is the Hub's."""
    from huggingface_hub import constants

    return path.rpartition("::")[2].startswith(("hf://", f"{constants.ENDPOINT}/"))


def _open_splits(path: str, config: str | None, revision: str | None) -> Any:
    require_extra("datasets", f"Reading data set {path}")
    import datasets

    local = Path(path)
    if not local.exists() and (local.suffix in _FORMATS or path.startswith((".", "~", "/"))):
        raise UsageError(f"No such file or folder: {path}.")
    if not local.is_file():
        return datasets.load_dataset(path, config, revision=revision, streaming=True)
    if local.suffix not in _FORMATS:
        raise UsageError(
            f"Unknown file type of data set {path}.", f"Expected a name that ends in {', '.join(_FORMATS)}."
        )
    return datasets.load_dataset(_FORMATS[local.suffix], data_files=path, streaming=True)


def _split(path: str, splits: Mapping[str, Any], wanted: str | None) -> Any:
    for name in (wanted,) if wanted else (*_SPLITS, *splits):
        if name in splits:
            return splits[name]
    raise UsageError(f"Data set {path} has no split {wanted!r}.", f"Choose one of {', '.join(splits)}.")


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
        return NetworkError(f"Cannot read data set {path}: {reason(error)}.", "Check the network.")
    return UsageError(f"Cannot read data set {path}: {reason(error)}.")


# A row as a query with its documents. A column that is missing, empty or of the wrong type is an error that names the
# row; only negatives may be empty.

Columns = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Side:
    """A query or a document: a text, a picture's address or both, with its grade."""

    text: str | None = None
    image: str | None = None
    label: float | None = None

    @property
    def key(self) -> str:
        """Equal for equal content."""
        return hashlib.sha256(json.dumps([self.text, self.image]).encode()).hexdigest()

    @property
    def line(self) -> dict[str, Any]:
        """The side in a line of a panel file."""
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
        """This row with the documents of another row of the same query; positive wins over negative."""
        added = replace(
            self,
            positives=(*self.positives, *other.positives),
            negatives=(*self.negatives, *other.negatives),
        )
        return added.distinct

    @property
    def distinct(self) -> Row:
        """This row with each document once: as a positive if it is one anywhere, and with its highest label."""
        positives: dict[str, Side] = {}
        for side in self.positives:
            known = positives.setdefault(side.key, side)
            if (side.label or 0) > (known.label or 0):
                positives[side.key] = side
        negatives = {side.key: side for side in self.negatives if side.key not in positives}
        return replace(self, positives=tuple(positives.values()), negatives=tuple(negatives.values()))


def json_line(row: Row, number: int) -> bytes:
    """The row as a line of a panel file, newline included; `number` is the id of a query that has none."""
    positives = row.positives if row.is_listed else tuple(replace(side, label=1.0) for side in row.positives)
    documents = [*positives, *(replace(side, label=0.0) for side in row.negatives)]
    content = {"id": row.id or f"q{number}", "query": row.query.line, "documents": [side.line for side in documents]}
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


Read = Callable[[str], bytes]
"""Reads a picture that lies in a file of the data set."""


def _reads_nothing(path: str) -> bytes:
    raise UsageError(f"There is no data set to read {quoted(path)} from.")


def read_row(values: Mapping[str, Any], columns: Columns, where: str, read: Read = _reads_nothing) -> Row:
    """Read a row by its columns; messages begin with `where`."""
    for column in (column for named in columns.values() for column in named):
        if column not in values:
            raise UsageError(f"{where}: There is no column {column!r}.", f"Choose from {', '.join(values)}.")
    (query,) = _sides(values, columns, "query", where, read)[:1]
    ids = _values(values, columns, "id")
    row_id = str(ids[0]) if ids and ids[0] is not None else None
    if "positive" in columns or "positive_image" in columns:
        negatives = () if _is_empty(values, columns, "negative") else _sides(values, columns, "negative", where, read)
        positives = _sides(values, columns, "positive", where, read)
        return Row(row_id, query, positives, negatives).distinct
    documents = _sides(values, columns, "documents", where, read)
    return Row(row_id, query, _labelled(documents, values, columns, where), is_listed=True).distinct


def _is_empty(values: Mapping[str, Any], columns: Columns, role: str) -> bool:
    """Whether the role has no columns, or only empty ones in this row."""
    found = (values[column] for name in (role, f"{role}_image") for column in columns.get(name, ()))
    return all(value is None or value == [] for value in found)


def _labelled(documents: tuple[Side, ...], values: Mapping[str, Any], columns: Columns, where: str) -> tuple[Side, ...]:
    if "labels" not in columns:
        return documents
    labels = _values(values, columns, "labels")
    if len(labels) != len(documents):
        raise UsageError(
            f"{where}: The number of labels ({len(labels)}) differs from that of documents ({len(documents)})."
        )
    return tuple(
        replace(document, label=_grade(label, where)) for document, label in zip(documents, labels, strict=True)
    )


def _grade(value: Any, where: str) -> float:
    if isinstance(value, bool | int | float) and 0 <= value <= HIGHEST_GRADE:
        return float(value)
    raise UsageError(f"{where}: Invalid label {value!r}: expected a number from 0 to {HIGHEST_GRADE}.")


def _sides(values: Mapping[str, Any], columns: Columns, role: str, where: str, read: Read) -> tuple[Side, ...]:
    """The sides of a role: texts, pictures, or pairs of both."""
    texts: list[str | None] = [_text(value, role, where) for value in _values(values, columns, role)]
    images: list[str | None] = [_image(value, role, where, read) for value in _values(values, columns, f"{role}_image")]
    if texts and images and len(texts) != len(images):
        raise UsageError(
            f"{where}: The number of texts ({len(texts)}) differs from that of pictures ({len(images)}) for {role}."
        )
    if not texts and not images:
        raise UsageError(f"{where}: There is no content for {role}.")
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
        raise UsageError(f"{where}: {role} is {_kind(value)}; expected a text.")
    if not is_text(value):
        raise UsageError(f"{where}: {role} contains a lone surrogate (half of a character).")
    return value


def _image(value: Any, role: str, where: str, read: Read) -> str:
    """The address of a picture; one stored in the data set becomes a `data:` URL."""
    if isinstance(value, str) and is_url(value):
        return value
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (None, None)
    if content is None and isinstance(path, str):
        content = _read_stored(path, f"{where}: {role}_image", read)
    if isinstance(content, bytes):
        return f"data:;base64,{base64.b64encode(content).decode()}"
    raise UsageError(f"{where}: {role}_image is {_kind(value)}; expected a picture or an http(s) address.")


def _read_stored(path: str, where: str, read: Read) -> bytes:
    try:
        return read(path)
    except QtoolError as error:
        raise type(error)(f"{where}: Cannot read {quoted(path)}: {error.message}", error.hint) from error


def _kind(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


# The panel: rows become the lines of a panel file, pictures included, so that its hash covers all that is scored. The
# same data set, columns, limit and seed give the same lines.

ROLES: Final = (
    *("id", "query", "query_image", "positive", "positive_image", "negative", "negative_image"),
    *("documents", "documents_image", "labels"),
)
_SPELLING: Final = re.compile(r"(?P<path>[^#]+?)(:(?P<config>[^:#/]+))?(#(?P<split>[^#]+))?")


@dataclass(frozen=True)
class DatasetSpec:
    """Which rows of a data set make a panel.

    `columns` maps a role (ROLES) to its columns: a query, and either `documents`, optionally with `labels`, or
    `positive` and optionally `negative`. For a query without negatives, `negatives` of them are drawn from the other
    queries' positives. A column contains a value or a list of values; rows of equal queries become one query. The
    default `split` is the first that exists of test, validation and train. `limit` counts queries.
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
        """The data set as the command line takes it."""
        return "".join((self.path, (self.config and f":{self.config}") or "", (self.split and f"#{self.split}") or ""))


def parse_dataset(text: str, columns: str, **options: Any) -> DatasetSpec:
    """`ID[:CONFIG][#SPLIT]` and `query=COLUMN,positive=COLUMN,…` as --dataset and --columns take them."""
    match = _SPELLING.fullmatch(text)
    if not match:
        raise UsageError(f"Invalid data set {text!r}.", "Write it as ID, ID:CONFIG, ID#SPLIT or ID:CONFIG#SPLIT.")
    spec = DatasetSpec(match["path"], _columns(columns), match["config"], match["split"], **options)
    _check(spec)
    return spec


def load_dataset_panel(spec: DatasetSpec, access: MediaAccess = DISTRUST) -> Panel:
    """The panel that `spec` describes; its hash is that of its lines. Raises UsageError or NetworkError."""
    _check(spec)
    lines, licence = dataset_lines(spec, access)
    panel = replace(panel_of(lines, Path(spec.name), access), name=spec.name, license=licence)
    if spec.instruction is None:
        return panel
    instructed = (replace(query, item=query.item.with_instruction(spec.instruction)) for query in panel.queries)
    return replace(panel, queries=tuple(instructed))


def dataset_lines(spec: DatasetSpec, access: MediaAccess = DISTRUST) -> tuple[bytes, str]:
    """The lines of a panel file without a header, and the data set's licence."""
    source = open_rows(spec.path, spec.config, spec.split, spec.revision)

    def read(picture: str) -> bytes:
        return read_picture(picture, spec.path, access)

    rows = _first_queries((read_row(values, spec.columns, where, read) for where, values in source.rows), spec.limit)
    if not rows:
        raise UsageError(f"Data set {spec.name} has no rows.")
    lines = (json_line(row, number) for number, row in enumerate(_with_negatives(rows, spec), start=1))
    return b"".join(lines), source.license


def _columns(text: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for part in text.split(","):
        role, _, column = (word.strip() for word in part.partition("="))
        if role not in ROLES or not column:
            raise UsageError(f"Invalid --columns entry {part!r}.", f"Write ROLE=COLUMN; roles are {', '.join(ROLES)}.")
        found[role] = (*found.get(role, ()), column)
    return found


def _check(spec: DatasetSpec) -> None:
    roles = spec.columns.keys()
    if not roles & {"query", "query_image"}:
        raise UsageError("No column is given for the query.", "Add --columns query=COLUMN.")
    documents, positives = roles & {"documents", "documents_image"}, roles & {"positive", "positive_image"}
    if bool(documents) == bool(positives):
        raise UsageError("Expected a column for either documents or positive.", "Add --columns positive=COLUMN.")
    if "labels" in roles and not documents:
        raise UsageError("A column for labels needs one for documents.", "Add --columns documents=COLUMN.")
    if spec.limit < 1 or spec.negatives < 1:
        raise UsageError(f"limit is {spec.limit} and negatives {spec.negatives}; expected at least 1 of each.")


def _first_queries(rows: Iterator[Row], limit: int) -> list[Row]:
    """The first `limit` queries, with the documents of all rows up to the first row of a further query."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.key not in found and len(found) == limit:
            break
        found[row.key] = found[row.key].joined(row) if row.key in found else row
    return list(found.values())


def _with_negatives(rows: Sequence[Row], spec: DatasetSpec) -> Iterator[Row]:
    """The rows; those without negatives get some of the other rows' positives."""
    pool = list({document.key: document for row in rows for document in row.positives}.values())
    for index, row in enumerate(rows):
        yield row if row.negatives or row.is_listed else replace(row, negatives=_drawn(row, index, pool, spec))


def _drawn(row: Row, index: int, pool: Sequence[Side], spec: DatasetSpec) -> tuple[Side, ...]:
    own = {document.key for document in row.positives}
    others = [document for document in pool if document.key not in own]
    if not others:
        raise UsageError(f"Data set {spec.name} has no documents to draw negatives from.", "Pass a higher --limit.")
    # Each query has a generator of its own, so that a longer panel begins with the same negatives.
    return tuple(random.Random(f"{spec.seed}/{index}").sample(others, min(spec.negatives, len(others))))
