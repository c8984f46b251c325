"""Queries, documents and the pairs of them that a scorer sees.

Rule: an item is data; nothing is opened, resized or tokenized here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeAlias

from PIL.Image import Image

from qtool.errors import UsageError
from qtool.inputs.limits import OFFICIAL_LIMITS, PixelLimits

ImageSource: TypeAlias = str | Image
"""A file's path, an http(s) or `data:` URL, or a picture in memory."""


def is_text(value: object) -> bool:
    """Whether it is a str that UTF-8 can carry: a lone surrogate, half of a character, is none."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeError:
        return False
    return True


@dataclass(frozen=True)
class Video:
    """A file (path, http(s) or `data:` URL) of which `fps` frames a second are read, or a list of frames.

    Of both at most `max_frames` are kept, evenly spread; None is the official number. A list has no frame rate: the
    official classes take it for two frames a second, and `fps` cannot change that.
    """

    source: str | tuple[ImageSource, ...]
    fps: float | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise UsageError("a video without a frame")
        if self.fps is not None and not isinstance(self.source, str):
            raise UsageError("fps samples a file; a list of frames is scored as it is")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise UsageError(f"fps is {self.fps}; it must be a positive number")
        if self.max_frames is not None and self.max_frames < 1:
            raise UsageError(f"max_frames is {self.max_frames}; it must be at least 1")


@dataclass(frozen=True)
class Item:
    """One side of a pair: any number of texts, images and videos, as the official API takes them.

    Inside a side videos come first, then images, then texts, which are joined without a separator. `text=("",)` is an
    empty text; `text=()` with no picture is a side without content, which a prompt may write differently. `origin` says to
    people where it was read; no two items differ by it.
    """

    id: str
    text: tuple[str, ...] = ()
    image: tuple[ImageSource, ...] = ()
    video: tuple[Video, ...] = ()
    instruction: str | None = None
    label: float | None = None
    limits: PixelLimits = OFFICIAL_LIMITS
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        # Runtimes fail on these each in its own way, llama.cpp and servers only once they are asked.
        for text in (*self.text, self.instruction or ""):
            if not is_text(text):
                raise UsageError(f"Item {self.id!r}: no text but {text!r}", "Texts are str, without lone surrogates.")

    @property
    def name(self) -> str:
        """How messages about it alone begin: ids of documents recur from query to query, so its origin is said too."""
        return f"Item {self.id!r} ({self.origin})" if self.origin else f"Item {self.id!r}"

    @property
    def joined_text(self) -> str:
        """The texts as the prompt shows them."""
        return "".join(self.text)

    @property
    def has_pictures(self) -> bool:
        """Whether it holds an image or a video."""
        return bool(self.image or self.video)

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
