"""The official prompt of a pair or an item, as token ids and pictures.

Rule: text, placeholders and truncation are the publisher's; `arch/prompts.py` states them, this module applies them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

from qtool.arch.prompts import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, PromptSpec, Truncation
from qtool.errors import UsageError
from qtool.inputs.items import Item, Pair
from qtool.inputs.video import PatchedVideo
from qtool.inputs.vision import PatchedImage
from qtool.scoring.contents import query_content
from qtool.scoring.pictures import PictureCache
from qtool.scoring.tokenizer import PromptTokenizer


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
