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

# Pictures and videos made ready once and kept for a while: a query's recurs with each of its documents. What is kept
# is bounded by pixels, not by the number of pictures.


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


# The official prompt of a pair or an item, as token ids and pictures. Text, placeholders and truncation are the
# publisher's; `arch/prompts.py` states them, this module applies them.


@dataclass(frozen=True)
class Prompt:
    """What the model reads for one pair or item; `name` says which in messages, prompts of a `group` begin alike.

    `pictures` are images and pairs of video frames, as their tokens follow each other.
    """

    name: str
    token_ids: tuple[int, ...]
    pictures: tuple[PatchedImage, ...] = ()
    group: Hashable = None


@dataclass(frozen=True)
class Shown:
    """The pictures of a side, and what stands for them in its text."""

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
        query, document = self._load(pair.query), self._load(pair.document)
        text = self.spec.template.format(
            instruction=pair.query.instruction or self.spec.default_instruction,
            query=self._side(pair.query, query),
            document=self._side(pair.document, document),
        )
        shown = Shown(query.text + document.text, query.pictures + document.pictures)
        return self._prompt(pair.name, text, shown, query_content(pair.query))

    def item(self, item: Item) -> Prompt:
        """The embedder's prompt."""
        shown = self._load(item)
        instruction = embed_instruction(item.instruction, self.spec)
        template = self.spec.template if instruction else self.spec.bare_template
        text = template.format(instruction=instruction, content=self._side(item, shown))
        return self._prompt(f"item {item.id!r}", text, shown, instruction)

    def _side(self, item: Item, shown: Shown) -> str:
        return shown.text + item.joined_text if item.text or shown.pictures else self.spec.empty_side

    def _prompt(self, name: str, text: str, shown: Shown, group: Hashable) -> Prompt:
        ids = self._tokenizer.encode(text)
        # Qwen3-Embedding's own tokenizer appends the end; one that does not gets it here.
        if self.spec.end_token and not self._tokenizer.appends(self.spec.end_token):
            ids.append(self._tokenizer.token_id(self.spec.end_token))
        kept = truncate(ids, self.spec.truncation, self._tail, self._tokenizer.special_ids)
        if shown.pictures:
            self._check_placeholders(name, kept, shown)
        return Prompt(name, tuple(kept), shown.pictures, group)

    def _check_placeholders(self, name: str, ids: Sequence[int], shown: Shown) -> None:
        for pad in (IMAGE_PAD, VIDEO_PAD):
            found, expected = ids.count(self._tokenizer.token_id(pad)), shown.text.count(pad)
            if found != expected:
                raise UsageError(
                    f"{name}: {found} picture tokens {pad} in the prompt, the pictures need {expected}.",
                    f"A text holds {pad}, or the pictures alone exceed the model's length.",
                )

    def _load(self, item: Item) -> Shown:
        if item.has_pictures and not self.spec.sees_pictures:
            raise UsageError(
                f"{item.name} holds a picture or video, and the model reads text only.",
                "Choose a text panel for this model.",
            )
        videos = [self._pictures.video(item, video) for video in item.video]
        images = [self._pictures.image(item, source) for source in item.image]
        text = "".join(map(_video_text, videos)) + "".join(_tokens(IMAGE_PAD, image) for image in images)
        return Shown(text, (*(step for video in videos for step in video.steps), *images))


def _tokens(pad: str, picture: PatchedImage) -> str:
    return f"{VISION_START}{pad * picture.placeholder_tokens}{VISION_END}"


def _video_text(video: PatchedVideo) -> str:
    times = zip(video.seconds, video.steps, strict=True)
    return "".join(f"<{second:.1f} seconds>{_tokens(VIDEO_PAD, step)}" for second, step in times)


def embed_instruction(given: str | None, spec: PromptSpec) -> str:
    """The instruction as an embedder's prompt shows it: stripped and punctuated where the official class does so."""
    instruction = given or ""
    if spec.punctuate:
        instruction = instruction.strip()
        if instruction and not _is_punctuation(instruction[-1]):
            instruction += "."
    return instruction or spec.default_instruction


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character).startswith("P")


def truncate(ids: Sequence[int], rule: Truncation, kept_tail: int, special_ids: Collection[int]) -> list[int]:
    """The ids that remain under the publisher's rule, of which the last `kept_tail` are not touched."""
    tail_start = max(len(ids) - kept_tail, 0)
    body, tail = ids[:tail_start], ids[tail_start:]
    room = rule.max_length if rule.tail_is_extra else rule.max_length - len(tail)
    if len(body) <= room:
        return list(ids)
    if not rule.keep_special:
        return [*body[:room], *tail]
    plain_room = max(room - sum(token in special_ids for token in body), 0)
    return [*_drop_plain(body, plain_room, special_ids), *tail]


def _drop_plain(body: Sequence[int], plain_room: int, special_ids: Collection[int]) -> list[int]:
    kept = []
    for token in body:
        if token in special_ids:
            kept.append(token)
        elif plain_room > 0:
            kept.append(token)
            plain_room -= 1
    return kept
