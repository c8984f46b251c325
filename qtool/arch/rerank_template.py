"""The chat template with which vLLM renders a reranker's official prompt: `vllm serve --chat-template`.

Rule: it is derived from the prompt's data, so that template and scorer cannot drift apart. Without such a template vLLM
warns once and scores the bare concatenation of query and document.
"""

from __future__ import annotations

import json
import re
from typing import Final

from qtool.arch.prompts import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, PromptSpec

FILE_NAME: Final = "rerank_template.jinja"

# vLLM sends the two sides as messages of the roles query and document, other callers as user and assistant.
_ROLES: Final = {"instruction": ("system",), "query": ("query", "user"), "document": ("document", "assistant")}


def rerank_template(prompt: PromptSpec) -> str:
    """A Jinja chat template that renders messages of query, document and (as `system`) instruction as `prompt`."""
    defaults = {"instruction": prompt.default_instruction, "query": prompt.empty_side, "document": prompt.empty_side}
    initial = ", ".join(f"{name}={_literal(value)}" for name, value in defaults.items())
    branches = " ".join(_branch(name, roles) for name, roles in _ROLES.items())
    messages = f"{{%- for message in messages -%}} {branches} {{%- endfor -%}}"
    return "\n".join((_side_macro(prompt), f"{{%- set sides = namespace({initial}) -%}}", messages, _output(prompt)))


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


def _branch(name: str, roles: tuple[str, ...]) -> str:
    condition = f"message.role in {json.dumps(roles)}"
    return f"{{%- if {condition} -%}}{{%- set sides.{name} = side(message.content) -%}}{{%- endif -%}}"


def _output(prompt: PromptSpec) -> str:
    parts = re.split(r"\{(instruction|query|document)\}", prompt.template)
    values = [f"sides.{part}" if index % 2 else _literal(part) for index, part in enumerate(parts)]
    return "{{- " + " ~ ".join(values) + " -}}"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
