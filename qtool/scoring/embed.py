"""`qtool embed`: the vectors of a panel's queries and documents, or of lines of text.

Rule: row by row as the items come, and beside the vectors a file that says which row is what.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.lib.format import MAGIC_PREFIX

from qtool.arch.spec import Task
from qtool.errors import UsageError
from qtool.inputs.items import Item
from qtool.inputs.panels import read_text_bytes
from qtool.progress import StageProgress
from qtool.scoring.runtime import RuntimeOptions, open_runtime
from qtool.scoring.score import Counter, PanelChoice, check_output, replacing, resumable

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BEGINNING: Final = b'{"row": '


@dataclass(frozen=True)
class Texts:
    """A file of texts, one a line; blank lines are skipped. All are embedded under `instruction`."""

    path: Path
    instruction: str | None = None


@dataclass(frozen=True)
class EmbedOptions:
    """Whom to ask what; `dim` cuts the vectors (MRL) and normalises them again. `ids` is by default `OUTPUT.ids.jsonl`."""

    target: str
    source: PanelChoice | Texts
    output: Path
    dim: int | None = None
    ids: Path | None = None
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    force: bool = False

    @property
    def ids_file(self) -> Path:
        """Where it is said which row is what."""
        return self.ids or self.output.with_suffix(".ids.jsonl")


@dataclass(frozen=True)
class Row:
    """What a row is: a query, a document of a query, or a line of a file."""

    row: int
    query_id: str | None = None
    document_id: str | None = None
    line: int | None = None

    @property
    def text(self) -> str:
        """As it stands in the file of ids."""
        return json.dumps(
            {name: value for name, value in asdict(self).items() if value is not None}, ensure_ascii=False
        )


@dataclass(frozen=True)
class Embedded:
    """The vectors [rows, dim] that were written, and what each of them is of."""

    vectors: NDArray[np.float32]
    rows: tuple[Row, ...]
    output: Path
    ids: Path
    identity: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What was written, for a program."""
        count, dim = self.vectors.shape
        files = {"output": str(self.output), "ids": str(self.ids)}
        return {"schema_version": 1, "rows": count, "dim": dim, **files, "identity": self.identity}


def embed(options: EmbedOptions, progress: StageProgress | None = None) -> Embedded:
    """Embed and write. Raises UsageError for a reranker; what was answered before any error is kept for the next run."""
    check_output(options.output, MAGIC_PREFIX, force=options.force)
    check_output(options.ids_file, _BEGINNING, force=options.force)
    if options.dim is not None and options.dim < 1:
        raise UsageError(f"A vector of {options.dim} dimensions holds nothing.")
    scorer = open_runtime(options.target, options.runtime)
    if scorer.task is not Task.EMBED:
        raise UsageError(f"{options.target} is a reranker: it gives scores and no vectors.", "Use qtool score.")
    if scorer.dimensions is not None:
        _check_dim(options.dim, scorer.dimensions)
    rows, items = _questions(options.source, scorer.query_instruction)
    shown = Counter("embedding", len(items), progress)

    def heard(place: int, vector: NDArray[np.float32]) -> None:
        _check_dim(options.dim, len(vector))  # a server's first answer tells what nothing else does
        shown(place, vector)

    with resumable(scorer, options.output, force=options.force) as asked:
        vectors = shortened(asked.embed(items, heard), options.dim)
        _write(options, rows, vectors)
    return Embedded(vectors, tuple(rows), options.output, options.ids_file, asdict(scorer.identity))


def shortened(vectors: NDArray[np.float32], dim: int | None) -> NDArray[np.float32]:
    """The first `dim` dimensions of unit vectors, normalised again; all of them for None."""
    if dim is None:
        return vectors
    _check_dim(dim, vectors.shape[1])
    cut = vectors[:, :dim]
    return np.asarray(cut / np.linalg.norm(cut, axis=1, keepdims=True), dtype=np.float32)


def _check_dim(dim: int | None, width: int) -> None:
    if dim is not None and not 0 < dim <= width:
        raise UsageError(f"The vectors have {width} dimensions, not {dim}.", f"Pass --dim with 1 to {width}.")


def _questions(source: PanelChoice | Texts, query_instruction: str | None) -> tuple[list[Row], list[Item]]:
    if isinstance(source, Texts):
        return _lines(source)
    rows: list[Row] = []
    items: list[Item] = []
    for query in source.load().queries:
        rows.append(Row(len(rows), query.id))
        items.append(query.item.with_instruction(query.item.instruction or query_instruction))
        for document in query.documents:
            rows.append(Row(len(rows), query.id, document.id))
            items.append(document)
    return rows, items


def _lines(source: Texts) -> tuple[list[Row], list[Item]]:
    lines = re.split(r"\r\n|\r|\n", read_text_bytes(source.path, "texts").decode("utf-8-sig"))
    texts = [(number, text) for number, text in enumerate(lines, start=1) if text.strip()]
    if not texts:
        raise UsageError(f"{source.path} holds no text.")
    rows = [Row(place, line=number) for place, (number, _) in enumerate(texts)]
    return rows, [Item(f"line {number}", (text,), instruction=source.instruction) for number, text in texts]


def _write(options: EmbedOptions, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None:
    with replacing(options.ids_file) as file:
        file.write_text("".join(f"{row.text}\n" for row in rows))
    with replacing(options.output) as file, file.open("wb") as opened:  # last: it says that all is there
        np.save(opened, vectors)
