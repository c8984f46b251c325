"""The official prompts of all families, and the chat templates that make vLLM and SGLang send them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

# Each prompt is copied from the model's publisher: QwenLM/Qwen3-VL-Embedding `src/models/qwen3_vl_reranker.py` and
# `qwen3_vl_embedding.py`; the model cards of Qwen3-Reranker and Qwen3-Embedding.

VISION_START: Final = "<|vision_start|>"
VISION_END: Final = "<|vision_end|>"
IMAGE_PAD: Final = "<|image_pad|>"
VIDEO_PAD: Final = "<|video_pad|>"
PICTURE_TOKENS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "image_token": IMAGE_PAD,
        "video_token": VIDEO_PAD,
        "vision_start_token": VISION_START,
        "vision_end_token": VISION_END,
    }
)
"""What transformers' processor calls them, where a tokenizer does not name others."""

YES: Final = "yes"
NO: Final = "no"
ANSWERS: Final = (YES, NO)
"""The words by which rerankers judge, in the order of a GGUF file's rank head."""

_JUDGE: Final = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_ANSWER: Final = "<|im_end|>\n<|im_start|>assistant\n"
_ANSWER_UNTHOUGHT: Final = _ANSWER + "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Truncation:
    """What goes when a prompt has more than `max_length` ids.

    The last `kept_tail` ids, or those of the text `kept_suffix`, always stay: on top of `max_length` where
    `tail_is_extra`, inside it otherwise. Before them ids are dropped from the end, special ones only where `keep_special`
    is false.
    """

    max_length: int
    kept_tail: int = 0
    kept_suffix: str = ""
    tail_is_extra: bool = False
    keep_special: bool = False


@dataclass(frozen=True)
class PromptSpec:
    """One published prompt: a template with `{instruction}` and either `{query}` and `{document}` or `{content}`.

    `default_instruction` stands where none is given; where it is empty, `bare_template` is used instead.
    `query_instruction` is what the publisher gives to the *queries* of an embedder, `end_token` what must come last,
    `empty_side` what stands for a side without text or picture, and `punctuate` ends an instruction with a full stop.
    """

    template: str
    default_instruction: str
    truncation: Truncation
    bare_template: str = ""
    query_instruction: str = ""
    empty_side: str = ""
    end_token: str = ""
    punctuate: bool = False
    sees_pictures: bool = False

    def instruction_in(self, text: str) -> str | None:
        """The instruction in a text that is otherwise this template; None where it is another one."""
        before, has_instruction, after = self.template.partition("{instruction}")
        if not has_instruction:
            return "" if text == self.template else None
        is_this = text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)
        return text[len(before) : len(text) - len(after)] if is_this else None


VL_RERANKER: Final = PromptSpec(
    template=_JUDGE + "<Instruct>: {instruction}<Query>:{query}\n<Document>:{document}" + _ANSWER,
    default_instruction="Given a search query, retrieve relevant candidates that answer the query.",
    # The official code cuts all but the last five ids to max_length and then puts those five back.
    truncation=Truncation(max_length=10240, kept_tail=5, tail_is_extra=True, keep_special=True),
    empty_side="NULL",
    sees_pictures=True,
)

TEXT_RERANKER: Final = PromptSpec(
    template=_JUDGE + "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}" + _ANSWER_UNTHOUGHT,
    default_instruction="Given a web search query, retrieve relevant passages that answer the query",
    # The model card tokenizes this suffix apart and cuts only what stands before it.
    truncation=Truncation(max_length=8192, kept_suffix=_ANSWER_UNTHOUGHT),
)

VL_EMBEDDER: Final = PromptSpec(
    template="<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{content}" + _ANSWER,
    default_instruction="Represent the user's input.",
    # The official class leaves truncation to the tokenizer, which cuts the end, generation prompt included.
    truncation=Truncation(max_length=8192),
    empty_side="NULL",
    punctuate=True,
    sees_pictures=True,
)

TEXT_EMBEDDER: Final = PromptSpec(
    template="Instruct: {instruction}\nQuery:{content}",
    bare_template="{content}",
    default_instruction="",
    query_instruction="Given a web search query, retrieve relevant passages that answer the query",
    truncation=Truncation(max_length=8192, kept_tail=1),
    end_token="<|endoftext|>",
)


# The chat template with which vLLM and SGLang render a reranker's official prompt: their `--chat-template`. It is
# derived from the prompt's data, so that template and scorer cannot drift apart. Without such a template vLLM warns
# once and scores the bare concatenation of query and document.

FILE_NAME: Final = "rerank_template.jinja"

# vLLM sends the sides as messages of the roles query and document, SGLang's text path as two of the role user and its
# picture path as variables. What a request gives as its instruction arrives as `instruction` or, from SGLang, `instruct`.
_INITIAL: Final = """\
{{%- set sides = namespace(instruction=instruction|default(instruct|default({instruction})), query={empty}, \
document={empty}, asked=false) -%}}
{{%- if query is defined and document is defined -%}}\
{{%- set sides.query = side(query) -%}}{{%- set sides.document = side(document) -%}}{{%- endif -%}}"""
_MESSAGES: Final = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}{%- set sides.instruction = side(message.content) -%}
{%- elif message.role in ['document', 'assistant'] or sides.asked -%}{%- set sides.document = side(message.content) -%}
{%- else -%}{%- set sides.query = side(message.content) -%}{%- set sides.asked = true -%}{%- endif -%}
{%- endfor -%}"""


def rerank_template(prompt: PromptSpec) -> str:
    """A Jinja chat template that renders query, document and instruction as `prompt`, whichever way an engine gives them."""
    initial = _INITIAL.format(instruction=_literal(prompt.default_instruction), empty=_literal(prompt.empty_side))
    return "\n".join((_side_macro(prompt), initial, _MESSAGES, _output(prompt)))


def _side_macro(prompt: PromptSpec) -> str:
    """One side of a pair in the official order: videos, then images, then texts."""
    kinds: list[tuple[tuple[str, ...], str]] = [(("text",), "part.text")]
    if prompt.sees_pictures:
        video, image = (_literal(VISION_START + pad + VISION_END) for pad in (VIDEO_PAD, IMAGE_PAD))
        kinds = [(("video", "video_url"), video), (("image", "image_url"), image), *kinds]
    loops = "\n".join(
        f"{{%- for part in content if part.type in {json.dumps(types)} -%}}"
        f"{{%- set seen.text = seen.text ~ {value} -%}}{{%- endfor -%}}"
        for types, value in kinds
    )
    empty = _literal(prompt.empty_side)
    return (
        "{%- macro side(content) -%}{%- set seen = namespace(text='') -%}\n"
        f"{{%- if content is string -%}}{{%- set seen.text = content -%}}{{%- else -%}}\n{loops}\n"
        f"{{%- endif -%}}{{{{- seen.text or {empty} -}}}}{{%- endmacro -%}}"
    )


def _output(prompt: PromptSpec) -> str:
    parts = re.split(r"\{(instruction|query|document)\}", prompt.template)
    values = [f"sides.{part}" if index % 2 else _literal(part) for index, part in enumerate(parts)]
    return "{{- " + " ~ ".join(values) + " -}}"


def _literal(text: str) -> str:
    """Between single quotes: SGLang knows a reranker's template by the words "yes" and "no", double quotes included."""
    escaped = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"').replace("'", "\\'")
    return f"'{escaped}'"
