"""The official prompt of a pair or an item, as token ids and pictures."""

from __future__ import annotations

import base64
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Final, TypeVar

from qtool.arch.prompts import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, PromptSpec, Truncation
from qtool.errors import QtoolError, UsageError
from qtool.inputs.items import ImageSource, Item, Pair, Video
from qtool.inputs.pictures import PatchedImage, load_image, patchify, resize_image
from qtool.inputs.videos import PatchedVideo, patchify_video
from qtool.scoring.scorer import query_content
from qtool.scoring.tokenizer import PromptTokenizer

# A cache of patches, since a query's pictures recur with each of its documents.

_MAX_CACHED_TOKENS: Final = 16_384  # 24 KiB of float32 pixels each: about 400 MB

MediaT = TypeVar("MediaT", PatchedImage, PatchedVideo)
T = TypeVar("T")


class PictureCache:
    """Patches of pictures and videos by source, least recently used first out; pictures in memory are not cached."""

    def __init__(self) -> None:
        self._cached: OrderedDict[Hashable, PatchedImage | PatchedVideo] = OrderedDict()
        self._tokens = 0

    def image(self, item: Item, source: ImageSource) -> PatchedImage:
        """The picture `source` of `item`. Raises an error that names the item."""
        key = (source, item.limits) if isinstance(source, str) else None
        return self._get(item, key, lambda: patchify(load_image(source), item.limits))

    def video(self, item: Item, video: Video) -> PatchedVideo:
        """The `video` of `item`. Raises an error that names the item."""
        is_named = isinstance(video.source, str) or all(isinstance(frame, str) for frame in video.source)
        return self._get(item, (video, item.limits) if is_named else None, lambda: patchify_video(video, item.limits))

    def _get(self, item: Item, key: Hashable, make: Callable[[], MediaT]) -> MediaT:
        if key is None:
            return _with_item_name(item, make)
        if key not in self._cached:
            self._add(key, _with_item_name(item, make))
        self._cached.move_to_end(key)
        media: MediaT = self._cached[key]  # type: ignore[assignment]
        return media

    def _add(self, key: Hashable, media: PatchedImage | PatchedVideo) -> None:
        self._cached[key] = media
        self._tokens += media.placeholder_tokens
        while self._tokens > _MAX_CACHED_TOKENS and len(self._cached) > 1:
            self._tokens -= self._cached.popitem(last=False)[1].placeholder_tokens


def png_base64(item: Item, source: ImageSource) -> str:
    """A picture of `item` for engines, already resized by the official rule: llama.cpp's own pads with black."""
    target = BytesIO()
    _with_item_name(item, lambda: resize_image(load_image(source), item.limits)).save(target, "PNG")
    return base64.b64encode(target.getvalue()).decode()


def _with_item_name(item: Item, make: Callable[[], T]) -> T:
    """The result of `make`, whose errors get the item's name and keep their class."""
    try:
        return make()
    except QtoolError as error:
        error_class = UsageError if type(error) is QtoolError else type(error)
        raise error_class(f"{item.name}: {error.message}", error.hint) from error


# Prompts: text, placeholders and truncation are the publisher's, given as data in `arch/prompts.py`.


@dataclass(frozen=True)
class Prompt:
    """What the model reads for one pair or item; `name` is for messages, prompts of one `group` begin alike.

    `pictures` are images and pairs of video frames, in the order of their tokens.
    """

    name: str
    token_ids: tuple[int, ...]
    pictures: tuple[PatchedImage, ...] = ()
    group: Hashable = None


@dataclass(frozen=True)
class MediaContent:
    """The pictures of a side, and the placeholder tokens for them in its text."""

    text: str = ""
    pictures: tuple[PatchedImage, ...] = ()


class PromptBuilder:
    """Turns pairs and items into prompts."""

    def __init__(self, tokenizer: PromptTokenizer, spec: PromptSpec) -> None:
        self.spec = spec
        self._tokenizer = tokenizer
        self._pictures = PictureCache()
        rule = spec.truncation
        self._tail = len(tokenizer.encode(rule.kept_suffix)) if rule.kept_suffix else rule.kept_tail

    def pair(self, pair: Pair) -> Prompt:
        """The reranker's prompt."""
        query, document = self._media(pair.query), self._media(pair.document)
        text = self.spec.template.format(
            instruction=pair.query.instruction or self.spec.default_instruction,
            query=self._side(pair.query, query),
            document=self._side(pair.document, document),
        )
        media = MediaContent(query.text + document.text, query.pictures + document.pictures)
        return self._prompt(pair.name, text, media, query_content(pair.query))

    def item(self, item: Item) -> Prompt:
        """The embedder's prompt."""
        media = self._media(item)
        instruction = embed_instruction(item.instruction, self.spec)
        template = self.spec.template if instruction else self.spec.bare_template
        text = template.format(instruction=instruction, content=self._side(item, media))
        return self._prompt(f"item {item.id!r}", text, media, instruction)

    def _side(self, item: Item, media: MediaContent) -> str:
        return media.text + item.joined_text if item.text or media.pictures else self.spec.empty_side

    def _prompt(self, name: str, text: str, media: MediaContent, group: Hashable) -> Prompt:
        ids = self._tokenizer.encode(text)
        # Qwen3-Embedding's own tokenizer appends the end token; for one that does not, it is appended here.
        if self.spec.end_token and not self._tokenizer.appends(self.spec.end_token):
            ids.append(self._tokenizer.token_id(self.spec.end_token))
        kept = truncate(ids, self.spec.truncation, self._tail, self._tokenizer.special_ids)
        if media.pictures:
            self._check_placeholders(name, kept, media)
        return Prompt(name, tuple(kept), media.pictures, group)

    def _check_placeholders(self, name: str, ids: Sequence[int], media: MediaContent) -> None:
        for pad in (IMAGE_PAD, VIDEO_PAD):
            found, expected = ids.count(self._tokenizer.token_id(pad)), media.text.count(pad)
            if found != expected:
                raise UsageError(
                    f"{name}: The prompt contains {found} of {pad}; its pictures need {expected}.",
                    f"A text contains {pad}, or the pictures alone exceed the model's length.",
                )

    def _media(self, item: Item) -> MediaContent:
        if item.has_pictures and not self.spec.sees_pictures:
            raise UsageError(
                f"{item.name} contains a picture or video; the model reads text only.",
                "Choose a text panel for this model.",
            )
        videos = [self._pictures.video(item, video) for video in item.video]
        images = [self._pictures.image(item, source) for source in item.image]
        text = "".join(map(_video_text, videos)) + "".join(_tokens(IMAGE_PAD, image) for image in images)
        return MediaContent(text, (*(step for video in videos for step in video.steps), *images))


def _tokens(pad: str, picture: PatchedImage) -> str:
    return f"{VISION_START}{pad * picture.placeholder_tokens}{VISION_END}"


def _video_text(video: PatchedVideo) -> str:
    times = zip(video.seconds, video.steps, strict=True)
    return "".join(f"<{second:.1f} seconds>{_tokens(VIDEO_PAD, step)}" for second, step in times)


def embed_instruction(given: str | None, spec: PromptSpec) -> str:
    """The instruction in an embedder's prompt: stripped and punctuated where the official class does so."""
    instruction = given or ""
    if spec.punctuate:
        instruction = instruction.strip()
        if instruction and not unicodedata.category(instruction[-1]).startswith("P"):
            instruction += "."
    return instruction or spec.default_instruction


def truncate(ids: Sequence[int], rule: Truncation, kept_tail: int, special_ids: Collection[int]) -> list[int]:
    """The ids that remain under the publisher's rule; the last `kept_tail` are always kept."""
    tail_start = max(len(ids) - kept_tail, 0)
    body, tail = ids[:tail_start], ids[tail_start:]
    limit = rule.max_length if rule.tail_is_extra else rule.max_length - len(tail)
    if len(body) <= limit:
        return list(ids)
    if not rule.keep_special:
        return [*body[:limit], *tail]
    plain = max(limit - sum(token in special_ids for token in body), 0)
    return [*_with_plain(body, plain, special_ids), *tail]


def _with_plain(body: Sequence[int], limit: int, special_ids: Collection[int]) -> list[int]:
    """All special tokens, and the first `limit` others."""
    kept = []
    for token in body:
        if token in special_ids:
            kept.append(token)
        elif limit > 0:
            kept.append(token)
            limit -= 1
    return kept
