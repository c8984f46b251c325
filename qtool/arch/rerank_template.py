"""The chat template with which vLLM and SGLang render a reranker's official prompt: their `--chat-template`.

Rule: it is derived from the prompt's data, so that template and scorer cannot drift apart. Without such a template vLLM
warns once and scores the bare concatenation of query and document.
"""

from __future__ import annotations

import json
import re
from typing import Final

from qtool.arch.prompts import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, PromptSpec

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
