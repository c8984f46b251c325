"""Pictures made ready once and kept for a while: a query's recurs with each of its documents.

Rule: what is kept is bounded by pixels, not by the number of pictures.
"""

from __future__ import annotations

import base64
from collections import OrderedDict
from io import BytesIO
from typing import Final

from qtool.errors import QtoolError, UsageError
from qtool.inputs.items import ImageSource, Item
from qtool.inputs.vision import PatchedImage, load_image, patchify, resize_image

_TOKENS_KEPT: Final = 16_384  # 24 KiB of float32 pixels each: about 400 MB


class PictureCache:
    """Patchified pictures by source, the least recently used dropped first; pictures in memory are not kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, PatchedImage] = OrderedDict()

    def patched(self, item: Item, source: ImageSource) -> PatchedImage:
        """The picture `source` of `item`. Raises UsageError naming the item."""
        if not isinstance(source, str):
            return _patchify(item, source)
        if source not in self._kept:
            self._kept[source] = _patchify(item, source)
        self._kept.move_to_end(source)
        picture = self._kept[source]
        self._shrink()
        return picture

    def _shrink(self) -> None:
        tokens = sum(picture.placeholder_tokens for picture in self._kept.values())
        while tokens > _TOKENS_KEPT:
            tokens -= self._kept.popitem(last=False)[1].placeholder_tokens


def png_base64(source: ImageSource) -> str:
    """A picture as engines take it, resized by the official rule: they have rules of their own (llama.cpp pads with black)."""
    target = BytesIO()
    resize_image(load_image(source)).save(target, "PNG")
    return base64.b64encode(target.getvalue()).decode()


def _patchify(item: Item, source: ImageSource) -> PatchedImage:
    try:
        return patchify(load_image(source))
    except QtoolError as error:
        raise UsageError(f"Item {item.id!r}: {error.message}", error.hint) from error
