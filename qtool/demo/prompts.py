"""The official prompts in the pieces that training runs one after the other.

Rule: cut from the data in `qtool.arch.prompts`; not a word of a prompt stands here.
"""

from __future__ import annotations

import re

from qtool.arch.prompts import IMAGE_PAD, VISION_END, VISION_START, VL_EMBEDDER, VL_RERANKER, PromptSpec
from qtool.inputs.vision import PatchedImage


def _pieces(prompt: PromptSpec) -> list[str]:
    """What stands around the sides of a prompt, under its default instruction."""
    template = prompt.template.replace("{instruction}", prompt.default_instruction)
    return re.split(r"\{(?:query|document|content)\}", template)


RERANK_HEAD, BETWEEN, TAIL = _pieces(VL_RERANKER)
EMBED_HEAD = _pieces(VL_EMBEDDER)[0]  # what follows the content is TAIL again
RERANK_SYSTEM = RERANK_HEAD.partition("system\n")[2].partition("<|im_end|>")[0]


def side_prompt(text: str, picture: PatchedImage | None = None) -> str:
    """A query or document as the prompt shows it: first the picture, then the text."""
    placeholders = f"{VISION_START}{IMAGE_PAD * picture.placeholder_tokens}{VISION_END}" if picture else ""
    return placeholders + text or VL_RERANKER.empty_side
