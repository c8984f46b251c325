"""`qtool embed`: the vectors of a panel's queries and documents, or of lines of text, and a file that names each row."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.lib.format import MAGIC_PREFIX
from typing_extensions import override

from qtool.arch.spec import Task
from qtool.errors import UsageError
from qtool.inputs.items import Item
from qtool.inputs.panels import read_text_bytes
from qtool.options import Options
from qtool.progress import StageProgress, ignore
from qtool.results import Result, counted
from qtool.scoring.runtime import RuntimeOptions, open_runtime
from qtool.scoring.score import PanelChoice, check_output, resumable
from qtool.scoring.scorer import AnswerCounter, shortened
from qtool.storage.atomic import atomic_write

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BEGINNING: Final = b'{"row": '


@dataclass(frozen=True)
class Texts(Options):
    """A file of texts, one a line, or the `lines` themselves; blank ones are skipped. All get the same `instruction`."""

    path: Path | None = None
    instruction: str | None = None
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(Options):
    """What to embed; `dim` cuts the vectors (MRL) and normalises them again.

    With `output`, a .npy file, an interrupted run is resumed; `force` replaces it and starts over. `ids`, which names
    each row, is by default OUTPUT.ids.jsonl.
    """

    target: str
    source: PanelChoice | Texts
    output: Path | None = None
    dim: int | None = None
    ids: Path | None = None
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    force: bool = False

    @property
    def ids_file(self) -> Path | None:
        """The file that names each row; None without an output."""
        return self.ids or (self.output.with_suffix(".ids.jsonl") if self.output else None)


@dataclass(frozen=True)
class Row:
    """What a row holds: a query, a document of a query, or a line of a file."""

    row: int
    query_id: str | None = None
    document_id: str | None = None
    line: int | None = None

    @property
    def text(self) -> str:
        """The row as a line of the file of ids."""
        return json.dumps(
            {name: value for name, value in asdict(self).items() if value is not None}, ensure_ascii=False
        )


@dataclass(frozen=True, repr=False)
class Embeddings(Result):
    """The vectors [rows, dim], what each of them is of, and the files that hold them, None where none was written."""

    vectors: NDArray[np.float32]
    rows: tuple[Row, ...]
    output: Path | None
    ids: Path | None
    identity: dict[str, Any]

    @property
    @override
    def headline(self) -> str:
        count, dim = self.vectors.shape
        return f"{counted(count, 'vector')} of {counted(dim, 'dimension')}."

    @override
    def records(self) -> list[dict[str, Any]]:
        return [{**asdict(row), "vector": vector} for row, vector in zip(self.rows, self.vectors, strict=True)]

    @override
    def to_dict(self) -> dict[str, Any]:
        count, dim = self.vectors.shape
        files = {"output": str(self.output) if self.output else None, "ids": str(self.ids) if self.ids else None}
        return {"schema_version": 1, "rows": count, "dim": dim, **files, "identity": self.identity}


def embed(options: EmbedOptions, progress: StageProgress | None = None) -> Embeddings:
    """Embed and write. Raises UsageError for a reranker; answers before an error are kept for the next run."""
    if options.ids is not None and options.output is None:
        raise UsageError(
            "Argument ids names the rows of an output file, and no output is given.", "Pass output, or leave out ids."
        )
    if options.output is not None and options.ids_file is not None:
        check_output(options.output, MAGIC_PREFIX, force=options.force)
        check_output(options.ids_file, _BEGINNING, force=options.force)
    if options.dim is not None and options.dim < 1:
        raise UsageError(f"Invalid number of dimensions {options.dim}: expected 1 or more.", "Pass another --dim.")
    scorer = open_runtime(options.target, options.runtime)
    if scorer.task is not Task.EMBED:
        raise UsageError(f"{options.target} is a reranker: it gives scores, not vectors.", "Use qtool score.")
    if scorer.dimensions is not None:
        _check_dim(options.dim, scorer.dimensions)
    rows, items = _questions(options.source, scorer.query_instruction)
    counter = AnswerCounter("embedding", len(items), progress or ignore)

    def answered(index: int, vector: NDArray[np.float32]) -> None:
        _check_dim(options.dim, len(vector))  # only a server's first answer shows its width
        counter(index, vector)

    with resumable(scorer, options.output, force=options.force) as remembering:
        vectors = remembering.embed(items, answered)
        if options.dim is not None:
            vectors = shortened(vectors, options.dim)
        if options.output is not None and options.ids_file is not None:
            _write(options.output, options.ids_file, rows, vectors)
    return Embeddings(vectors, tuple(rows), options.output, options.ids_file, asdict(scorer.identity))


def _check_dim(dim: int | None, width: int) -> None:
    if dim is not None and not 0 < dim <= width:
        raise UsageError(f"Vector has {width} dimensions; --dim asks for {dim}.", f"Pass --dim with 1 to {width}.")


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
    lines: Sequence[str] = source.lines
    if source.path is not None:
        lines = re.split(r"\r\n|\r|\n", read_text_bytes(source.path, "texts").decode("utf-8-sig"))
    texts = [(number, text) for number, text in enumerate(lines, start=1) if text.strip()]
    if not texts:
        raise UsageError(f"{source.path or 'The list of texts'} contains no text: every line is blank.")
    rows = [Row(place, line=number) for place, (number, _) in enumerate(texts)]
    return rows, [Item(f"line {number}", (text,), instruction=source.instruction) for number, text in texts]


def _write(output: Path, ids: Path, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None:
    with atomic_write(ids) as file:
        file.write("".join(f"{row.text}\n" for row in rows).encode())
    with atomic_write(output) as file:  # last, as the sign that both are there
        np.save(file, vectors)
