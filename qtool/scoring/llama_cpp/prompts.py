"""Official prompts as llama.cpp takes them: the builder of all runtimes, with llama.cpp's tokenizer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from typing_extensions import override

from qtool.arch.prompts import IMAGE_PAD, VISION_END, VISION_START, PromptSpec
from qtool.errors import UsageError
from qtool.scoring.llama_cpp.model import DOCUMENT, QUERY, LlamaCppModel
from qtool.scoring.prompt import MediaContent, Prompt, PromptBuilder, png_base64
from qtool.scoring.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from qtool.inputs.items import Item, Pair

_PICTURE: Final = re.compile(f"{re.escape(VISION_START)}(?:{re.escape(IMAGE_PAD)})+{re.escape(VISION_END)}")


@dataclass(frozen=True)
class TextPrompt(Prompt):
    """A prompt with its text, picture tokens included."""

    text: str = ""


class TextPromptBuilder(PromptBuilder):
    """The official prompts, as text and as llama.cpp's token ids."""

    @override
    def pair(self, pair: Pair) -> TextPrompt:
        return cast("TextPrompt", super().pair(pair))

    @override
    def item(self, item: Item) -> TextPrompt:
        return cast("TextPrompt", super().item(item))

    @override
    def _prompt(self, name: str, text: str, media: MediaContent, group: Hashable) -> TextPrompt:
        prompt = super()._prompt(name, text, media, group)
        return TextPrompt(**vars(prompt), text=text)

    @override
    def _media(self, item: Item) -> MediaContent:
        if item.video:
            raise UsageError(f"{item.name} contains a video, which llama.cpp cannot read.", "Choose another panel.")
        return super()._media(item)


class _Encoding(NamedTuple):
    ids: list[int]


@dataclass(frozen=True)
class _FileTokenizer:
    """llama.cpp's tokenizer of one file with the methods of `tokenizers.Tokenizer` that prompts need."""

    tokens: Sequence[str]
    token_ids: Callable[[str], list[int]]

    @cached_property
    def _ids(self) -> Mapping[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}

    def encode(self, text: str, add_special_tokens: bool = True) -> _Encoding:  # noqa: FBT001, FBT002 - tokenizers' own
        del add_special_tokens
        return _Encoding(self.token_ids(normalized(text)))

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def no_padding(self) -> None:
        """llama.cpp pads nothing."""

    def no_truncation(self) -> None:
        """llama.cpp truncates nothing."""


def prompt_builder(model: LlamaCppModel, token_ids: Callable[[str], list[int]]) -> TextPromptBuilder:
    """The builder of `model`'s official prompts; `token_ids` is llama.cpp's tokenizer."""
    tokenizer: Any = _FileTokenizer(model.tokens, token_ids)
    return TextPromptBuilder(PromptTokenizer(tokenizer, model.special_ids), model.prompt)


def normalized(text: str) -> str:
    """`text` in NFC: Qwen's tokenizer normalises its input, llama.cpp's copy of it does not."""
    return unicodedata.normalize("NFC", text)


def side_text(item: Item, spec: PromptSpec) -> str:
    """The text that replaces `{query}` or `{document}` for a side without pictures."""
    return normalized(item.joined_text) if item.text else spec.empty_side


def ranked_text(pair: Pair, model: LlamaCppModel) -> str | None:
    """The prompt of /v1/rerank for the pair; None where /v1/rerank cannot ask what the pair asks.

    A file with a template other than the official one ranks by that: its users get these scores, so they are verified.
    """
    if any((pair.query.image, pair.query.video, pair.document.image, pair.document.video)):
        return None
    baked, given = model.baked_instruction, pair.query.instruction
    if (baked is None and given) or (baked is not None and (given or model.prompt.default_instruction) != baked):
        return None
    query, document = side_text(pair.query, model.prompt), side_text(pair.document, model.prompt)
    if DOCUMENT in query:  # which llama.cpp would replace
        return None
    return model.rank_template.replace(QUERY, query).replace(DOCUMENT, document)


def request_of(prompt: TextPrompt, items: Sequence[Item], marker: str) -> Any:
    """The prompt as /v1/embeddings takes it: ids, or a text with `marker` for each picture, and the pictures.

    llama.cpp itself writes <|vision_start|> and <|vision_end|> around a picture, so the marker replaces both of them
    and the tokens between; the model then reads the official sequence.
    """
    if not prompt.pictures:
        return list(prompt.token_ids)
    text = _PICTURE.sub(marker, normalized(prompt.text))
    pictures = [png_base64(item, source) for item in items for source in item.image]
    return {"prompt_string": text, "multimodal_data": pictures}
