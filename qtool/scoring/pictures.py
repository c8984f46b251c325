"""Pictures and videos made ready once and kept for a while: a query's recurs with each of its documents.

Rule: what is kept is bounded by pixels, not by the number of pictures.
"""

from __future__ import annotations

import base64
from collections import OrderedDict
from collections.abc import Callable, Hashable
from io import BytesIO
from typing import Final, TypeVar

from qtool.errors import QtoolError, UsageError
from qtool.inputs.items import ImageSource, Item, Video
from qtool.inputs.video import PatchedVideo, patchify_video
from qtool.inputs.vision import PatchedImage, load_image, patchify, resize_image

_TOKENS_KEPT: Final = 16_384  # 24 KiB of float32 pixels each: about 400 MB

SeenT = TypeVar("SeenT", PatchedImage, PatchedVideo)
T = TypeVar("T")


class PictureCache:
    """Pictures and videos by source, the least recently used dropped first; those in memory are not kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, PatchedImage | PatchedVideo] = OrderedDict()
        self._tokens = 0

    def image(self, item: Item, source: ImageSource) -> PatchedImage:
        """The picture `source` of `item`. Raises an error that names the item."""
        key = (source, item.limits) if isinstance(source, str) else None
        return self._ready(item, key, lambda: patchify(load_image(source), item.limits))

    def video(self, item: Item, video: Video) -> PatchedVideo:
        """The `video` of `item`. Raises an error that names the item."""
        is_named = isinstance(video.source, str) or all(isinstance(frame, str) for frame in video.source)
        return self._ready(item, (video, item.limits) if is_named else None, lambda: patchify_video(video, item.limits))

    def _ready(self, item: Item, key: Hashable, make: Callable[[], SeenT]) -> SeenT:
        if key is None:
            return _named(item, make)
        if key not in self._kept:
            self._keep(key, _named(item, make))
        self._kept.move_to_end(key)
        seen: SeenT = self._kept[key]  # type: ignore[assignment]
        return seen

    def _keep(self, key: Hashable, seen: PatchedImage | PatchedVideo) -> None:
        self._kept[key] = seen
        self._tokens += seen.placeholder_tokens
        while self._tokens > _TOKENS_KEPT and len(self._kept) > 1:
            self._tokens -= self._kept.popitem(last=False)[1].placeholder_tokens


def png_base64(item: Item, source: ImageSource) -> str:
    """A picture of `item` as engines take it, resized by the official rule: llama.cpp's own pads with black."""
    target = BytesIO()
    _named(item, lambda: resize_image(load_image(source), item.limits)).save(target, "PNG")
    return base64.b64encode(target.getvalue()).decode()


def _named(item: Item, make: Callable[[], T]) -> T:
    """What `make` makes; its errors get the item's name and keep their kind."""
    try:
        return make()
    except QtoolError as error:
        kind = UsageError if type(error) is QtoolError else type(error)
        raise kind(f"{item.name}: {error.message}", error.hint) from error
