"""Eight graded documents for each query of a general panel.

| grade | document |
|---|---|
| 3 | the text or chart that was written to answer the query |
| 2 | a text about the same thing, which answers at most in part |
| 1 | near misses: another thing of the same topic, or the same thing in another language without the full answer |
| 0 | texts of other fields, most of them in the query's language |

Which near misses and unrelated texts a query gets follows from hashes of their ids, so that a panel is the same on every
machine, and a text added later changes few of its lines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from qtool import resources
from qtool.inputs.panels import panel_header
from tools.panels.charts import draw_chart
from tools.panels.pages import draw_page, to_palette
from tools.panels.sources import LATIN, Document, Topic, load_topics

PANELS = resources.path("calibration/panels")
TEXT = "retrieval-text"
IMAGE = "retrieval-image"
LICENSE = "Apache-2.0"
DOCUMENTS = 8


@dataclass(frozen=True)
class BuiltPanel:
    """A panel's file, and the pictures that it names, by path relative to the file."""

    name: str
    content: bytes
    pictures: dict[str, Image.Image]


def build_text_panel() -> BuiltPanel:
    """Queries and documents as texts, in every language."""
    topics = [topic for topic in load_topics() if not topic.has_charts]
    sides = {
        document.id: {"text": f"{document.topic.heading}\n{document.text}"}
        for topic in topics
        for document in topic.documents
    }
    return BuiltPanel(TEXT, _content(TEXT, "text", topics, sides), {})


def build_image_panel() -> BuiltPanel:
    """Documents as pages and charts, in the languages that can be drawn."""
    topics = [topic for topic in load_topics() if topic.language in LATIN]
    pictures = {document.id: draw(document) for topic in topics for document in topic.documents}
    paths = {key: picture_path(key, picture) for key, picture in pictures.items()}
    content = _content(IMAGE, "image", topics, {key: {"image": path} for key, path in paths.items()})
    return BuiltPanel(IMAGE, content, {paths[key]: picture for key, picture in pictures.items()})


def draw(document: Document) -> Image.Image:
    """The page or chart that shows a document, in a palette of 16 colours."""
    entry = document.entry
    if entry.chart is not None and not document.is_partial:
        return to_palette(draw_chart(entry.chart))
    table = None if document.is_partial else entry.table
    style = int(_digest("style", document.topic.name), 16)
    return to_palette(draw_page(document.topic.heading, document.text, table, style))


def picture_path(document_id: str, picture: Image.Image, folder: str = IMAGE) -> str:
    """The picture's path beside its panel.

    It names a hash of the pixels, so that the panel's own hash, which covers paths, stands for the pictures too.
    """
    digest = hashlib.sha256(f"{picture.size} ".encode() + picture.convert("RGB").tobytes()).hexdigest()
    return f"{folder}/{document_id}-{digest[:8]}.png"


def grade(query: Document, topics: Sequence[Topic]) -> list[tuple[Document, int]]:
    """The documents of the query that `query`, an answer, was written for, with their grades, in the panel's order."""
    topic, entry, seed = query.topic, query.entry, query.id
    siblings = [_ordered(seed, _of(topic, other.id))[0] for other in topic.entries if other is not entry]
    others = [document for other in topics if other is not topic for document in other.documents]
    same_subject = [other for other in others if entry.subject and other.entry.subject == entry.subject]
    near = [*_ordered(seed, siblings)[:3], *_ordered(seed, same_subject)[:1]]
    unrelated = _ordered(seed, (other for other in others if other.topic.field != topic.field))
    language = entry.query_language or topic.language
    own = [document for document in unrelated if document.topic.language == language]
    foreign = [document for document in unrelated if document.topic.language != language]
    far = [*own[: DOCUMENTS - 3 - len(near)], foreign[0]]
    answers = [(document, 2 if document.is_partial else 3) for document in _of(topic, entry.id)]
    graded = [*answers, *((document, 1) for document in near), *((document, 0) for document in far)]
    return sorted(graded, key=lambda pair: _digest(f"order of {seed}", pair[0].id))


def write_panel(panel: BuiltPanel, folder: Path = PANELS) -> None:
    """Write the panel and its pictures below `folder`, and remove pictures that it no longer names."""
    (folder / f"{panel.name}.jsonl").write_bytes(panel.content)
    for path, picture in panel.pictures.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / path, "PNG", optimize=True)
    for old in (folder / panel.name).glob("*.png"):
        if old.relative_to(folder).as_posix() not in panel.pictures:
            old.unlink()


def _content(name: str, modality: str, topics: Sequence[Topic], sides: dict[str, dict[str, str]]) -> bytes:
    """The whole file: a header line with the hash of the rest, then one line a query."""
    # The first query of each topic comes before the second of any: what --limit takes has all languages.
    turns = zip_longest(*([_of(topic, entry.id)[0] for entry in topic.entries] for topic in _mixed(topics)))
    queries = [answer for turn in turns for answer in turn if answer is not None]
    lines = "".join(_line(query, topics, sides) for query in queries).encode()
    about = {"license": LICENSE, "modality": modality, "labels": "graded", "instruction": None}
    return panel_header(lines, name=name, **about) + lines


def _line(query: Document, topics: Sequence[Topic], sides: dict[str, dict[str, str]]) -> str:
    documents = [{"id": document.id, **sides[document.id], "label": label} for document, label in grade(query, topics)]
    value: dict[str, Any] = {"id": query.id, "query": {"text": query.entry.query}, "documents": documents}
    return json.dumps(value, ensure_ascii=False) + "\n"


def _of(topic: Topic, entry_id: str) -> list[Document]:
    return [document for document in topic.documents if document.entry.id == entry_id]


def _mixed(topics: Sequence[Topic]) -> list[Topic]:
    return sorted(topics, key=lambda topic: _digest("topics", topic.name))


def _ordered(seed: str, documents: Iterable[Document]) -> list[Document]:
    return sorted(documents, key=lambda document: _digest(seed, document.id))


def _digest(seed: str, key: str) -> str:
    return hashlib.sha256(f"{seed}/{key}".encode()).hexdigest()
