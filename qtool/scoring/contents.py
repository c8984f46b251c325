"""Which pairs ask the same question.

Rule: only what the model sees counts: ids and labels do not, nor does an instruction on a document.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from qtool.inputs.items import ImageSource, Item, Pair, Video


def query_content(query: Item) -> Hashable:
    """Equal for queries that begin a prompt alike."""
    return document_content(query), query.instruction


def document_content(item: Item) -> Hashable:
    """Equal for sides that look alike in a prompt; pictures in memory have no hash and count by identity."""
    limits = item.limits if item.has_pictures else None
    return item.text, tuple(map(_image, item.image)), tuple(map(video_content, item.video)), limits


def video_content(video: Video) -> Hashable:
    """Equal for videos of the same frames."""
    frames = video.source if isinstance(video.source, str) else tuple(map(_image, video.source))
    return frames, video.fps, video.max_frames


def _image(source: ImageSource) -> Hashable:
    return source if isinstance(source, str) else id(source)


def distinct_pairs(pairs: Sequence[Pair]) -> list[list[int]]:
    """The places of each distinct pair, a query's documents side by side, so that they are read together."""
    queries: dict[Hashable, dict[Hashable, list[int]]] = {}
    for place, pair in enumerate(pairs):
        documents = queries.setdefault(query_content(pair.query), {})
        documents.setdefault(document_content(pair.document), []).append(place)
    return [places for documents in queries.values() for places in documents.values()]
