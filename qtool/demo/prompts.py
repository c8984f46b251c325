"""The official Qwen3-VL reranker and embedder prompts, for training and evaluating the demo models.

The one rule: character for character what the official scripts build; nothing else lives here.
"""

from __future__ import annotations

from dataclasses import dataclass

RERANK_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
RERANK_INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."
EMBED_INSTRUCTION = "Represent the user's input."

RERANK_HEAD = (
    f"<|im_start|>system\n{RERANK_SYSTEM}<|im_end|>\n<|im_start|>user\n<Instruct>: {RERANK_INSTRUCTION}<Query>:"
)
EMBED_HEAD = f"<|im_start|>system\n{EMBED_INSTRUCTION}<|im_end|>\n<|im_start|>user\n"
BETWEEN = "\n<Document>:"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"

IMAGE_PAD = "<|image_pad|>"


@dataclass(frozen=True)
class Side:
    """A query or document in prompt form: its text and the placeholder count of its picture (0: none)."""

    text: str = ""
    picture_tokens: int = 0

    @property
    def prompt(self) -> str:
        """Picture first, then text; an empty side is the word NULL."""
        picture = f"<|vision_start|>{IMAGE_PAD * self.picture_tokens}<|vision_end|>" if self.picture_tokens else ""
        return (picture + self.text) or "NULL"


def rerank_prompt(query: Side, document: Side) -> str:
    """Return the whole reranker prompt of one pair."""
    return RERANK_HEAD + query.prompt + BETWEEN + document.prompt + TAIL


def embed_prompt(item: Side) -> str:
    """Return the whole embedder prompt of one query or document."""
    return EMBED_HEAD + item.prompt + TAIL
