"""Queries, documents and the pairs of them that a scorer sees, and how large their pictures may be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from PIL.Image import Image

from qtool.errors import UsageError

# Sizes: the numbers and the rule of the official Qwen3-VL scripts, which resize before the processor and switch its own
# resize off.

MAX_ASPECT_RATIO: Final = 200


@dataclass(frozen=True)
class PixelLimits:
    """Geometry of the vision input; the defaults are those of the official Qwen3-VL scripts.

    `min_pixels` and `max_pixels` bound an image, `frame_min_pixels` and `frame_max_pixels` one frame of a video, and
    `total_pixels` all frames of a list together (the official classes do not bound those of a file).
    """

    patch: int = 16
    merge: int = 2
    temporal_patch: int = 2
    min_pixels: int = 4 * 32 * 32
    max_pixels: int = 1800 * 32 * 32
    total_pixels: int = 10 * 768 * 32 * 32
    frame_min_pixels: int = 128 * 32 * 32
    frame_max_pixels: int = 768 * 32 * 32
    fps: float = 1.0
    max_frames: int = 64
    mean: float = 0.5
    std: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise UsageError(
                f"min_pixels is {self.min_pixels} and max_pixels {self.max_pixels}; expected 1 <= min_pixels <= max_pixels."
            )
        if self.total_pixels < 1:
            raise UsageError(f"total_pixels is {self.total_pixels}; expected at least 1.")

    @property
    def factor(self) -> int:
        """Height and width of a resized picture are multiples of this."""
        return self.patch * self.merge


OFFICIAL_LIMITS: Final = PixelLimits()


def smart_resize(height: int, width: int, limits: PixelLimits = OFFICIAL_LIMITS) -> tuple[int, int]:
    """The (height, width) to resize to, as `qwen_vl_utils.smart_resize`. Raises UsageError.

    Sides below half a factor differ from the transformers processor, which rounds them to zero first; the official
    scripts resize before the processor and switch its resize off, so theirs is followed.
    """
    return fitted(height, width, limits.factor, limits.min_pixels, limits.max_pixels)


def fitted(height: int, width: int, factor: int, min_pixels: int, max_pixels: float) -> tuple[int, int]:
    """`smart_resize` with other bounds."""
    _check_aspect(height, width)
    rows = max(factor, round(height / factor) * factor)
    columns = max(factor, round(width / factor) * factor)
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = math.floor(height / shrink / factor) * factor
        columns = math.floor(width / shrink / factor) * factor
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    if not rows * columns:
        raise UsageError(
            f"A picture of {width}x{height} pixels has no pixels left when resized to at most {max_pixels:.0f}."
        )
    return rows, columns


def _check_aspect(height: int, width: int) -> None:
    if min(height, width) < 1 or max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise UsageError(
            f"A picture of {width}x{height} pixels is too narrow.",
            f"The longer side may be at most {MAX_ASPECT_RATIO} times the shorter one.",
        )


# Items and pairs. They are data: no file is opened here.

ImageSource: TypeAlias = str | Image
"""A file's path, an http(s) or `data:` URL, or a picture in memory."""


def is_text(value: object) -> bool:
    """Whether `value` is a str that UTF-8 can encode, without lone surrogates."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeError:
        return False
    return True


@dataclass(frozen=True)
class Video:
    """A file (path, http(s) or `data:` URL) of which `fps` frames per second are read, or a list of frames.

    At most `max_frames` are kept, evenly spaced; None is the official number. The official classes assume two frames
    per second for a list, which `fps` cannot change.
    """

    source: str | tuple[ImageSource, ...]
    fps: float | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise UsageError("The video has no frames.")
        if self.fps is not None and not isinstance(self.source, str):
            raise UsageError("fps applies to a file; a list of frames is scored as it is.")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise UsageError(f"fps is {self.fps}; expected a positive number.")
        if self.max_frames is not None and self.max_frames < 1:
            raise UsageError(f"max_frames is {self.max_frames}; expected at least 1.")


@dataclass(frozen=True)
class Item:
    """One side of a pair: any number of texts, images and videos, as the official API takes them.

    In the prompt videos come first, then images, then texts, which are joined without a separator. `text=("",)` is an
    empty text; `text=()` without pictures is a side without content, which a prompt may write differently. `origin` is
    where the item was read, for messages; it is not compared.
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
        # Each runtime would fail on these in its own way, llama.cpp and servers only when they are asked.
        for text in (*self.text, self.instruction or ""):
            if not is_text(text):
                raise UsageError(f"Item {self.id!r}: Invalid text {text!r}: expected str without lone surrogates.")

    @property
    def name(self) -> str:
        """The item in messages; with its origin, since ids of documents recur from query to query."""
        return f"Item {self.id!r} ({self.origin})" if self.origin else f"Item {self.id!r}"

    @property
    def joined_text(self) -> str:
        """The texts as they are in the prompt."""
        return "".join(self.text)

    @property
    def has_pictures(self) -> bool:
        """Whether it contains an image or a video."""
        return bool(self.image or self.video)

    def with_instruction(self, instruction: str | None) -> Item:
        """The same item under another instruction."""
        return replace(self, instruction=instruction)


@dataclass(frozen=True)
class Pair:
    """A query and a document to score together, with the query's instruction."""

    query: Item
    document: Item

    @property
    def name(self) -> str:
        """The pair in messages."""
        return f"query {self.query.id!r}, document {self.document.id!r}"
