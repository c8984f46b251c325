"""Panels: JSON Lines files of queries, each with the documents to rank for it, and shards of panels."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from qtool.errors import UsageError, reason
from qtool.inputs.items import OFFICIAL_LIMITS, Item, Pair, PixelLimits, Video
from qtool.inputs.media import DISTRUST, LocalAddress, MediaAccess, allowed_file, is_url, quoted
from qtool.inputs.panel_lines import HeaderLine, QueryLine, SidesLine, VideoLine, parse_line
from qtool.jsonfile import JsonError, json_value, read_bounded

if TYPE_CHECKING:
    from collections.abc import Iterator


_MAX_BYTES: Final = 1 << 30
"""Of a panel or a file of texts; pictures may be in it as `data:` URLs."""


def read_text_bytes(path: Path, kind: str) -> bytes:
    """The content of a UTF-8 file. Raises UsageError with the line of an error; messages call the file `kind`."""
    try:
        content = read_bounded(path, _MAX_BYTES, may_be_pipe=True)
        content.decode()
    except OSError as error:
        raise UsageError(f"Cannot read {kind} {path}: {reason(error)}.") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        column = error.start - error.object.rfind(b"\n", 0, error.start)
        raise UsageError(
            f"{path.name}, line {line}: Byte {column} is 0x{error.object[error.start]:02x}, which is not UTF-8.",
            "Save the file as UTF-8.",
        ) from error
    return content


@dataclass(frozen=True)
class PanelShard:
    """Shard `index` of `count`, from 1: every `count`-th query with all its documents, from query `index` on."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise UsageError(f"Invalid shard {self}.", "Write it as 2/8: the second of eight.")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> PanelShard:
        """A shard as --shard takes it, such as 2/8."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if not match:
            raise UsageError(f"Invalid shard {text!r}.", "Write it as 2/8: the second of eight.")
        return cls(int(match[1]), int(match[2]))


# A panel is checked whole before anything is scored; messages name the file, the line and the field.

Modality = Literal["text", "image", "video", "mixed"]
Labels = Literal["graded", "binary", "none"]


@dataclass(frozen=True)
class Query:
    """A query and its candidate documents, in the panel's order."""

    item: Item
    documents: tuple[Item, ...]

    @property
    def id(self) -> str:
        """The query's id, unique in its panel."""
        return self.item.id

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The query with each of its documents."""
        return tuple(Pair(self.item, document) for document in self.documents)

    @property
    def labels(self) -> tuple[float, ...] | None:
        """The documents' relevance grades; None where they have none."""
        grades = tuple(document.label for document in self.documents if document.label is not None)
        return grades or None


@dataclass(frozen=True)
class Panel:
    """A named, hashed set of queries; `sha256` covers the bytes after the header line, or a whole headerless file."""

    name: str
    license: str
    modality: Modality
    labels: Labels
    sha256: str
    queries: tuple[Query, ...]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Every pair of the panel, query by query."""
        return tuple(pair for query in self.queries for pair in query.pairs)

    def first(self, queries: int | None) -> Panel:
        """The first `queries` of the panel, with its name and hash; all of them for None."""
        return self if queries is None else replace(self, queries=self.queries[:queries])

    def shard(self, shard: PanelShard | None) -> Panel:
        """The queries of a shard, with the panel's name and hash; all of them for None."""
        if shard is None:
            return self
        if shard.index > len(self.queries):
            raise UsageError(f"Panel {self.name} has too few queries ({len(self.queries)}) for shard {shard}.")
        return replace(self, queries=self.queries[shard.index - 1 :: shard.count])

    @property
    def has_pictures(self) -> bool:
        """Whether any query or document contains an image or a video."""
        return self.modality != "text"


def load_panel(path: Path, access: MediaAccess = DISTRUST) -> Panel:
    """Read and check a panel; relative paths of pictures start at the panel's folder, which they must not leave."""
    return panel_of(read_text_bytes(path, "panel"), path, access)


def panel_of(content: bytes, path: Path, access: MediaAccess = DISTRUST) -> Panel:
    """The panel with this content; `path` gives its name and the folder of relative paths."""
    first, _, rest = content.partition(b"\n")
    if not _is_header(first):
        queries = _queries(path, content, 1, None, access)
        return Panel(path.stem, "", _modality(queries), _labels(queries), _sha256(content), queries)
    header = parse_line(HeaderLine, _json(first, _where(path, 1)), _where(path, 1))
    queries = _queries(path, rest, 2, header.instruction, access)
    panel = Panel(header.name, header.license, header.modality, header.labels, _sha256(rest), queries)
    _check_header(panel, header, path)
    return panel


def panel_header(lines: bytes, **fields: str | None) -> bytes:
    """The header line, newline included, of a panel whose query lines are `lines`.

    `fields` are the header's: `name`, `license`, `modality`, `labels` and, if the panel has one, `instruction`.
    """
    header = {"qtool_panel": 1, **fields, "sha256": _sha256(lines)}
    parse_line(HeaderLine, header, "panel header")
    return json.dumps(header, ensure_ascii=False).encode() + b"\n"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _where(path: Path, number: int) -> str:
    return f"{path.name}, line {number}"


def _is_header(line: bytes) -> bool:
    try:
        value = json_value(line)
    except JsonError:  # reported with its line when it is read as a query
        return False
    return isinstance(value, dict) and "qtool_panel" in value


def _queries(
    path: Path, content: bytes, first_line: int, instruction: str | None, access: MediaAccess
) -> tuple[Query, ...]:
    queries: list[Query] = []
    seen: set[str] = set()
    # Not str.splitlines: JSON strings may contain U+2028 and other line separators.
    for number, line in enumerate(content.split(b"\n"), start=first_line):
        if not line.strip():
            continue
        parsed = parse_line(QueryLine, _json(line, _where(path, number)), _where(path, number))
        query = _Reader(path, access).query(parsed, len(queries) + 1, instruction, _where(path, number))
        if query.id in seen:
            message = f"{_where(path, number)}: id: Query {query.id!r} exists already."
            raise UsageError(message)
        seen.add(query.id)
        queries.append(query)
    if not queries:
        message = f"Panel {path} contains no queries."
        raise UsageError(message)
    return tuple(queries)


def _json(line: bytes, where: str) -> Any:
    try:
        return json_value(line, allow_nan=True)  # which the field that holds it refuses
    except JsonError as error:
        raise UsageError(f"{where}: Invalid JSON: {error}.") from error


class _Reader:
    """Makes items of a panel's lines; `access` is what the panel may name."""

    def __init__(self, panel: Path, access: MediaAccess) -> None:
        self._folder = panel.parent
        self._access = access

    def query(self, line: QueryLine, ordinal: int, instruction: str | None, where: str) -> Query:
        own = instruction if line.instruction is None else line.instruction
        item = self._item(line.query, line.id or f"q{ordinal}", None, f"{where}: query")
        documents = tuple(
            self._item(each, each.id or f"d{position + 1}", each.label, f"{where}: documents[{position}]")
            for position, each in enumerate(line.documents)
        )
        _check_documents(documents, where)
        documents = tuple(replace(document, origin=f"query {item.id!r}, {where}") for document in documents)
        return Query(replace(item, instruction=own, origin=where), documents)

    def _item(self, sides: SidesLine, item_id: str, label: float | None, where: str) -> Item:
        if sides.is_blank:
            message = f"{where}: No text, image or video."
            raise UsageError(message, hint='Write "text": [] for a side that is empty on purpose.')
        images = tuple(self._media(source, f"{where}.image") for source in sides.image or ())
        videos = tuple(self._video(line, f"{where}.video") for line in sides.video or ())
        return Item(item_id, sides.text or (), images, videos, label=label, limits=_limits(sides, where))

    def _video(self, line: VideoLine, where: str) -> Video:
        if line.file is not None:
            return Video(self._media(line.file, where), line.fps, line.max_frames)
        return Video(tuple(self._media(frame, where) for frame in line.frames or ()), None, line.max_frames)

    def _media(self, source: str, where: str) -> str:
        if is_url(source):
            return LocalAddress(source) if self._access.local_addresses else source
        try:
            return str(allowed_file(self._folder / source, self._folder, self._access))
        except UsageError as error:
            message = error.message.removesuffix(".")
            raise UsageError(f"{where}: {message}: {quoted(source)}.", error.hint) from error


def _limits(sides: SidesLine, where: str) -> PixelLimits:
    given = sides.model_dump(include={"min_pixels", "max_pixels", "total_pixels"}, exclude_none=True)
    try:
        return replace(OFFICIAL_LIMITS, **given) if given else OFFICIAL_LIMITS
    except UsageError as error:
        message = f"{where}: {error.message}"
        raise UsageError(message) from error


def _check_documents(documents: tuple[Item, ...], where: str) -> None:
    seen: set[str] = set()
    for position, document in enumerate(documents):
        if document.id in seen:
            message = f"{where}: documents[{position}].id: Document {document.id!r} exists already."
            raise UsageError(message)
        seen.add(document.id)
    labelled = sum(document.label is not None for document in documents)
    if labelled not in (0, len(documents)):
        missing = next(position for position, document in enumerate(documents) if document.label is None)
        message = f"{where}: documents[{missing}].label: Missing; other documents of the query have one."
        raise UsageError(message)


def _sides(queries: tuple[Query, ...]) -> Iterator[Item]:
    for query in queries:
        yield query.item
        yield from query.documents


def _modality(queries: tuple[Query, ...]) -> Modality:
    if not any(item.has_pictures for item in _sides(queries)):
        return "text"
    documents = [document for query in queries for document in query.documents]
    if all(document.video for document in documents):
        return "video"
    has_video = any(item.video for item in _sides(queries))
    return "image" if not has_video and all(document.image for document in documents) else "mixed"


def _labels(queries: tuple[Query, ...]) -> Labels:
    grades = {grade for query in queries for grade in query.labels or ()}
    if not grades:
        return "none"
    return "binary" if grades <= {0, 1} else "graded"


def _check_header(panel: Panel, header: HeaderLine, path: Path) -> None:
    where = _where(path, 1)
    if panel.sha256 != header.sha256:
        message = f"{where}: sha256: The header declares {header.sha256}; the lines after it have {panel.sha256}."
        raise UsageError(message, hint="The panel was changed after it was published; download it again.")
    if header.modality != "mixed" and header.modality != _modality(panel.queries):
        message = (
            f"{where}: modality: The header declares {header.modality!r}; the items are {_modality(panel.queries)!r}."
        )
        raise UsageError(message)
    found = _labels(panel.queries)
    if found != header.labels and (header.labels, found) != ("graded", "binary"):
        message = f"{where}: labels: The header declares {header.labels!r}; the documents are {found!r}."
        raise UsageError(message)
    unlabelled = [query.id for query in panel.queries if query.labels is None]
    if header.labels != "none" and unlabelled:
        message = f"{where}: labels: The header declares {header.labels!r}; query {unlabelled[0]!r} has none."
        raise UsageError(message)
