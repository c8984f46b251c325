"""The texts of the general panels, as `texts/*.yaml` holds them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

TEXTS = Path(__file__).parent / "texts"

Kind = Literal["question", "keywords", "title", "long", "code", "negation"]
Language = Literal["ar", "de", "en", "es", "fr", "hi", "it", "ja", "pt", "ru", "zh"]
LATIN: frozenset[Language] = frozenset({"de", "en", "es", "fr", "it", "pt"})
"""Languages that Pillow's built-in font can be made to write."""


class _Source(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Chart(_Source):
    """A small table to be drawn, with the labels of both axes; a pie has none."""

    type: Literal["bar", "line", "pie"]
    title: str
    x: str = ""
    y: str = ""
    data: dict[str, float]


class Entry(_Source):
    """A query, the passage or chart that answers it, and a text about the same thing that answers at most in part.

    Entries of the same `subject` are about the same thing in different languages. A `table` is drawn below a passage.
    """

    id: str
    kind: Kind
    query: str
    query_language: Language | None = None
    subject: str | None = None
    passage: str | None = None
    chart: Chart | None = None
    partial: str
    table: tuple[tuple[str | int, ...], ...] | None = None

    @model_validator(mode="after")
    def _has_one_answer(self) -> Entry:
        if (self.passage is None) == (self.chart is None):
            message = "needs either a passage or a chart"
            raise ValueError(message)
        return self


class Topic(_Source):
    """Entries of one language that are easily mistaken for each other; topics of one `field` are never unrelated."""

    name: str = Field(alias="topic")
    field: str
    language: Language
    heading: str
    entries: tuple[Entry, ...]

    @property
    def has_charts(self) -> bool:
        """Whether charts answer its queries, which makes it one for the image panel alone."""
        return self.entries[0].chart is not None

    @cached_property
    def documents(self) -> tuple[Document, ...]:
        """All documents of the topic, each answer followed by its partial answer."""
        return tuple(
            Document(topic=self, entry=entry, is_partial=is_partial)
            for entry in self.entries
            for is_partial in (False, True)
        )


@dataclass(frozen=True)
class Document:
    """One side of an entry: what answers its query, or what answers it at most in part."""

    topic: Topic
    entry: Entry
    is_partial: bool

    @property
    def id(self) -> str:
        """Its id in the panels, which is the query's for the answer."""
        return f"{self.topic.name}-{self.entry.id}" + ("-part" if self.is_partial else "")

    @property
    def text(self) -> str:
        """The text of a document that is no chart."""
        return self.entry.partial if self.is_partial else self.entry.passage or ""


def load_topics(folder: Path = TEXTS) -> list[Topic]:
    """Every topic of the folder, in the order of file names."""
    return [
        Topic.model_validate(topic)
        for path in sorted(folder.glob("*.yaml"))
        for topic in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]
