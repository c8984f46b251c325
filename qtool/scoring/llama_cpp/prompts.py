"""Official prompts in the form that llama.cpp takes them.

Rule: one builder writes the prompts of all runtimes; here only the tokenizer under it is llama.cpp's.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from qtool.arch.prompts import IMAGE_PAD, VISION_END, VISION_START, PromptSpec
from qtool.errors import UsageError
from qtool.scoring.llama_cpp.model import DOCUMENT, QUERY, LlamaCppModel
from qtool.scoring.prompt import Prompt, PromptBuilder, Shown, png_base64
from qtool.scoring.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from qtool.inputs.items import Item, Pair

_PICTURE: Final = re.compile(f"{re.escape(VISION_START)}(?:{re.escape(IMAGE_PAD)})+{re.escape(VISION_END)}")


@dataclass(frozen=True)
class TextPrompt(Prompt):
    """A prompt that also knows its text, picture tokens included."""

    text: str = ""


class TextPromptBuilder(PromptBuilder):
    """The official prompts, as ids that are llama.cpp's and as text."""

    def pair(self, pair: Pair) -> TextPrompt:
        """See PromptBuilder."""
        return cast("TextPrompt", super().pair(pair))

    def item(self, item: Item) -> TextPrompt:
        """See PromptBuilder."""
        return cast("TextPrompt", super().item(item))

    def _prompt(self, name: str, text: str, shown: Shown, group: Hashable) -> TextPrompt:
        made = super()._prompt(name, text, shown, group)
        return TextPrompt(made.name, made.token_ids, made.pictures, made.group, text)

    def _load(self, item: Item) -> Shown:
        if item.video:
            raise UsageError(f"{item.name} holds a video, which llama.cpp does not read.", "Choose another panel.")
        return super()._load(item)


class _Encoding(NamedTuple):
    ids: list[int]


@dataclass(frozen=True)
class _FileTokenizer:
    """llama.cpp's tokenizer of one file, behind those methods of `tokenizers.Tokenizer` that prompts need."""

    tokens: Sequence[str]
    token_ids: Callable[[str], list[int]]

    @cached_property
    def _places(self) -> Mapping[str, int]:
        return {token: place for place, token in enumerate(self.tokens)}

    def encode(self, text: str, add_special_tokens: bool = True) -> _Encoding:  # noqa: FBT001, FBT002 - theirs
        del add_special_tokens
        return _Encoding(self.token_ids(normalized(text)))

    def token_to_id(self, token: str) -> int | None:
        return self._places.get(token)

    def no_padding(self) -> None:
        """There is none."""

    def no_truncation(self) -> None:
        """There is none."""


def prompt_builder(model: LlamaCppModel, token_ids: Callable[[str], list[int]]) -> TextPromptBuilder:
    """Official prompts of `model`; `token_ids` is llama.cpp's tokenizer."""
    tokenizer: Any = _FileTokenizer(model.tokens, token_ids)
    return TextPromptBuilder(PromptTokenizer(tokenizer, model.special_ids), model.prompt)


def normalized(text: str) -> str:
    """NFC: Qwen's tokenizer normalises what it reads, and llama.cpp's copy of it does not."""
    return unicodedata.normalize("NFC", text)


def side_text(item: Item, spec: PromptSpec) -> str:
    """What stands for a side without pictures in `{query}` or `{document}`."""
    return normalized(item.joined_text) if item.text else spec.empty_side


def ranked_text(pair: Pair, model: LlamaCppModel) -> str | None:
    """What /v1/rerank would make of the pair, where that is the prompt it asks for; None where only reading it will do.

    A file that bakes another prompt than the official one ranks with that: users get it, so verification must see it.
    """
    if any((pair.query.image, pair.query.video, pair.document.image, pair.document.video)):
        return None
    baked, asked = model.baked_instruction, pair.query.instruction
    if (baked is None and asked) or (baked is not None and (asked or model.prompt.default_instruction) != baked):
        return None
    query, document = side_text(pair.query, model.prompt), side_text(pair.document, model.prompt)
    if DOCUMENT in query:  # which llama.cpp would replace
        return None
    return model.rank_template.replace(QUERY, query).replace(DOCUMENT, document)


def request_of(prompt: TextPrompt, items: Sequence[Item], marker: str) -> Any:
    """The prompt as /v1/embeddings takes it: ids, or a text with `marker` for each picture, and the pictures.

    llama.cpp itself puts <|vision_start|> before a picture and <|vision_end|> behind it, so both give way to the marker
    with what is between them; what it then reads is the official sequence.
    """
    if not prompt.pictures:
        return list(prompt.token_ids)
    text = _PICTURE.sub(marker, normalized(prompt.text))
    pictures = [png_base64(item, source) for item in items for source in item.image]
    return {"prompt_string": text, "multimodal_data": pictures}
