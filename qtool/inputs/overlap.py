"""Which documents two panels share, by what they contain: names, ids and file formats do not count."""

from __future__ import annotations

import base64
import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qtool.inputs.items import ImageSource, Item
from qtool.inputs.panels import Panel
from qtool.inputs.pictures import load_image

# Texts, without case, punctuation and spacing. A long text is shared if half of its runs of characters are in the
# other panel; a short one only if it is there whole, since sentences of one form differ in a single word.

_LONG: Final = 160
_RUN: Final = 30
_SHARE: Final = 0.5
_LEFT_OUT: Final = re.compile(r"[\W_]+")


def normalized(text: str) -> str:
    """Letters and digits in their compatibility form, without case, spaces and punctuation."""
    return _LEFT_OUT.sub("", unicodedata.normalize("NFKC", text).casefold())


def _runs(text: str) -> set[int]:
    return {hash(text[start : start + _RUN]) for start in range(len(text) - _RUN + 1)}


# Pictures, as thumbnails. Another size or encoding changes few cells by little; another thing drawn, a word, or a
# colour of a small shape changes some cells by much.

_CELLS: Final = 32
_FAR: Final = 32
_CHANGED: Final = 6
"""Of 1,024 cells. The nearest two pictures of the demo world, with one small thing each, differ so in 13 cells; JPEG of
quality 85 changes up to 5 of them."""
_COARSE: Final = 4
_COARSELY_FAR: Final = 12.0


def _thumbnail(picture: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(picture.resize((_CELLS, _CELLS), Image.Resampling.BOX), dtype=np.uint8)


def _coarse(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean colours [n, 4 · 4 · 3], which equal pictures have nearly equal."""
    side = _CELLS // _COARSE
    cut = thumbnails.reshape(-1, _COARSE, side, _COARSE, side, 3)
    means: NDArray[np.float32] = cut.mean(axis=(2, 4), dtype=np.float32).reshape(len(cut), -1)
    return means


@dataclass(frozen=True)
class _Pictures:
    thumbnails: NDArray[np.uint8]

    @cached_property
    def coarse(self) -> NDArray[np.float32]:
        return _coarse(self.thumbnails)

    def has(self, thumbnail: NDArray[np.uint8]) -> bool:
        if not len(self.thumbnails):
            return False
        near = np.abs(self.coarse - _coarse(thumbnail[None])).max(axis=1) <= _COARSELY_FAR
        distance = np.abs(self.thumbnails[near].astype(np.int16) - thumbnail).max(axis=3)
        return bool(((distance > _FAR).sum(axis=(1, 2)) <= _CHANGED).any())


# Documents. Videos are not compared: their frames would have to be decoded.


def _documents(panel: Panel) -> list[Item]:
    return [document for query in panel.queries for document in query.documents]


def _pictures(documents: Sequence[Item]) -> list[ImageSource]:
    sources = {source if isinstance(source, str) else id(source): source for each in documents for source in each.image}
    return list(sources.values())


@dataclass(frozen=True)
class PanelContents:
    """What a panel's documents contain, for comparison with other data; each part is read when it is first needed."""

    panel: Panel

    def shared(self, data: Panel) -> int:
        """How many documents of `data` the panel contains too, or contains nearly: a picture of them, or their text.

        A short text beside a picture is no sign, since it may describe many pictures.
        """
        return sum(self._holds(document) for document in _documents(data))

    def _holds(self, document: Item) -> bool:
        text = normalized(document.joined_text)
        if len(text) >= _LONG:
            own = _runs(text)
            if len(own & self._runs) >= _SHARE * len(own):
                return True
        elif text and not document.has_pictures and text in self._texts:
            return True
        return any(self._pictures.has(_thumbnail(load_image(source))) for source in document.image)

    @cached_property
    def _texts(self) -> set[str]:
        return {normalized(document.joined_text) for document in _documents(self.panel)}

    @cached_property
    def _runs(self) -> set[int]:
        return set().union(*(_runs(text) for text in self._texts if len(text) >= _LONG))

    @cached_property
    def _pictures(self) -> _Pictures:
        thumbnails = [_thumbnail(load_image(source)) for source in _pictures(_documents(self.panel))]
        return _Pictures(np.array(thumbnails, np.uint8).reshape(-1, _CELLS, _CELLS, 3))


# Keys, by which an artefact remembers what it was calibrated on: a few bytes for each document, found again only where a
# panel holds the same text or the same pixels.

_KEY_BYTES: Final = 6


def content_keys(panel: Panel) -> str:
    """The keys of all documents of a panel, as text."""
    return base64.b64encode(b"".join(sorted(set(_keys(panel))))).decode()


def shared_keys(keys: str, panel: Panel) -> int:
    """How many documents of the panel have one of the `keys`. Raises ValueError where these are not keys."""
    packed = base64.b64decode(keys, validate=True)
    known = {packed[start : start + _KEY_BYTES] for start in range(0, len(packed), _KEY_BYTES)}
    return sum(key in known for key in _keys(panel))


def _keys(panel: Panel) -> Iterator[bytes]:
    digests: dict[ImageSource | int, bytes] = {}
    for document in _documents(panel):
        text = normalized(document.joined_text)
        content = [] if document.image and len(text) < _LONG else [text.encode()]
        for source in document.image:
            place = source if isinstance(source, str) else id(source)
            if place not in digests:
                picture = load_image(source)
                digests[place] = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).digest()
            content.append(digests[place])
        if any(content):
            yield hashlib.sha256(b"\0".join(content)).digest()[:_KEY_BYTES]
