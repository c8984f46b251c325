"""Parts of prompts: the ids that one forward pass reads, each with its place and picture (or pair of video frames).

Rule: a part keeps the positions that it has in the whole prompt, and no picture is ever cut in two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qtool.inputs.limits import OFFICIAL_LIMITS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtool.inputs.vision import PatchedImage
    from qtool.scoring.prompt import Prompt


@dataclass(frozen=True)
class Span:
    """Consecutive ids [n] of a prompt, their positions [3, n] (time, row, column), and which are picture tokens [n]."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    is_picture: NDArray[np.bool_]
    pictures: tuple[PatchedImage, ...]

    @classmethod
    def whole(cls, prompt: Prompt, picture_tokens: Sequence[int]) -> Span:
        """All of `prompt`; without pictures, a picture token that its text spells out is an ordinary one."""
        ids = np.array(prompt.token_ids, dtype=np.int64)
        is_picture = np.isin(ids, picture_tokens) if prompt.pictures else np.zeros(len(ids), dtype=np.bool_)
        grids = [picture.grid_thw for picture in prompt.pictures]
        return cls(ids, rope_positions(is_picture, grids), is_picture, prompt.pictures)

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, end: int | None = None) -> Span:
        """The ids from `start` to `end`, where a picture lies wholly inside or wholly outside."""
        first, last = self._pictures_before(start), self._pictures_before(len(self) if end is None else end)
        here = slice(start, end)
        return Span(self.ids[here], self.positions[:, here], self.is_picture[here], self.pictures[first:last])

    def _pictures_before(self, end: int) -> int:
        return int(np.searchsorted(_picture_ends(self.pictures), np.count_nonzero(self.is_picture[:end]), "right"))


def rope_positions(is_picture: NDArray[np.bool_], grids: Sequence[tuple[int, int, int]]) -> NDArray[np.int64]:
    """M-RoPE positions [3, n] as transformers' `get_rope_index` gives them; of a text all three are its places."""
    positions = np.empty((3, len(is_picture)), dtype=np.int64)
    done, place = 0, 0
    for frames, rows, columns in grids:
        start = done + int(is_picture[done:].argmax())
        positions[:, done:start] = np.arange(place, place + start - done)
        cells = np.indices((frames, rows // OFFICIAL_LIMITS.merge, columns // OFFICIAL_LIMITS.merge)).reshape(3, -1)
        place += start - done
        done = start + cells.shape[1]
        positions[:, start:done] = place + cells
        place += max(rows, columns) // OFFICIAL_LIMITS.merge
    positions[:, done:] = np.arange(place, place + len(is_picture) - done)
    return positions


def shared_length(spans: Sequence[Span]) -> int:
    """How many first ids, with the same pictures under them, all prompts have in common; each keeps one of its own."""
    if len(spans) == 1:
        return 0
    first = spans[0]
    length = min(len(span) for span in spans) - 1
    for span in spans[1:]:
        differs = (first.ids[:length] != span.ids[:length]) | (first.is_picture[:length] != span.is_picture[:length])
        length = int(differs.argmax()) if differs.any() else length
    return _whole_pictures(first, length, min(_common_pictures(first, span) for span in spans[1:]))


def _common_pictures(one: Span, other: Span) -> int:
    for count, (mine, theirs) in enumerate(zip(one.pictures, other.pictures, strict=False)):
        if not _are_equal(mine, theirs):
            return count
    return min(len(one.pictures), len(other.pictures))


def _are_equal(one: PatchedImage, other: PatchedImage) -> bool:
    # A picture in memory is made ready anew for each prompt, so equal ones need not be the same object. The patches of
    # blank pictures are equal whatever their shapes, and what a prompt reads is not: positions follow the shape.
    return one is other or (one.grid_thw == other.grid_thw and np.array_equal(one.pixel_values, other.pixel_values))


def _whole_pictures(span: Span, length: int, common: int) -> int:
    places = np.flatnonzero(span.is_picture[:length])
    ends = _picture_ends(span.pictures[:common])
    kept = int(ends[ends <= len(places)].max(initial=0))
    return length if kept == len(places) else int(places[kept])


def _picture_ends(pictures: Sequence[PatchedImage]) -> NDArray[np.int64]:
    return np.cumsum([picture.placeholder_tokens for picture in pictures], dtype=np.int64)
