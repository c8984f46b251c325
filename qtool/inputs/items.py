"""Queries, documents and the pairs of them that a scorer sees.

Rule: an item is data; nothing is opened, resized or tokenized here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from PIL.Image import Image

ImageSource: TypeAlias = str | Image
"""A file's path, a `data:` URL, or a picture in memory."""


@dataclass(frozen=True)
class Item:
    """One side of a pair: any number of texts, images and videos, as the official API takes them.

    Inside a side videos come first, then images, then texts, which are joined without a separator. `text=("",)` is an
    empty text; `text=()` with no picture is a side without content, which a prompt may write differently.
    """

    id: str
    text: tuple[str, ...] = ()
    image: tuple[ImageSource, ...] = ()
    video: tuple[str, ...] = ()
    instruction: str | None = None
    label: float | None = None

    @property
    def joined_text(self) -> str:
        """The texts as the prompt shows them."""
        return "".join(self.text)

    def with_instruction(self, instruction: str | None) -> Item:
        """The same item under another instruction."""
        return replace(self, instruction=instruction)


@dataclass(frozen=True)
class Pair:
    """A query and a document to judge together, under the query's instruction."""

    query: Item
    document: Item

    @property
    def name(self) -> str:
        """How messages name the pair."""
        return f"query {self.query.id!r}, document {self.document.id!r}"
