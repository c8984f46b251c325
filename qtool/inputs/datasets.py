"""Panels out of data sets: a Hugging Face id, a folder or a file that the package `datasets` reads.

Rule: what is taken becomes the lines of a panel file, pictures included, so that its hash covers all that is scored; the
same data set, columns, limit and seed give the same lines.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from qtool.errors import UsageError
from qtool.inputs.dataset_rows import Row, Side, json_line, read_row
from qtool.inputs.dataset_source import open_rows
from qtool.inputs.panels import Panel, panel_of

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
